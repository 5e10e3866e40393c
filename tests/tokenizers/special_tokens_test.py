"""Special and added tokens: what a person writes in a source is read, and files are read as Transformers reads them."""

import json
import random

import jax
import numpy as np
import pytest
import sentencepiece
import transformers

import nanoflax
from nanoflax import hf, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.tasks import Pair, encode
from nanoflax.tokenizers import specs, vocabularies
from tests.tokenizers.streaming_test import LLAMA, json_tokenizer, marian_directory, sentencepiece_model, write

pytestmark = pytest.mark.filterwarnings("ignore:Recommended")
TEXTS = ["the cat", " the  cat <x> sat", "a <x>  b", "a<x>b <y z> c", "<X>the", "cat <y z>sat", "<mask> the",
         "the </s> cat", "x <x><x> y", "cat\n<x>\nsat", "é <x> ü", "", "the cat </s><x>"]  # fmt: skip


def unigram_pieces():
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(model_type="unigram", vocab_size=300))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]


def saved_by_transformers(path, name):
    pieces = unigram_pieces()
    if name == "t5":
        theirs = transformers.T5Tokenizer(vocab=pieces)
    elif name == "pegasus":
        theirs = transformers.PegasusTokenizer(vocab=[pieces[0], pieces[1], *pieces[2:]])
    else:
        theirs = transformers.MBart50Tokenizer(
            vocab=[("<s>", 0.0), pieces[0], pieces[1], pieces[2], *pieces[3:]], src_lang="en_XX", tgt_lang="fr_XX"
        )
    theirs.save_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "name, tokens",
    [("t5", ["<extra_id_0>", "<extra_id_7>"]), ("mbart", ["fr_XX", "de_DE", "<mask>"]), ("pegasus", ["<mask_1>"])],
)
def test_a_source_is_read_as_in_transformers(name, tokens, tmp_path):
    theirs, ours, rng = saved_by_transformers(tmp_path, name), tokenizers.load(tmp_path), random.Random(0)
    for _ in range(40):
        text = " ".join(rng.choices(["the", "cat", "sat,", *tokens], k=rng.randrange(1, 8)))
        ids = theirs(text)["input_ids"]
        assert tokenizers.prompt_ids(ours, text, is_source=True) == ids, text
        row = encode([Pair(text, text, "here")], ours, 64).rows[0]
        assert row["source"].tolist() == ids
        assert any(token in text for token in tokens) == any(ours.special[t] in row["targets"] for t in tokens)
        assert not {ours.special[t] for t in tokens} & set(ours.encode(text))
    own = {ours.eos_id, ours.pad_id, ours.unk_id}
    assert not own & set(ours.encode_source("the </s> cat <pad> <unk>")) - {ours.unk_id}


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return marian_directory(tmp_path_factory.mktemp("marian"))


def test_marian_reads_the_code_of_a_language_at_the_beginning(marian):
    ours, theirs = tokenizers.load(marian), transformers.MarianTokenizer.from_pretrained(marian)
    for text in (">>fr<< the cat sat", ">>pt_BR<<the", ">>fr<<", "the >>fr<< cat", "the cat", ">> the << cat"):
        found = tokenizers.prompt_ids(ours, text, is_source=True)
        if text != ">> the << cat":  # Transformers takes this for an unknown language
            assert found == theirs(text)["input_ids"], text
        assert found == encode([Pair(text, None, "here")], ours, 64).rows[0]["source"].tolist()
    with pytest.raises(UserError, match="no language code >>xx<<; it has >>fr<<, >>pt_BR<<"):
        ours.encode_source(">>xx<< the cat")


def token(content, **flags):
    return dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False) | flags | {
        "content": content}  # fmt: skip


SETTINGS = [
    {"added_tokens_decoder": [token("<x>", **{flag: True}), token("<y z>", special=True, **{flag: True})]}
    for flag in ("lstrip", "rstrip", "single_word", "normalized")
] + [
    {"extra_special_tokens": ["<x>", "<y z>"]},
    {"extra_special_tokens": {"image_token": "<x>"}},
    {"additional_special_tokens": ["<x>", "<x>"], "added_tokens_decoder": [token("<x>", special=True)]},
    {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
]


@pytest.mark.parametrize("kind", ["byte level", "wordpiece"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_added_tokens_are_read_as_in_transformers(kind, settings, tmp_path):
    spec, eos = json_tokenizer(kind)
    size = 1 + max(json.loads(spec)["model"]["vocab"].values())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos} | settings
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(size + i): t for i, t in enumerate(config["added_tokens_decoder"])}
    directory = write(tmp_path, "tokenizer", tokenizer__json=spec, tokenizer_config__json=config)
    ours, theirs = tokenizers.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_with_template(text, special=True) == ids, text
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.pad_id == ours.eos_id == theirs.pad_token_id


@pytest.mark.parametrize("cls", ["GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}, {"add_bos_token": True}], ids=str)
def test_merges_with_any_line_ends(cls, settings, tmp_path):
    model = json.loads(json_tokenizer("byte level")[0])["model"]
    vocabulary = dict(model["vocab"])
    vocabulary |= {t: len(vocabulary) + i for i, t in enumerate(["<s>", "<pad>", "<mask>"])}
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""])
    found = []
    for name, text in {"plain": merges, "windows": merges.replace("\n", "\r\n"), "mark": "\ufeff" + merges}.items():
        config = {"tokenizer_class": cls} | settings
        directory = write(tmp_path, name, vocab__json=vocabulary, merges__txt=text, tokenizer_config__json=config)
        found.append([tokenizers.load(directory).encode_with_template(text) for text in TEXTS])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert found[0] == found[1] == found[2]
    assert found[0] == [theirs(text, split_special_tokens=True)["input_ids"] for text in TEXTS]


def test_a_vocabulary_of_words_with_any_line_ends(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", ","]
    for name, text in {
        "plain": "\n".join(words),
        "windows": "\r\n".join([*words, ""]),
        "mark": "\ufeff" + "\n".join(words),
    }.items():
        config = {"tokenizer_class": "BertTokenizer"}
        ours = tokenizers.load(write(tmp_path, name, vocab__txt=text, tokenizer_config__json=config))
        assert ours.encode_with_template("the cats,") == [2, 5, 6, 7, 8, 3] and ours.pad_id == 0, name


@pytest.mark.parametrize(
    "settings",
    [{"legacy": False}, {"legacy": False, "add_prefix_space": False}, {"add_prefix_space": False},
     {"legacy": False, "add_eos_token": True}],
    ids=str,
)  # fmt: skip
def test_llama_prefixes(settings, tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True} | settings
    directory = write(tmp_path, "llama", tokenizer__model=sentencepiece_model(**LLAMA), tokenizer_config__json=config)
    ours, theirs = tokenizers.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_with_template(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    prompt = "[INST] the </s> cat"
    assert ours.encode(prompt) == theirs.encode(prompt, add_special_tokens=False, split_special_tokens=True)


def gguf(**more):
    letters = [*vocabularies.bytes_to_letters().values()]
    tokens = [*letters, "he", "Ġhello", "<|begin|>", "<|end|>", "<|eot|>", "<|eom|>", "<|fim_pad|>"]
    return {f"tokenizer.ggml.{key}": value for key, value in {
        "model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": [1] * 258 + [3] * 5, "merges": ["h e"],
        "bos_token_id": 258, "eos_token_id": 259, **more}.items() if value is not None}  # fmt: skip


def test_gguf_names_the_ends_of_a_reply_and_keeps_them(tmp_path):
    ours = tokenizers.from_gguf(gguf(eot_token_id=260, eom_token_id=261, fim_pad_token_id=262))
    assert tokenizers.stop_ids(ours) == ours.stop_ids == (259, 260, 261, 262)
    ours.save(tmp_path)
    assert tokenizers.load(tmp_path).stop_ids == ours.stop_ids
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [259, 260, 261, 262]
    with pytest.raises(UserError, match="eot_token_id is 999, with 263 tokens"):
        tokenizers.from_gguf(gguf(eot_token_id=999))


def test_gguf_flags_of_the_beginning_and_the_end():
    framed = {
        (258,): gguf(),  # llama.cpp's default for this pre
        (): gguf(add_bos_token=False),
        (258, 259): gguf(add_eos_token=True),
        (259,): gguf(pre="gpt-2", add_eos_token=True),
    }
    for around, metadata in framed.items():
        assert [i for i in tokenizers.from_gguf(metadata).encode_with_template("x") if i > 256] == [*around]
    assert tokenizers.from_gguf(gguf(bos_token_id=None)).encode_with_template("x") == tokenizers.from_gguf(
        gguf()
    ).encode("x")
    with pytest.raises(UserError, match="add_bos_token is true, but there is no bos_token_id"):
        tokenizers.from_gguf(gguf(bos_token_id=None, add_bos_token=True))


def test_gguf_words_that_no_merges_make():
    for pre, ids in (("llama-bpe", [257]), ("tekken", [257]), ("qwen2", None)):
        found = tokenizers.from_gguf(gguf(pre=pre)).encode(" hello")
        assert found == ids if ids else 256 in found and 257 not in found


@pytest.mark.parametrize("pre", [pre for pre in vocabularies.GGUF_PATTERNS if pre])
def test_gguf_patterns_keep_every_text(pre):
    ours = tokenizers.from_gguf(gguf(pre=pre))
    for text in ("Hello World's 12345 東京, x\n\n  y", "don't STOP 3.14 ((ا))", " \t\r\n a"):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; supported:"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; gpt2 and llama are supported"),
        ({"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces=True is not supported"),
        ({"precompiled_charsmap": "abc"}, "tokenizer.ggml.precompiled_charsmap=abc is not supported"),
    ],
)
def test_gguf_settings_that_are_not_read_are_refused_by_name(change, said):
    with pytest.raises(UserError, match=said.replace("(", "\\(")):
        tokenizers.from_gguf(gguf(**change))


@pytest.mark.parametrize("name", ["model file", "pad is eos", "eos is added", "pad is eos and is added"])
def test_an_end_of_text_is_not_padding_for_an_exported_classifier(name, tmp_path):
    spec, eos = json_tokenizer("byte level")
    model, settings = sentencepiece_model(**LLAMA), {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    llama = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama |= {"add_eos_token": True}
    if name == "model file":
        tokenizer = tokenizers.SentencePieceTokenizer(model)
    elif name == "pad is eos":
        files = dict(tokenizer__json=spec, tokenizer_config__json=settings | {"pad_token": eos})
        tokenizer = tokenizers.load(write(tmp_path, "t", **files))
    else:
        settings = llama | ({"pad_token": "</s>"} if name.startswith("pad") else {})
        tokenizer = tokenizers.load(write(tmp_path, "t", tokenizer__model=model, tokenizer_config__json=settings))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, layers=1, dim=32, heads=2, context=64, norm="rmsnorm",
                         activation="silu", gated=True, positions="rotary", bias=False, tied=False, head="classify",
                         labels=3, class_names=("a", "b", "c"))  # fmt: skip
    ours = nanoflax.build(config)
    params = nanoflax.init(ours, jax.random.PRNGKey(0))
    hf.save(tmp_path / "out", config, params, tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reader, texts = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), ["the cat", "the cat sat on a mat"]
    rows = [tokenizer.framing.whole(tokenizer.encode(text)) for text in texts]
    ids = np.array([row + [tokenizer.pad_id] * (max(map(len, rows)) - len(row)) for row in rows])
    mask = np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows])
    expected = jax.jit(ours.apply)({"params": params}, ids, mask)
    for text, logits in zip(texts, expected, strict=True):
        np.testing.assert_allclose(theirs(**reader(text, return_tensors="pt")).logits[0].detach(), logits, atol=1e-5)
    if name in ("model file", "pad is eos"):
        found = theirs(**reader(texts, return_tensors="pt", padding=True)).logits.detach()
        np.testing.assert_allclose(found, expected, atol=1e-5)


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
PUBLISHED = {  # directories of the first years name no special tokens: the class of model_type knows them
    "gpt2": ("gpt2", ["<|endoftext|>"], {"model_max_length": 1024}),
    "gpt2 with a pad": ("gpt2", ["<|endoftext|>"], {"pad_token": "<|endoftext|>"}),
    "no settings": ("gpt2", ["<|endoftext|>"], None),
    "bert": ("bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"do_lower_case": True}),
    "distilbert": ("distilbert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"model_max_length": 512}),
    "electra": ("electra", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], {"do_lower_case": True}),
    "roberta": ("roberta", ROBERTA, {"model_max_length": 512}),
    "xlm-roberta": ("xlm-roberta", ROBERTA, {"model_max_length": 512}),
    "bart": ("bart", ROBERTA, {"tokenizer_class": "BartTokenizer"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_that_name_no_special_tokens_are_read_as_in_transformers(name, tmp_path):
    model_type, special, config = PUBLISHED[name]
    spec = json.loads(json_tokenizer("wordpiece" if special[0] == "[PAD]" else "byte level")[0])
    vocabulary = [*special, *(token for token in spec["model"]["vocab"] if token not in special)]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(vocabulary)}
    if model_type == "xlm-roberta":
        spec["model"] = {"type": "Unigram", "unk_id": 3, "vocab": [[token, -1.0] for token in vocabulary]}
    spec["added_tokens"] = [specs.added_token(token, i) for i, token in enumerate(special)]
    files = {} if config is None else {"tokenizer_config__json": config}
    write(tmp_path, "t", tokenizer__json=spec, config__json={"model_type": model_type}, **files)
    ours, theirs = tokenizers.load(tmp_path / "t"), transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"):
        if (expected := getattr(theirs, f"{role}_token_id")) is not None:
            assert getattr(ours, f"{role}_id") == expected, role
    assert ours.eos_id == (theirs.sep_token_id if theirs.eos_token_id is None else theirs.eos_token_id)
    config = (config or {}) | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": special[0]}
    write(tmp_path, "u", tokenizer__json=spec, tokenizer_config__json=config)
    ours.save(tmp_path / "saved")  # in a run, without config.json
    assert tokenizers.load(tmp_path / "saved").fingerprint == ours.fingerprint
    with pytest.raises(UserError, match="has no end-of-sequence token"):  # this class has no names of its own
        tokenizers.load(tmp_path / "u")


def with_class(path, name):
    """A tokenizer whose class in Transformers 5 encodes otherwise than its files; and a model_type."""
    if name.endswith("Model"):  # without a tokenizer.json
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        files = {"tokenizer__model": sentencepiece_model(**LLAMA), "tokenizer_config__json": config}
        return tokenizers.load(write(path, "t", **files)), "llama"
    spec, eos = json_tokenizer("wordpiece" if name.startswith("Bert") else "byte level")
    spec, config = json.loads(spec), {"tokenizer_class": name, "eos_token": eos}
    if name.startswith("Bert"):
        spec["normalizer"] = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                              "strip_accents": None, "lowercase": False}  # fmt: skip
        config |= {"unk_token": "[UNK]", "sep_token": eos}
    else:
        digits = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    return tokenizers.load(write(path, "t", tokenizer__json=spec, tokenizer_config__json=config)), "gpt2"


@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Tokenizer", "RobertaTokenizer", "BertTokenizer"])
def test_exports_are_read_by_their_files_not_by_the_name_of_a_class(name, tmp_path):
    ours, model_type = with_class(tmp_path, name)
    tokenizers.to_huggingface(ours).save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizers.load(tmp_path / "out")
    for text in [*TEXTS, "The 12345 cats", "the</s>\n cat"]:
        ids = ours.encode_with_template(text, special=True)
        assert theirs(text).input_ids == again.encode_with_template(text, special=True) == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert ("token_type_ids" in theirs("the")) == (name == "BertTokenizer")
    for role in ("bos", "eos", "pad", "unk", "sep", "cls"):
        assert getattr(theirs, f"{role}_token_id") in (None, getattr(ours, f"{role}_id"))
    assert tokenizers.to_huggingface(again) is again
