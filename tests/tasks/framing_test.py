"""The ids around texts: an exported tokenizer gives Transformers the ids that the model was trained on."""

import dataclasses
import io
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import nanoflax
from nanoflax import config as configs
from nanoflax import data, hf, tasks, tokenizers
from nanoflax.hf.families import FAMILIES
from nanoflax.hf.family import to_config
from nanoflax.hf.layouts import parameter_shapes
from nanoflax.runs.ranking import candidate_ids
from nanoflax.tasks import Classification, Pair, Tagging, Text
from nanoflax.tokenizers.huggingface import MarianTokenizer
from tests.compiled import apply

WORDS = "the cat sat on a mat while New York dogs ran home quickly def return for in range print value 12 345".split()


def sentences(number, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(number)]


def sentencepiece_model(**options):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(1500)), model_writer=output, minloglevel=4, hard_vocab_limit=False, **options
    )
    return output.getvalue()


def byte_level(template=None):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    made.train_from_iterator(
        sentences(300),
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if template:
        made.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


NAMES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def from_directory(path, files, **config):
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizers.load(path)


def from_model(path, **options):
    (path / "my.model").write_bytes(sentencepiece_model(**options))
    return tokenizers.load(path / "my.model")


def from_json(path, template):
    files = {"tokenizer.json": byte_level(template).to_str()}
    return from_directory(path, files, tokenizer_class="PreTrainedTokenizerFast", **NAMES)


def gpt2(path, **flags):
    model = json.loads(byte_level().to_str())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    files = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": f"#version: 0.2\n{merges}\n"}
    return from_directory(path, files, tokenizer_class="GPT2Tokenizer", **NAMES, **flags)


def bert(path):
    letters = sorted({letter for word in WORDS for letter in word.lower()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "cat"]
    return from_directory(path, {"vocab.txt": "\n".join(tokens)}, tokenizer_class="BertTokenizer")


def marian(path):
    model = sentencepiece_model(model_type="unigram", vocab_size=120, bos_id=-1)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    own = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    names = ["</s>", "<unk>", *(piece for piece in own if piece not in ("<unk>", "</s>", "<s>")), "<pad>"]
    files = {"source.spm": model, "target.spm": model, "vocab.json": json.dumps({n: i for i, n in enumerate(names)})}
    return from_directory(path, files, tokenizer_class="MarianTokenizer", source_lang="en", target_lang="fr")


def gguf(_, **flags):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = dict(
        model="gpt2", pre="llama-bpe", tokens=[*letters, "th", "the", "<|bos|>", "<|eos|>"],
        token_type=[1] * 258 + [3] * 2, merges=["t h", "th e"], bos_token_id=258, eos_token_id=259, **flags,
    )  # fmt: skip
    return tokenizers.from_gguf({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})


T5 = dict(model_type="unigram", vocab_size=130, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
LLAMA = dict(model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
             remove_extra_whitespaces=False)  # fmt: skip
KINDS = {
    "bytes": lambda path: tokenizers.load("bytes"),
    "bpe": lambda path: tokenizers.train_sentencepiece(sentences(500), 330, "bpe"),
    "unigram": lambda path: tokenizers.train_sentencepiece(sentences(500), 320, "unigram"),
    "model bpe": lambda path: from_model(path, **LLAMA),
    "model unigram": lambda path: from_model(path, model_type="unigram", vocab_size=120, pad_id=3),
    "json": lambda path: from_json(path, None),
    "json bos": lambda path: from_json(path, "<s> $A"),
    "json bos eos": lambda path: from_json(path, "<s> $A </s>"),
    "vocab.txt": bert,
    "marian": marian,
    "t5": lambda path: from_directory(path, {"spiece.model": sentencepiece_model(**T5)}, tokenizer_class="T5Tokenizer"),
    "llama": lambda path: from_directory(
        path, {"tokenizer.model": sentencepiece_model(**LLAMA)}, tokenizer_class="LlamaTokenizer", **NAMES
    ),
    "gpt2 flags": lambda path: gpt2(path, add_bos_token=True, add_eos_token=True),
    "gguf flags": lambda path: gguf(path, add_bos_token=True, add_eos_token=True),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def model_config(tokenizer, family, head):
    """A tiny model of a family of Transformers."""
    own = dict(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=32, max_position_embeddings=64, num_labels=2)  # fmt: skip
    if family == "t5":
        own = dict(vocab_size=tokenizer.vocab_size, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32,
                   decoder_start_token_id=tokenizer.bos_id)  # fmt: skip
    theirs = json.loads(transformers.AutoConfig.for_model(family, **own).to_json_string(use_diff=False))
    return to_config(FAMILIES[family], theirs, head, 50)


def export(path, config, tokenizer):
    """A random model in Transformers' format. Returns (its parameters, Transformers' tokenizer)."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    params = traverse_util.unflatten_dict({p: rng.normal(0, 0.3, s).astype(np.float32) for p, s in shapes}, sep="/")
    hf.save(path, config, params, tokenizer)
    return params, transformers.AutoTokenizer.from_pretrained(path)


def rows(example, tokenizer, task=None):
    if task is None:
        return tasks.encode([example], tokenizer, 64, ("a", "b")).rows[0]
    config = configs.Config(task=task)
    return tasks.encode_for_task([example], config, tokenizer).with_noise([(0, 0)]).rows[0]


def test_exported_ids_are_the_ids_trained_on(tokenizer, tmp_path):
    whole = export(tmp_path / "whole", model_config(tokenizer, "bert", "classify"), tokenizer)[1]
    causal = export(tmp_path / "causal", model_config(tokenizer, "llama", "lm"), tokenizer)[1]
    source = export(tmp_path / "source", model_config(tokenizer, "t5", "lm"), tokenizer)[1]
    classifier = export(tmp_path / "classifier", model_config(tokenizer, "llama", "classify"), tokenizer)[1]
    denoise = configs.Denoise(length=64, target_length=64, noise="none")
    texts = sentences(8, seed=1)
    for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
        ids, target = whole(text).input_ids, source(text_target=other).input_ids
        assert (
            rows(Classification(text, ("a",), "p"), tokenizer)["tokens"].tolist() == ids == classifier(text).input_ids
        )
        words = text.split()
        assert rows(Tagging(words, ["a"] * len(words), "p"), tokenizer)["tokens"].tolist() == ids
        assert rows(Text(text, "p"), tokenizer, configs.MaskedLM(length=64))["targets"].tolist() == ids
        target += [tokenizer.eos_id] * (tokenizer.eos_id not in target[1:])  # every target ends
        for row in (rows(Pair(text, other, "p"), tokenizer), rows(Text(other, "p"), tokenizer, denoise)):
            assert row["targets"].tolist() == target
        assert rows(Pair(text, other, "p"), tokenizer)["source"].tolist() == source(text).input_ids
        assert tokenizers.prompt_ids(tokenizer, text, is_source=True) == source(text).input_ids
        assert candidate_ids(tokenizer, text, other, True) == (source(text).input_ids, target)

        prompt = causal(text).input_ids
        while prompt[-1] == tokenizer.eos_id:  # a prompt never ends with the end of a text, whatever the template says
            prompt.pop()
        assert tokenizers.prompt_ids(tokenizer, text) == prompt
        row = rows(Text(text, "p"), tokenizer)
        assert [row["first"], *row["targets"]] == [*prompt, tokenizer.eos_id]
        joint = tokenizers.prompt_ids(tokenizer, f"{text} {other}")
        ids, candidate = candidate_ids(tokenizer, text, f" {other}", False)
        assert ids == prompt and (joint[: len(prompt)] != prompt or [*prompt, *candidate] == joint)


def test_exports_have_the_mask_and_the_sentinels(tokenizer, tmp_path):
    task = configs.Denoise(length=64, target_length=64)
    marked = tasks.with_sentinels(task, tokenizer)
    if isinstance(marked.plain, MarianTokenizer):
        pytest.skip("it has no mask of its own, and no model of Transformers reads one")
    tokenizers.to_huggingface(marked).save(tmp_path)
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizers.load(tmp_path)
    assert len(theirs) == marked.vocab_size == mine.vocab_size
    assert mine.mask_id == marked.mask_id
    again = tasks.with_sentinels(task, mine)
    assert (again.added, again.sentinels) == ({}, marked.sentinels)
    row = rows(Text("the cat sat on a mat", "p"), tokenizer, task)
    for name in ("source", "targets"):
        assert theirs.decode(row[name], skip_special_tokens=False).count("<extra_id_") == 1
    for i, name in [
        (marked.mask_id, theirs.mask_token),
        *((i, f"<extra_id_{n}>") for n, i in enumerate(marked.sentinels)),
    ]:
        assert theirs.convert_tokens_to_ids(name) == i
        assert i in theirs(name).input_ids


def test_exports_of_instruct_runs_write_the_chats_trained_on(tokenizer, tmp_path):
    exported = tasks.exported_tokenizer(configs.Instruct(length=64), tokenizer)
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, sentences(4, 5), strict=True)
    ]
    ids, weights = tokenizers.chat_ids(tokenizer, messages)
    assert [*tokenizer.framing.start] in ([tokenizer.eos_id], ids[: len(tokenizer.framing.start)])
    if exported is tokenizer:
        assert not isinstance(tokenizer, tokenizers.ByteTokenizer)
        pytest.skip("no template gives the ids of parts that are encoded separately")
    tokenizers.to_huggingface(exported, for_prompts=True).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages).input_ids == ids
    prompt = theirs.apply_chat_template(messages[:3], add_generation_prompt=True).input_ids
    assert prompt == tokenizers.chat_prompt(tokenizer, messages[:3]) == ids[: len(prompt)]
    assert tokenizers.chat_ids(exported, messages) == (ids, weights)


def test_documents_of_pretraining_begin_like_prompts(tokenizer, tmp_path):
    texts = sentences(5, seed=2)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    store = data.prepare(f"text:{tmp_path}/*.txt", tokenizer, "all", tmp_path / "cache")
    stream = [store.meta["bos_id"], *store.read(0, store.n_tokens).tolist()]
    start = tokenizers.prompt_ids(tokenizer, "")
    want = []
    for text in texts:
        want += [] if start == want[-1:] else start  # an end may be the next start
        want += [*tokenizer.encode(text), tokenizer.eos_id]
    assert stream[: len(want)] == want
    assert stream[len(want) :] == ([] if start == [tokenizer.eos_id] else start)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from(["template", "bert", "roberta", "sequence"]),
    st.text("ACGTx我", max_size=6),
)
def test_the_framing_of_any_post_processor(tmp_path_factory, before, after, kind, text):
    names = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", *"ACGT我"]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.add_special_tokens(names[:5])
    template = processors.TemplateProcessing(
        [*(names[i] for i in before), "$A", *(names[i] for i in after)],
        special_tokens=[(names[i], i) for i in {*before, *after}],
    )
    if kind == "bert":
        template, before, after = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)), [3], [4]
    elif kind == "roberta":
        template, before, after = processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1], [2]
    elif kind == "sequence":
        template = processors.Sequence([processors.ByteLevel(), template])
    made.post_processor = template
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    theirs.save_pretrained(path := tmp_path_factory.mktemp("made"))
    mine = tokenizers.load(path)
    assert (mine.framing.before, mine.framing.after) == (tuple(before), tuple(after))
    assert mine.framing.whole(mine.encode(text)) == theirs(text).input_ids == mine.encode_with_template(text)
    assert tokenizers.prompt_ids(mine, text) == ([*before, *mine.encode(text)] or [1])


LOGITS = [
    ("llama", "classify", "AutoModelForSequenceClassification"),
    ("bert", "classify", "AutoModelForSequenceClassification"),
    ("bert", "tag", "AutoModelForTokenClassification"),
    ("bert", "mlm", "AutoModelForMaskedLM"),
    ("llama", "lm", "AutoModelForCausalLM"),
]


@pytest.mark.parametrize(("family", "head", "theirs"), LOGITS)
def test_predictions_from_text_agree(family, head, theirs, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tokenizer = KINDS["model bpe" if head == "classify" else "bpe"](tmp_path / "tokenizer")
    config = model_config(tokenizer, family, head)
    params, auto = export(tmp_path / "exported", config, tokenizer)
    model = getattr(transformers, theirs).from_pretrained(tmp_path / "exported").eval()
    text = sentences(1, seed=3)[0]
    if head == "lm":
        ids = tokenizers.prompt_ids(tokenizer, text)
        own = apply(nanoflax.build(config), params, jnp.asarray([ids]))[0]
    else:
        ids = rows(Classification(text, ("a",), "p"), tokenizer)["tokens"][None]
        own = apply(nanoflax.build(config), params, ids, np.ones_like(ids, bool))
    with torch.no_grad():
        found = model(**auto(text, return_tensors="pt", return_token_type_ids=False)).logits.numpy()
    np.testing.assert_allclose(own, found, atol=1e-4 * np.abs(found).max())


def test_translations_from_text_agree(tmp_path):
    tokenizer = KINDS["bpe"](tmp_path)
    config = model_config(tokenizer, "t5", "lm")
    params, auto = export(tmp_path / "exported", config, tokenizer)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported").eval()
    for text in sentences(3, seed=4):
        own = tokenizers.prompt_ids(tokenizer, text, is_source=True)
        (own,) = nanoflax.sample(nanoflax.build(config), params, [own], max_new_tokens=12, temperature=0,
                                 eos_id=tokenizer.eos_id)  # fmt: skip
        found = model.generate(**auto(text, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()[1:]
        assert own == (found[: found.index(tokenizer.eos_id)] if tokenizer.eos_id in found else found)


def test_a_published_classifier_reads_texts_as_they_are(tmp_path):
    """Unlike a run of ours, it has no settings of cleaning."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = KINDS["json bos"](tmp_path / "tokenizer")
    _, auto = export(tmp_path / "exported", model_config(tokenizer, "llama", "classify"), tokenizer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    texts = ["the cat ", "  the  cat", "a\n\nb", "cafe\u0301", "the cat", "longer than the context " * 30]
    with torch.no_grad():
        found = [
            model(**auto(text, return_tensors="pt", truncation=True)).logits[0].softmax(-1).tolist() for text in texts
        ]
    run = nanoflax.open(tmp_path / "exported")
    for text, mine, theirs in zip(texts, run.predict(texts), found, strict=True):
        assert [mine[name] for name in run.labels] == pytest.approx(theirs, abs=1e-5), text


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_token_types_are_given_only_to_models_that_have_them(family, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tokenizer = KINDS["vocab.txt"](tmp_path / "tokenizer")
    _, auto = export(tmp_path / "exported", model_config(tokenizer, family, "classify"), tokenizer)
    assert set(auto("the cat")) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if family == "bert" else set())


def test_an_export_that_autotokenizer_reads_as_qwen2_says_so(tmp_path, caplog):
    tokenizer = KINDS["bpe"](tmp_path)
    config = dataclasses.replace(model_config(tokenizer, "llama", "lm"), qkv_bias=True)  # then the family is qwen2
    export(tmp_path / "exported", config, tokenizer)
    assert "AutoTokenizer divides texts as Qwen2 does" in caplog.text
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    for text in sentences(5):
        assert theirs(text).input_ids == tokenizers.prompt_ids(tokenizer, text)
