"""Noise: what is hidden is found again, in the right amounts, the same at every reading of a step."""

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import data, tasks, tokenizers
from nanoflax.config import TASK_KINDS, Denoise
from nanoflax.errors import UserError
from nanoflax.tasks import Text, noise
from nanoflax.tasks.noise import TokenizerWithSentinels
from nanoflax.tasks.table import noise_for
from tests.tokenizers.huggingface_test import CORPUS, trained

BYTES = tokenizers.ByteTokenizer()
SENTINELS = [*range(5099, 4999, -1)]
sizes = dict(n=st.integers(1, 400), seed=st.integers(0, 2**32), rate=st.floats(0.05, 0.6), span=st.floats(1, 6))


def rng_of(seed):
    return np.random.default_rng(seed)


def rebuilt(source, target):
    """The text of span corruption's source and target."""
    hidden, text = {}, []
    for i in target:
        if i in SENTINELS:
            hidden[i] = []
            mark = i
        else:
            hidden[mark].append(i)
    for i in source:
        text += hidden.pop(i) if i in SENTINELS else [i]
    assert not hidden
    return text


# The functions.


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_spans_rebuild_the_text(n, seed, rate, span):
    ids = rng_of(seed).integers(0, 50, n).astype(np.int32)
    hidden, spans = noise.span_sizes(n, rate, span)
    if spans > len(SENTINELS):
        with pytest.raises(ValueError):
            noise.span_corruption(ids, rng_of(seed), rate, span, SENTINELS)
        return
    source, target = noise.span_corruption(ids, rng_of(seed), rate, span, SENTINELS)
    assert source.dtype == target.dtype == np.int32
    assert rebuilt(source.tolist(), target.tolist()) == ids.tolist()
    for part in (source, target):  # every sentinel once, in their order
        assert [i for i in part if i in SENTINELS] == SENTINELS[:spans]
    assert (len(source), len(target)) == (n - hidden + spans, hidden + spans)
    assert n == 1 or 1 <= spans <= hidden < n


def test_spans_hide_what_is_asked_and_every_place_but_the_first():
    n, spans, lengths, hits = 100, 5, [], np.zeros(100)
    for seed in range(2000):
        source, target = noise.span_corruption(np.arange(n), rng_of(seed), 0.15, 3.0, SENTINELS)
        marks = [i for i, token in enumerate(target) if token in SENTINELS]
        assert len(target) == 15 + spans and len(marks) == spans
        lengths += np.diff([*marks, len(target)]).tolist()
        hits[[i for i in target if i < n]] += 1
    lengths = np.asarray(lengths) - 1
    assert lengths.mean() == 3 and {1, 2, 3, 4, 5, 6, 7} <= set(lengths)
    assert hits[0] == 0 and hits[-1] == 2000  # T5's own: it begins with text and ends with noise
    assert hits[10:80] / 2000 == pytest.approx(0.14, abs=0.045)


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_infilling_hides_runs_of_the_text_behind_masks(n, seed, rate, span):
    source = noise.infilling(np.arange(n), rng_of(seed), rate, span, mask_id=-1)
    assert source.dtype == np.int32 and 0 < len(source) <= n
    at, masks = 0, 0  # the next token of the text, and masks since the last that is seen
    for i in [*source, n]:
        if i == -1:
            masks += 1
        else:  # what is missing is behind a mask, and nothing else is
            assert i == at or i > at and masks
            at, masks = i + 1, 0
    assert n - sum(i >= 0 for i in source) == round(n * rate)


def test_infilling_is_poisson_and_hides_its_share():
    spans, masks, hits = [], 0, np.zeros(1000)
    for seed in range(100):
        source = noise.infilling(np.arange(1000), rng_of(seed), 0.3, 3.0, -1)
        seen = source[source >= 0]
        assert len(seen) == 700
        hits[seen] += 1
        masks += (source == -1).sum()
        # A lone mask hides the gap between its neighbours.
        for a, b, c in zip(source, source[1:], source[2:], strict=False):
            if b == -1 and a >= 0 and c >= 0:
                spans.append(c - a - 1)
    assert masks / 100 == pytest.approx(100, rel=0.03)  # 300 tokens in spans of 3
    share = np.bincount(spans, minlength=8)[:8] / len(spans)
    poisson = np.exp(-3) * np.array([1, 3, 4.5, 4.5, 3.375, 2.025, 1.0125, 0.4339])
    np.testing.assert_allclose(share, poisson, atol=0.012)
    assert hits.reshape(10, 100).mean(1) == pytest.approx(70, abs=2), "at the ends as inside"


def test_sentences_change_places_and_stay_whole():
    ids, seen = np.array([1, 2, 9, 3, 9, 4, 8, 5, 6]), set()
    for seed in range(200):
        found = noise.permuted_sentences(ids, rng_of(seed), closing=[9, 8]).tolist()
        rest, order = found, []
        while rest:
            piece = next(p for p in ([1, 2, 9], [3, 9], [4, 8], [5, 6]) if p == rest[: len(p)])
            order.append(piece[0])
            rest = rest[len(piece) :]
        assert sorted(order) == [1, 3, 4, 5]
        seen.add(tuple(order))
    assert len(seen) == 24
    assert noise.permuted_sentences(np.array([9, 9]), rng_of(0), [9]).tolist() == [9, 9]


def test_masks_are_bert_s():
    ordinary, mask = np.arange(10, 1000), 5
    ids = np.concatenate([[1, 2], rng_of(0).integers(10, 1000, 400), [3]]).astype(np.int32)
    fate = np.zeros(3)
    for seed in range(200):
        noisy, chosen = noise.mask_tokens(ids, rng_of(seed), 0.15, mask, ordinary)
        assert chosen.sum() == 60 and not chosen[[0, 1, -1]].any()
        assert (noisy[~chosen] == ids[~chosen]).all()
        new, old = noisy[chosen], ids[chosen]
        assert np.isin(new, [mask, *ordinary]).all()
        fate += [(new == mask).sum(), (new == old).sum(), ((new != mask) & (new != old)).sum()]
    np.testing.assert_allclose(fate / fate.sum(), [0.8, 0.1, 0.1], atol=0.01)
    one, chosen = noise.mask_tokens(np.array([1, 20, 3]), rng_of(0), 0.15, mask, ordinary)
    assert chosen.tolist() == [False, True, False], "one at least"
    _, chosen = noise.mask_tokens(np.array([1, 3]), rng_of(0), 0.15, mask, ordinary)
    assert not chosen.any()


# The marks of tokenizers.


def hf(path, **special):
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained("bpe"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **special
    ).save_pretrained(path)
    return tokenizers.load(path)


def test_marks_are_the_tokenizer_s_own_or_beyond_it(tmp_path):
    marked = noise.TokenizerWithSentinels(BYTES)
    assert (marked.mask_id, marked.vocab_size, marked.sentinels) == (258, 260, [])
    assert marked.ordinary.tolist() == [*range(256)]
    pieces = tokenizers.train_sentencepiece(CORPUS, 500)
    marked = noise.TokenizerWithSentinels(pieces, sentinels=True)
    assert (marked.mask_id, marked.vocab_size) == (500, 601)
    assert marked.sentinels == [*range(600, 500, -1)]
    assert noise.TokenizerWithSentinels(pieces).vocab_size == 501
    assert not np.isin([pieces.pad_id, pieces.eos_id, 500], marked.ordinary).any()
    assert marked.fingerprint == pieces.fingerprint
    text = "the names"
    ids = [600, *marked.encode(text), 599, 500, marked.eos_id]
    assert marked.decode(ids) == f"<extra_id_0>{text}<extra_id_1><mask>"
    assert tokenizers.show_mask(marked, ids, [0] * len(ids)).endswith("<mask><eos>")
    names = [f"<extra_id_{i}>" for i in range(100)]
    own = hf(tmp_path, mask_token="[M]", additional_special_tokens=names)
    marked = noise.TokenizerWithSentinels(own, sentinels=True)
    assert marked.vocab_size == own.vocab_size and marked.mask_id == own.special["[M]"]
    assert marked.sentinels == [own.special[name] for name in names]
    assert not set(marked.ordinary) & {*own.special.values()}
    assert marked.decode([marked.sentinels[7], *own.encode(text), marked.mask_id]) == f"<extra_id_7>{text}[M]"


# Rows and batches.

TEXT = "One sentence of words. Another one! And a third, which is longer? " * 8


def rows_of(
    tokenizer=BYTES,
    report=None,
    examples=(Text(TEXT, "f:1"), Text("short", "f:2")),
    truncate=True,
    kind="denoise",
    **task,
):
    task = TASK_KINDS[kind](**dict(length=64) | (dict(target_length=32) if kind == "denoise" else {}) | task)
    tokenizer = tasks.with_sentinels(task, tokenizer)
    noise = noise_for(task, tokenizer)
    return tokenizer, tasks.encode(
        [*examples],
        tokenizer,
        task.length,
        truncate=truncate,
        report=report,
        target_length=getattr(task, "target_length", None),
        noise=noise,
    )


KINDS = [dict(kind="masked_lm"), dict(noise="spans"), dict(noise="infilling"), dict(noise="none")]


@pytest.mark.parametrize("task", KINDS, ids=lambda t: "-".join(t.values()))
@pytest.mark.parametrize("pieces", [False, True])
def test_a_long_text_is_several_rows_and_nothing_is_lost(task, pieces):
    tokenizer = tokenizers.train_sentencepiece(CORPUS, 500) if pieces else BYTES
    report = data.DataReport()
    tokenizer, rows = rows_of(tokenizer, report, **task)
    texts = [row["text"].tolist() for row in rows.rows]
    assert sum(texts, []) == tokenizer.encode(TEXT) + tokenizer.encode("short")
    (problem,) = report.lines()
    assert "read in several rows: 1 (f:1)" in problem and len(rows) > 5
    assert "".join(e.text for e in rows.examples) == TEXT + "short"
    drawn = rows.with_noise([(i, 3) for i in range(len(rows))])
    lengths = drawn.lengths(range(len(rows)))
    batch = drawn.batch(range(len(rows)))
    limits = dict(tokens=64, source=64, targets=64 if task == KINDS[0] else 32)
    for name, length in lengths.items():
        assert max(len(row[name]) for row in drawn.rows) <= length <= limits[name]
        assert batch[name].shape == (len(rows), length)
    # Windows are as long as the limits let them be.
    assert any(max(len(row[name]) for row in drawn.rows) >= limits[name] - 1 for name in lengths)
    with pytest.raises(UserError, match="refused: 1 .f:1"):
        rows_of(tokenizer, truncate=False, **task)


def test_the_rows_of_each_task():
    tokenizer, rows = rows_of(noise="spans")
    for i, row in enumerate(rows.with_noise([(i, 0) for i in range(len(rows))]).rows):
        assert row["source"][-1] == row["targets"][-1] == BYTES.eos_id
        marks = dict(zip(tokenizer.sentinels, SENTINELS, strict=True))
        source, target = ([marks.get(j, j) for j in row[name][:-1]] for name in ("source", "targets"))
        assert rebuilt(source, target) == rows.rows[i]["text"].tolist()
    _, rows = rows_of(noise="none")
    (row,) = rows.with_noise([(0, 0)]).rows
    assert row["source"].tolist() == row["targets"].tolist() == [*rows.rows[0]["text"], 257]
    tokenizer, rows = rows_of(noise="infilling", noise_rate=0.2)
    (row,) = rows.with_noise([(0, 0)]).rows
    assert row["targets"].tolist() == [*rows.rows[0]["text"], 257]
    assert sum(i == tokenizer.mask_id for i in row["source"]) >= 1
    assert not {*map(int, row["source"])} - {*row["targets"].tolist(), tokenizer.mask_id}
    tokenizer, rows = rows_of(kind="masked_lm")
    batch = rows.with_noise([(0, 0), (len(rows) - 1, 0)]).batch([0, 1, 2])
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "padding_mask": "bool",
        "weights": "float32",
    }
    assert bytes(batch["targets"][1, :5].tolist()) == b"short" and batch["targets"][1, 5] == 257
    assert batch["weights"].sum(1).tolist() == [round(63 * 0.15), 1, 0]
    assert batch["padding_mask"].sum(1).tolist() == [64, 6, 0]
    same = batch["tokens"] == batch["targets"]
    assert same[batch["weights"] == 0].all() and not same[batch["weights"] == 1].all()


@pytest.mark.parametrize("task", KINDS[:3], ids=lambda t: "-".join(t.values()))
def test_noise_follows_from_seed_epoch_and_row(task):
    _, rows = rows_of(examples=[Text(TEXT[i:], f"f:{i}") for i in range(5)], **task)
    batches = tasks.ExampleBatches(rows, 4, seed=1)
    name = "tokens" if "kind" in task else "source"
    seen = {}
    for step in [*range(48), 5, 33]:  # the second reading of a step is the first
        for (i, epoch), line in zip(batches.draws(step), batches[step][name], strict=True):
            at = int(np.flatnonzero(line == 257)[-1])
            assert seen.setdefault((i, epoch), line[:at].tolist()) == line[:at].tolist()
    assert {epoch for _, epoch in seen} == set(range(-(-192 // len(rows))))
    changed = [seen[i, 0] != seen[i, 1] for i in range(len(rows))]
    assert np.mean(changed) > 0.8, "anew in every epoch"
    other = tasks.ExampleBatches(rows, 4, seed=2)
    assert all(
        seen[draw] != line[: len(seen[draw])].tolist()
        for draw, line in zip(other.draws(0), other[0][name], strict=True)
        if len(rows.rows[draw[0]]["text"]) > 20
    )
    halves = [tasks.ExampleBatches(rows, 4, 1, True, own) for own in ([0, 1], [2, 3])]
    for key, array in batches[9].items():
        np.testing.assert_array_equal(np.concatenate([half[9][key] for half in halves]), array)


def test_t5_s_room():
    # 512 tokens of source and 114 of target hold 568 of a text (Raffel et al. 2020: random_spans_helper).
    noise = noise_for(Denoise(length=512, target_length=114), TokenizerWithSentinels(BYTES, sentinels=True))
    assert noise.max_ids == 568
