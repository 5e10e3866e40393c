"""Random segmentations: right probabilities, and files that depend only on the text and the settings."""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import math
import pathlib
import random
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
import sentencepiece

import nanoflax
from nanoflax import config as configs
from nanoflax import data, runs, tokenizers
from nanoflax.data import building, parts, processes, tokenizing
from nanoflax.data.quality import Quality
from nanoflax.errors import UserError
from nanoflax.runs import text_data
from nanoflax.tokenizers import Segmentation, segmentation, trained
from nanoflax.tokenizers.sentencepiece_schema import model_class

TEXTS = [method.__doc__ + " ▁ " for method in vars(str).values() if method.__doc__]


@pytest.fixture(scope="module")
def unigram():
    return tokenizers.train_sentencepiece(TEXTS, 500, "unigram")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        texts = [f"{text}{number}" for text in TEXTS]
        lines = [json.dumps({"text": text}) + "\n" for text in [*texts, ""]]
        (directory / f"{number}.jsonl").write_text("".join(lines))
    return data.Source(f"text:{directory}/*.jsonl", segmentations=3, segmentation_alpha=0.4)


def all_segmentations(text, pieces):
    """Every way to cut a text into pieces: brute force over the places of the cuts."""
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(places)]
        if all(part in pieces for part in parts):
            yield tuple(parts)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_segmentations_have_the_probabilities_of_the_paper(unigram, alpha):
    processor = sentencepiece.SentencePieceProcessor(model_proto=unigram.model)
    normal = (i for i in range(unigram.vocab_size) if not (processor.is_byte(i) or processor.is_control(i)))
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in normal}
    text = " substring"
    weights = {
        found: math.exp(alpha * sum(scores[piece] for piece in found))
        for found in all_segmentations(text.replace(" ", "▁"), scores)
    }
    n, total = 4000, sum(weights.values())
    assert len(weights) > 5, weights
    sampled = (unigram.sampler.sample(text, Segmentation(i, alpha)) for i in range(n))
    seen = collections.Counter(tuple(processor.id_to_piece(ids)) for ids in sampled)
    assert set(seen) <= set(weights)
    for found, weight in weights.items():
        share = weight / total
        assert abs(seen[found] / n - share) < 5 * math.sqrt(share / n) + 2 / n, found


def test_segmentations_have_the_probabilities_of_sentencepiece(unigram):
    changed = model_class().FromString(unigram.model)
    of_user = changed.pieces[0].USER_DEFINED
    changed.pieces.add(piece="tri", score=-20.0, type=of_user)
    changed.pieces.add(piece="₿", score=-30.0, type=of_user)  # no lowest score for the characters that are unknown
    for piece in changed.pieces:
        piece.type = piece.UNUSED if piece.piece in ("tr", "s") else piece.type
    for model, text in ((unigram.model, "The  string's\n\nend 🐭 "), (changed.SerializeToString(), " string₿s é")):
        check_probabilities_of_sentencepiece(trained.SentencePieceTokenizer(model), text)


def check_probabilities_of_sentencepiece(tokenizer, text, n=3000):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.3}
    ours = collections.Counter(tuple(tokenizer.sampler.sample(text, Segmentation(i, 0.3))) for i in range(n))
    theirs = collections.Counter(tuple(processor.encode(text, **options)) for _ in range(n))
    assert len(ours) > 5
    for ids in {*ours, *theirs}:
        assert abs(ours[ids] - theirs[ids]) < 6 * math.sqrt(ours[ids] + theirs[ids]), ids


def test_long_words_need_little_memory_and_have_the_same_segmentations(unigram, monkeypatch):
    texts = [*TEXTS, "strings" * 20]
    found = [unigram.sampler.sample(text, Segmentation(1, 0.3)) for text in texts]
    monkeypatch.setattr(segmentation, "CACHED", 0)
    assert [unigram.sampler.sample(text, Segmentation(1, 0.3)) for text in texts] == found
    dna = "".join(random.Random(0).choices("acgt", k=20_000))
    without_spaces = tokenizers.train_sentencepiece([dna], 300, "unigram")
    assert without_spaces.decode(without_spaces.sampler.sample("acgt a", Segmentation(1, 0.3))) == "acgt a"
    for tokenizer, text in ((without_spaces, dna), (unigram, " a" * 20_000)):
        tracemalloc.start()
        tokenizer.sampler.sample(text, Segmentation(1, 0.3))
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert memory < 30 * len(text)


def test_every_segmentation_is_of_the_text(unigram):
    texts = ["the house ▁▁ and\n\n a  mouse é 🐭 ", "▁", "", "\0 x" * 9 + "y" * 9000 + "\udc80", *TEXTS]
    first, second = ([unigram.sampler.sample(text, Segmentation(n, 0.3)) for text in texts] for n in (1, 2))
    assert [unigram.decode(ids) for ids in first] == [tokenizers.well_formed(text) for text in texts]
    assert sum(one != other for one, other in zip(first, second, strict=True)) > 0.7 * len(texts)
    code = f"from tests.data.segmentation_test import *; print(sampled({unigram.model!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == sampled(unigram.model) + "\n", "another process, with other hashes, draws the same"


def sampled(model):
    sampler = trained.SentencePieceTokenizer(model).sampler
    return hashlib.sha256(repr([sampler.sample(text, Segmentation(7, 0.2)) for text in TEXTS]).encode()).hexdigest()


def documents_of(store):
    """The ids of each document, without its end."""
    begins = [*store.begin(np.arange(store.n_documents)), store.n_tokens]
    return [store.read(begin, end)[:-1].tolist() for begin, end in itertools.pairwise(begins)]


def test_a_store_has_each_document_in_each_segmentation(unigram, source, tmp_path):
    once = dataclasses.replace(source, segmentations=0, segmentation_alpha=0.3)
    prepare = lambda source, split: data.prepare(source, unigram, split, tmp_path, 1, progress=False)
    plain, sampled = prepare(once, "train"), prepare(source, "train")
    texts, found = [unigram.decode(ids) for ids in documents_of(plain)], documents_of(sampled)
    assert [unigram.decode(ids) for ids in found] == texts * 4
    assert found[: len(texts)] == documents_of(plain) and sampled.n_best_tokens == plain.n_tokens
    several = [len({tuple(ids) for ids in found[i :: len(texts)]}) > 2 for i in range(len(texts))]
    assert sum(several) > 0.7 * len(texts), "all but the shortest have several segmentations"
    assert sampled.n_bytes == 4 * plain.n_bytes
    lines = ["each document in its best pieces and 3 times in random ones", *plain.report]
    assert sampled.report == lines and plain.report, "a damaged text is counted once"
    assert prepare(once, "validation").directory == prepare(source, "validation").directory, "in its best pieces"


def test_duplicates_are_left_out_of_each_segmentation(unigram, tmp_path):
    for number in range(3):  # in each part other documents are duplicates
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[number * 2 : 20 + number * 5]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    source = data.Source(f"text:{tmp_path}/*.jsonl", quality=Quality(dedup="exact"), segmentations=3)
    planned = parts.plan(source, part_bytes=2000)
    assert len(planned.parts) > 3 and len({len(of_part) for of_part in planned.left_out}) > 2
    read = lambda plan, n: [list(parts.read(plan, i, data.DataReport())) for i in range(n)]
    once = read(planned, len(planned.parts))
    assert read(planned.segmented(), 4 * len(planned.parts)) == once * 4
    texts = list(itertools.chain.from_iterable(once))
    assert len(texts) == len(set(texts)) > 0


def files_of(directory, source, tokenizer, engine):
    """{name: content} of the store that an engine builds, in many parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "plan", lambda source, split: parts.plan(source, split, part_bytes=4000))
        building.build_store(directory, source, tokenizer, "train", engine)
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def test_workers_engines_and_kills_do_not_change_the_files(unigram, source, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "POOL_BYTES", 0)
    alone = lambda *given: processes.tokenize_parts(*given, workers=1)
    expected = files_of(tmp_path / "one", source, unigram, alone)
    assert sum(name.endswith(".bin") for name in expected) > 6
    assert files_of(tmp_path / "three", source, unigram, lambda *g: processes.tokenize_parts(*g, workers=3)) == expected
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    assert files_of(tmp_path / "beam", source, unigram, data.beam_engine("DirectRunner")) == expected


def test_a_small_text_starts_no_processes(unigram, source, tmp_path, monkeypatch):
    monkeypatch.setattr(processes._Pool, "_submit", lambda *given: pytest.fail("a process was started"))
    many = dataclasses.replace(source, segmentations=8)
    assert data.prepare(many, unigram, "train", tmp_path, 2, progress=False).n_documents % 9 == 0
    enough = lambda: data.prepare(source, unigram, "train", tmp_path, 2, progress=False)
    monkeypatch.setattr(processes, "POOL_BYTES", 0)
    monkeypatch.setattr(processes, "POOL_FROM", 3)
    with pytest.raises(pytest.fail.Exception, match="a process was started"):
        enough()


def test_a_store_that_was_begun_is_completed_with_the_same_segmentations(unigram, source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "SHARD_TOKENS", 300)
    monkeypatch.setattr(tokenizing, "CHUNK", 500)
    alone = lambda *given: processes.tokenize_parts(*given, workers=1)
    expected = files_of(tmp_path / "one", source, unigram, alone)
    calls = itertools.count()

    def stop(progress):
        if next(calls) % 11 == 10:
            raise KeyboardInterrupt

    def interrupted(directory, plan, tokenizer):
        for number in tokenizing.missing_parts(directory, plan, tokenizer):
            tokenizing.tokenize_part(directory, plan, number, tokenizer, on_progress=stop)

    stops = 0
    while True:
        try:
            found = files_of(tmp_path / "two", source, unigram, interrupted)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2 and found == expected


def test_a_run_tells_its_segmentations(source, tmp_path, capsys):
    text = configs.TextData(train=source.name, tokenizer="unigram:500", segmentations=2, cache=str(tmp_path / "cache"))
    config = configs.Config(
        model=configs.ModelConfig(layers=1, dim=16, heads=1, context=32),
        data=text,
        train=configs.TrainConfig(steps=10, batch_size=4, evaluate_every=10, sample_tokens=0, tensorboard=False),
    )
    run = nanoflax.pretrain(config, str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "\n  each document in its best pieces and 2 times in random ones\n" in printed
    assert "\nsteps 0 to 7 read random segmentations, steps 8 to 9 the best ones\n" in printed
    batches = runs.inspect_data(config).batches
    plain = runs.inspect_data(dataclasses.replace(config, data=dataclasses.replace(text, segmentations=0)))
    assert plain.tokenizer.fingerprint == run.tokenizer.fingerprint, "trained on each document once"
    best = plain.batches.windows.store.n_tokens // 32
    assert all(min(batches.indices(step)) >= best for step in range(8))
    for step in (8, 9):
        assert max(batches.indices(step)) < best
        rows, whole = batches.windows.batch(batches.indices(step)), plain.batches.windows.batch(batches.indices(step))
        assert all((batches[step][name] == rows[name]).all() and (rows[name] == whole[name]).all() for name in rows)
    text = f"text:{tmp_path}/of.txt"
    (tmp_path / "of.txt").write_text("\n\n".join(TEXTS))
    assert run.evaluate(text, split="train")["documents"] == 1
    directory = str(tmp_path / "tokens")
    runs.tokenize(config, directory)
    of_tokens = dataclasses.replace(config, data=configs.TextData(train=f"tokens:{directory}"))
    assert all(
        (runs.inspect_data(of_tokens).batches[step]["targets"] == batches[step]["targets"]).all() for step in (0, 9)
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_read_each_range_in_its_steps(shuffle):
    windows = [f"window {i}" for i in range(50)]
    batches = data.Batches(windows, 4, 3, shuffle, ranges={0: range(20, 50), 10: range(20)})
    read = [i for step in range(10) for i in batches.indices(step)]
    assert sorted(read[:30]) == [*range(20, 50)] and {*read[30:]} < {*range(20, 50)}
    read = [i for step in range(10, 20) for i in batches.indices(step)]
    assert sorted(read[:20]) == sorted(read[20:]) == [*range(20)] and (read[:20] != read[20:]) == shuffle
    assert [epoch for epoch, _ in batches.places(14)] == [0] * 4 and batches.places(15)[0][0] == 1
    halves = [data.Batches(windows, 4, 3, shuffle, rows, batches.ranges).indices(12) for rows in ([0, 1], [2, 3])]
    assert sum(halves, []) == batches.indices(12)


def test_few_tokens_and_shares_of_the_steps(unigram):
    def ranges(best, tokens, until):
        text = configs.TextData(segmentations=2, segmentation_until=until)
        store = types.SimpleNamespace(n_best_tokens=best, n_tokens=tokens, meta={"bos_id": 0})
        config = configs.Config(data=text, train=configs.TrainConfig(steps=10))
        return text_data.window_ranges(config, data.Windows(store, 16))

    assert ranges(100, 300, 0.5) == {0: range(6, 19), 5: range(6)}
    assert ranges(100, 300, 1.0) == {0: range(6, 19), 10: range(6)}
    batches = data.Batches(range(19), 2, ranges=ranges(100, 300, 1.0))
    config = configs.Config(data=configs.TextData(segmentations=2), train=configs.TrainConfig(steps=10))
    assert text_data.reading_lines(batches, config) == ["all steps read random segmentations"]
    assert ranges(100, 300, 0.01) == {0: range(6)}
    assert ranges(15, 45, 0.5) == {0: range(3)} == ranges(0, 45, 0.5), "no window of best pieces alone"


def test_keys_of_earlier_stores_stay(unigram):
    assert not [name for name in data.settings_of(data.Source("pydocs")) if "segmentation" in name]
    keys = {
        building.store_key(data.Source("pydocs", segmentations=n, segmentation_alpha=alpha), unigram, "train")
        for n, alpha in ((1, 0.3), (2, 0.3), (2, 0.2))
    }
    assert len(keys) == 3


def test_what_has_no_segmentations_is_refused_before_anything_is_built(unigram, source, tmp_path, monkeypatch):
    tokenizers.to_huggingface(unigram).save(tmp_path / "hf")
    bpe = tokenizers.train_sentencepiece(TEXTS, 400, "bpe")
    keeps_spaces = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True}
    with_nfkc = of_others(normalization_rule_name="nfkc", byte_fallback=True, vocab_size=400, **keeps_spaces)
    assert with_nfkc.decode(with_nfkc.encode("ﬁ")) == "fi"
    for tokenizer in (trained.ByteTokenizer(), bpe, tokenizers.load(tmp_path / "hf"), of_others(), with_nfkc):
        with pytest.raises(
            UserError, match="data.segmentations=3: the tokenizer has no random segmentations; choose data.tokenizer=un"
        ):
            data.prepare(source, tokenizer, "train", tmp_path / "cache")
    assert not [*(tmp_path / "cache").glob("*/part-*")]
    text = configs.TextData(train=source.name, tokenizer="bpe:400", segmentations=3)
    with pytest.raises(UserError, match="data.segmentations=3: the tokenizer has no random"):
        nanoflax.pretrain(configs.Config(data=text), str(tmp_path / "run"))
    with pytest.raises(UserError, match="data.segmentations=3: the tokenizer has no random"):
        runs.tokenize(configs.Config(data=text), str(tmp_path / "tokens"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "tokens").exists()
    monkeypatch.setattr(tokenizers, "train_sentencepiece", lambda *given: pytest.fail("trained in vain"))
    with pytest.raises(UserError, match="data.segmentations=3: the tokenizer has no random"):
        runs.inspect_data(configs.Config(data=dataclasses.replace(text, cache=str(tmp_path / "other"))))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"data.segmentation_alpha=0.1 is not used; set data.segmentations=8 too"):
        data.Source("pydocs", segmentation_alpha=0.1)
    with pytest.raises(UserError, match=r"data.segmentation_until=0.5 is not used; set data.segmentations=8 too"):
        data.source_of(configs.TextData(segmentation_until=0.5))
    with pytest.raises(UserError, match=r"data.segmentations=2 is for one source; for a source of a mixture set it in"):
        data.sources_of(configs.TextData(train="a=pydocs; b=pydocs", segmentations=2))
    runs.tokenize(configs.Config(data=dataclasses.replace(text, segmentations=0)), str(tmp_path / "tokens"))
    of_tokens = configs.Config(data=dataclasses.replace(text, train=f"tokens:{tmp_path}/tokens"))
    with pytest.raises(UserError, match="data.segmentations is for text, but tokens:.* set it in experiments.tokenize"):
        nanoflax.pretrain(of_tokens, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def of_others(**options):
    """A unigram tokenizer of other people: without options it adds a space before the text."""
    written, options = io.BytesIO(), {"model_type": "unigram", "vocab_size": 100, "minloglevel": 4} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=written, **options)
    return trained.SentencePieceTokenizer(written.getvalue())
