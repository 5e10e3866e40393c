"""Small valid files of every format, made by our own writers: what the fuzzer begins with."""

import functools
import gzip
import io
import json
import pathlib
import tempfile

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

TEXT = "The quick brown fox jumps over the lazy dog. 0123456789 (Hello), world! é日本\n"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def written(write):
    """{name: bytes} of the files that write(directory) makes."""
    with tempfile.TemporaryDirectory() as path:
        directory = pathlib.Path(path)
        write(directory)
        return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def arrays():
    return {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "n": np.arange(3)}


def save_arrays(directory, **options):
    from nanoflax.hf import safetensors_io

    safetensors_io.save_safetensors(directory, [(n, x.shape, x.dtype, x) for n, x in arrays().items()], **options)


def safetensors():
    return [written(save_arrays)]


def shards():
    return [written(lambda directory: save_arrays(directory, max_shard_bytes=24))]


def mxfp4():
    from nanoflax.hf import safetensors_io

    parts = {"w_blocks": np.arange(96, dtype=np.uint8).reshape(1, 3, 2, 16), "w_scales": np.full((1, 3, 2), 120, "u1")}
    tensors = [(name, x.shape, x.dtype, x) for name, x in parts.items()]
    return [written(lambda directory: safetensors_io.save_safetensors(directory, tensors))]


@functools.cache
def base():
    """(config, parameters) of a tiny decoder."""
    import jax

    import nanoflax
    from nanoflax.config import preset

    config = preset("nano-1m", vocab_size=300, context=16, layers=1, dim=8, heads=2)
    return config, nanoflax.init(nanoflax.build(config), jax.random.PRNGKey(0))


def models():
    """(config, family) of some tiny models."""
    from nanoflax.config import preset

    size = dict(vocab_size=40, context=16, layers=1, dim=8, heads=2)
    encoder = dict(architecture="encoder", norm_place="post", embed_norm=True, token_types=2, norm_eps=1e-12, bias=True)
    return [
        preset("nano-1m", **size),
        preset("gpt2", **size),
        preset("nano-bart", **size),
        preset("gpt2", **size, **encoder, head="classify", labels=2, class_names=("no", "yes"), tied=True),
        preset("gpt2", **size, **encoder, head="mlm", mlm_transform=True, head_bias=True, tied=True),
    ]


@functools.cache
def configs():
    import jax

    import nanoflax
    from nanoflax import hf
    from nanoflax.errors import UserError

    found = []
    for config in models():
        params = nanoflax.init(nanoflax.build(config), jax.random.PRNGKey(0))
        try:
            files = written(lambda directory: hf.save(directory, config, params))
        except UserError as error:
            print(error)
            continue
        found.append({"generation_config.json": b"{}"} | files)
    return found


@functools.cache
def adapters():
    import jax

    from nanoflax import hf, peft
    from nanoflax.config import LoRA

    config, params = base()
    settings = LoRA(rank=2)
    adapted = peft.add(params, settings, jax.random.PRNGKey(1))

    def write(directory):
        hf.save_adapter(directory, config, adapted, settings)
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"base_model_name_or_path": "base"}))

    return [written(write)]


@functools.cache
def piece_model(kind):
    from nanoflax import tokenizers

    return tokenizers.train_sentencepiece([TEXT * 3], 308, kind)


@functools.cache
def tokenizer_json():
    from nanoflax import tokenizers

    found = []
    for tokenizer in (tokenizers.ByteTokenizer(), piece_model("bpe"), piece_model("unigram")):
        exported = tokenizers.to_huggingface(tokenizer, True)
        files = dict(exported.files)
        spec = json.loads(files["tokenizer.json"])
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        known = {token["content"]: token["id"] for token in spec["added_tokens"]}
        size = max(*known.values(), len(spec["model"]["vocab"]) - 1) + 1
        names = [name for name in ("<mask>", "<|im_start|>", "<|im_end|>") if name not in known]
        more = {name: size + i for i, name in enumerate(names)}
        spec["added_tokens"] += [{"id": i, "content": name} | flags for name, i in more.items()]
        files["tokenizer.json"] = json.dumps(spec).encode()
        settings = json.loads(files["tokenizer_config.json"]) | {
            "chat_template": TEMPLATE,
            "additional_special_tokens": ["<|im_end|>"],
            "added_tokens_decoder": {str(more["<|im_start|>"]): {"content": "<|im_start|>", "special": True}},
        }
        files["tokenizer_config.json"] = json.dumps(settings).encode()
        files["special_tokens_map.json"] = b'{"mask_token": {"content": "<mask>", "lstrip": true}}'
        found.append(files | {"added_tokens.json": b"{}", "generation_config.json": b'{"eos_token_id": [2]}'})
    return found


def vocabularies():
    model = piece_model("unigram").model
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE, "additional_special_tokens": ["<|im_end|>"]}
    settings = json.dumps(settings).encode()
    names = ["</s>", "<unk>", "<pad>", ">>fr<<", "<|im_end|>", *(chr(c) for c in range(33, 127)), "Ġt", "he"]
    vocabulary = json.dumps({name: i for i, name in enumerate(names)}).encode()
    pieces = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", *map(chr, range(33, 127))])
    return [
        {"vocab.txt": pieces.encode(), "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'},
        {"vocab.json": vocabulary, "merges.txt": b"#version: 0.2\nh e\n", "tokenizer_config.json": settings},
        {"source.spm": model, "target.spm": model, "vocab.json": vocabulary, "tokenizer_config.json": settings},
        {"spiece.model": model, "tokenizer_config.json": json.dumps({"extra_ids": 3, "eos_token": "<eos>"}).encode()},
        {"tokenizer.model": piece_model("bpe").model, "tokenizer_config.json": b'{"eos_token": "<eos>"}'},
    ]


def sentencepiece():
    return [{"x.model": piece_model(kind).model} for kind in ("bpe", "unigram")]


def templates():
    marked = TEMPLATE.replace("{{ '<|im_start|>'", "{% generation %}x{% endgeneration %}{{ '<|im_start|>'")
    loop = "{%- set ns = namespace(x='') %}{% for i in range(3) %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x * 2 }}"
    macro = (
        "{% macro f(a, b=1) %}{{ a|string|replace('a', 'b') }}{% endmacro %}{{ f([1, 'a']) }}{{ strftime_now('%Y') }}"
    )
    return [{"chat_template.jinja": text.encode()} for text in (TEMPLATE, marked, loop, macro)]


@functools.cache
def gguf():
    import gguf as library

    scalars, texts = library.GGUFValueType, ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "<0x0A>", "<|im_end|>"]
    sizes = {"context_length": 16, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
             "attention.head_count": 2, "attention.head_count_kv": 1}  # fmt: skip

    def write(directory, kind):
        writer = library.GGUFWriter(directory / "model.gguf", "llama")
        for name, value in sizes.items():
            writer.add_key_value(f"llama.{name}", value, scalars.UINT32)
        writer.add_key_value("llama.attention.layer_norm_rms_epsilon", 1e-5, scalars.FLOAT32)
        writer.add_tokenizer_model(kind)
        writer.add_token_list(texts)
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 6, 3])
        if kind == "llama":
            writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -1.5, 0.0, 0.0])
        else:
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        writer.add_tensor("token_embd.weight", np.zeros((9, 32), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
        blocks = library.quants.quantize(np.ones((9, 32), np.float32), library.GGMLQuantizationType.Q8_0)
        writer.add_tensor("output.weight", blocks, raw_dtype=library.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return [written(lambda directory, kind=kind: write(directory, kind)) for kind in ("llama", "gpt2")]


def jsonl():
    chat = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "tools": [{"name": "f"}],
    }
    call = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}
    files = [
        [{"text": "a b", "label": "x"}, {"text": "c", "label": 2}, {"text": "d", "labels": ["x", "y"]}],
        [
            {"tokens": ["a", "b"], "tags": ["B-X", "O"]},
            {"tokens": ["c"], "tags": ["S-X"]},
            {"tokens": ["d"], "tags": ["O"]},
        ],
        [{"source": "a", "target": "b"}, {"source": "c", "target": "d"}],
        [chat, call, chat | {"tools": json.dumps([{"name": "g"}])}],
        [{"text": "a text"}, {"text": "another"}],
    ]
    return [{"x.jsonl": "\n".join(map(json.dumps, lines)).encode()} for lines in files] + [
        {"x.jsonl": json.dumps(files[0]).encode()}
    ]


def tables():
    rows = [
        'text,label\na b,x\n"c, ""d""\ne",y\n',
        "source\ttarget\na\tb\nc\td\n",
        "tokens\ttags\na b\tO B-X\nc\tO\n",
        "sep=;\ntext;label\na;x\nb;y\n",
        'a text,x\nanother,y\n"third",x\n',
    ]
    return [{"x.csv": text.encode()} for text in rows]


def conll():
    texts = [
        "-DOCSTART- O\n\na B-X\nb I-X\n. O\n\nc O\nd S-Y\n",
        "# text = a\n1\ta\tNN\tB-X\n2\tb\tNN\tO\n\n1\tc\tNN\tO\n",
    ]
    return [{"x.conll": text.encode()} for text in texts]


def pairs():
    return [{"x.en": b"one\ntwo\nthree\n", "x.fr": "un\ndeux\ntrois é\n".encode()}]


def texts():
    text = TEXT.encode() * 3
    plain = [{"x.txt": x} for x in (text, gzip.compress(text), b"\xef\xbb\xbf" + text, TEXT.encode("utf-16"))]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(9), "text": [TEXT] * 9}), parquet, row_group_size=4)
    compressed = zstandard.ZstdCompressor().compress(b'{"text": "one"}\n{"text": "two"}\n')
    return [
        *plain,
        {"x.parquet": parquet.getvalue()},
        {"x.csv": b'id,text\n1,"one, two"\n2,three\n'},
        {"x.jsonl": compressed},
    ]


@functools.cache
def checkpoints():
    from nanoflax.runs import checkpoint

    def write(directory):
        with checkpoint.Checkpoints(directory, log=lambda line: None) as saved:
            state = {"params": {"a": np.ones((2, 3), np.float32), "b": {"c": np.zeros(2, np.float32)}}}
            saved.save(1, state, {"step": 1, "tokenizer": "x", "config": {"a": [1, 2]}}, 1.0)

    return [written(write)]


def manifests():
    return [{name.removeprefix("1/"): data for name, data in files.items() if "metadata" in name or "manifest" in name}
            for files in checkpoints()]  # fmt: skip


@functools.cache
def runs():
    from nanoflax import tokenizers
    from nanoflax.config import Config
    from nanoflax.runs import directory as runs

    found = []
    for tokenizer in (tokenizers.ByteTokenizer(), piece_model("bpe")):
        files = written(lambda directory, tokenizer=tokenizer: runs.write_run(str(directory), Config(), tokenizer))
        log = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan", "validation_loss": 2.25}\n'
        found.append({"metrics.jsonl": log, "labels.json": b'{"labels": ["a"], "several": false}'} | files)
    return found
