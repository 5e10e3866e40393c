"""Streamed text is the decoded text: new ids after a prompt, in parts of any size, for every kind of tokenizer.

The oracles are the decoders of Transformers, `tokenizers` and sentencepiece, on the whole list of ids.
"""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers as library
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoflax import tokenizers
from nanoflax.tokenizers import ByteTokenizer, StreamingDecoder

WORDS = "the cat sat on a mat while New York 東京 naïve 12 345 . , don't 😀 , x\n\n  y".split(" ")
LETTERS = [chr(i) for i in (0x41, 0xE9, 0x3B1, 0x4E00, 0x6771, 0xAC00, 0xFFFD, 0x1F600)]


def corpus():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]


def sentencepiece_model(**options):
    out = io.BytesIO()
    options = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 4} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=out, **options)
    return out.getvalue()


LLAMA = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
             remove_extra_whitespaces=False, bos_id=1, eos_id=2, unk_id=0)  # fmt: skip


def write(path, name, **files):
    directory = path / name
    directory.mkdir()
    for file, content in files.items():
        file = file.replace("__", ".")
        content = json.dumps(content) if isinstance(content, dict) else content
        (directory / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def json_tokenizer(kind):
    if kind == "wordpiece":
        tokenizer = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer
        specials, options = ["[UNK]", "[SEP]"], {}
    elif kind == "suffixes":  # the first GPT: a word ends with </w>
        tokenizer = library.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
        trainer, specials = trainers.BpeTrainer, ["<unk>", "</s>"]
        options = {"end_of_word_suffix": "</w>"}
    else:
        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, trainer, specials = decoders.ByteLevel(), trainers.BpeTrainer, ["<unk>", "</s>"]
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    if kind == "wordpiece":
        options = {}
    tokenizer.train_from_iterator(
        corpus(), trainer(vocab_size=500, special_tokens=specials, show_progress=False, **options)
    )
    return tokenizer.to_str(), specials[1]


def marian_directory(path):
    raw = sentencepiece_model(model_type="unigram", vocab_size=200)
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    pieces = [model.id_to_piece(i) for i in range(3, model.get_piece_size())]
    vocabulary = {p: i for i, p in enumerate(["</s>", "<unk>", *pieces, ">>fr<<", ">>pt_BR<<", "<pad>"])}
    config = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "ROMANCE"}
    files = dict(source__spm=raw, target__spm=raw, vocab__json=vocabulary, tokenizer_config__json=config)
    return write(path, "marian", **files)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{name: (our tokenizer, decode of an oracle for ids that are complete characters)}"""
    path = tmp_path_factory.mktemp("kinds")
    llama, t5 = sentencepiece_model(**LLAMA), sentencepiece_model(
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True)  # fmt: skip
    stripping = sentencepiece_model(model_type="bpe", byte_fallback=True)
    found = {"bytes": (ByteTokenizer(), lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"))}
    for name, model in (("trained", None), ("file", llama), ("stripping file", stripping)):
        ours = tokenizers.SentencePieceTokenizer(model) if model else tokenizers.train_sentencepiece(corpus(), 350)
        processor = sentencepiece.SentencePieceProcessor(model_proto=ours.model)
        found[name] = ours, lambda ids, sp=processor: sp.decode([i for i in ids if i != sp.unk_id()])
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    directories = {"llama": write(path, "llama", tokenizer__model=llama, tokenizer_config__json=config)}
    for kind in ("wordpiece", "suffixes", "byte level", "cleaned wordpiece"):
        spec, eos = json_tokenizer(kind.removeprefix("cleaned "))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
        config["clean_up_tokenization_spaces"] = kind.startswith("cleaned")
        directories[kind] = write(path, kind, tokenizer__json=spec, tokenizer_config__json=config)
    directories["marian"] = marian_directory(path)
    for name, directory in directories.items():
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        found[name] = tokenizers.load(directory), lambda ids, hf=theirs: hf.decode(ids, skip_special_tokens=True)
    directory = write(
        path, "t5", spiece__model=t5, tokenizer_config__json={"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=t5)
    found["t5 with bytes"] = tokenizers.load(directory), processor.decode
    return found


NAMES = ["bytes", "trained", "file", "stripping file", "llama", "wordpiece", "cleaned wordpiece", "suffixes",
         "byte level", "t5 with bytes", "marian"]  # fmt: skip


def parts_of(rng, ids):
    while ids:
        size = rng.choice([1, 1, 1, 2, 5, 0])
        yield ids[:size]
        ids = ids[size:]


def streamed(tokenizer, prompt, parts, stops=()):
    decoder = StreamingDecoder(tokenizer, prompt, stops)
    pieces = [decoder.add(part) for part in parts]
    return [*pieces, decoder.finish()]


@pytest.mark.parametrize("name", NAMES)
def test_random_ids_are_streamed_as_they_are_decoded(kinds, name):
    ours, theirs = kinds[name]
    rng = random.Random(1)
    compared = 0
    for case in range(250):
        if case % 2:  # any ids
            ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(40))]
        else:  # texts of rare characters
            text = "".join(rng.choice([*WORDS, *LETTERS, " ", " ", "\n"]) for _ in range(rng.randrange(30)))
            ids = ours.encode(text)
        cut = rng.randrange(len(ids) + 1) if rng.random() < 0.7 else 0
        prompt, new = ids[:cut], ids[cut:]
        pieces = streamed(ours, prompt, parts_of(rng, new))
        before, whole = ours.decode(prompt), ours.decode(ids)
        if whole.startswith(before):
            assert "".join(pieces) == whole[len(before) :], (prompt, new)
        if "\ufffd" not in whole:
            assert "\ufffd" not in "".join(pieces)
        if "\ufffd" not in theirs(ids):
            compared += 1
            assert whole == theirs(ids), ids
            if theirs(ids).startswith(theirs(prompt)):
                assert "".join(pieces) == theirs(ids)[len(theirs(prompt)) :]
    assert compared > 60


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string_matches_wherever_it_begins(kinds, name):
    ours, _ = kinds[name]
    rng = random.Random(2)
    for _ in range(100):
        ids = ours.encode(" ".join(rng.choices(WORDS, k=12)))
        prompt, new = ids[:2], ids[2:]
        whole = "".join(streamed(ours, prompt, [new]))
        at, size = rng.randrange(len(whole)), rng.choice([1, 2, 6])
        stops = [whole[at : at + size], "never there", whole[at : at + 1] + "\0"]
        pieces = streamed(ours, prompt, parts_of(rng, new), stops)
        assert "".join(pieces) == whole[: whole.find(stops[0])]
        shown = ""
        for piece in pieces:
            shown += piece
            assert whole.startswith(shown)


def test_an_incomplete_character_of_the_prompt_is_completed(kinds):
    for name in ("bytes", "trained", "llama", "byte level", "t5 with bytes"):
        ours, _ = kinds[name]
        ids = ours.encode("the 丢x")  # a character that is not in the vocabulary: three bytes
        prompt = next(ids[:n] for n in range(len(ids)) if ours.decode(ids[:n]).endswith("\ufffd"))
        assert "".join(streamed(ours, prompt, [[i] for i in ids[len(prompt) :]])) == "丢x", name
        # The character U+FFFD itself, at the end of a prompt, is not shown again.
        assert "".join(streamed(ours, ours.encode("the \ufffd"), [[i] for i in ours.encode("the \ufffdx")[-1:]])) in (
            "x",
            " x",
        )


def test_at_a_cut_the_complete_characters_stand(kinds):
    for name in ("trained", "file", "llama", "t5 with bytes"):
        ours, _ = kinds[name]
        ids = ours.encode("the 丢뷁丣")
        for cut in range(1, 3):
            text = "".join(streamed(ours, ids[:1], [ids[1:-cut]]))
            assert text.rstrip("\ufffd").endswith("丢뷁") and text.endswith("\ufffd"), (name, text)


@pytest.mark.parametrize("name", NAMES)
def test_the_work_for_an_id_does_not_grow(kinds, name):
    ours, _ = kinds[name]
    rng = random.Random(3)
    some = ours.encode("the cat 丢 sat")
    special = ours.eos_id
    for ids in ([rng.randrange(ours.vocab_size) for _ in range(2000)], some[-1:] * 2000, [special] * 2000,
                [ours.encode("丢")[-1]] * 2000, ours.encode("a\n")[-1:] * 2000):  # fmt: skip
        sizes = []

        class Counting:
            cleans_up = getattr(ours, "cleans_up", False)

            def decode(self, ids, sizes=sizes):
                sizes.append(len(ids))
                return ours.decode(ids)

        pieces = streamed(Counting(), some * 100, [[i] for i in ids])
        assert max(sizes[10:]) <= 200
        whole, before = ours.decode(some * 100 + ids), ours.decode(some * 100)
        assert "".join(pieces) == whole[len(before) :]


def test_parts_are_decoded_after_the_parts_before(kinds):
    ours, _ = kinds["llama"]
    ids = ours.encode("the cat sat")
    assert list(tokenizers.decode_parts(ours, [ids[:1], ids[1:2], ids[2:]])) == ["the", " cat", " sat"]
