"""Mixtures: exact proportions, and rows that are a pure function of their position, by brute force."""

import collections
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax.data import Batches, Mixture, Stage, Windows, is_mixture
from nanoflax.data.mixture import Schedule, interleave
from nanoflax.data.stages import block_counts, parse_names, parse_stages
from nanoflax.errors import UserError
from tests.data.token_store_test import store_of

NAMES = ["web", "code", "math"]


class Numbers:
    """n windows, each of which holds only its number and the number of its source."""

    def __init__(self, source, n):
        self.source, self.n = source, n

    def __len__(self):
        return self.n

    def batch(self, indices):
        return {"targets": np.asarray([[self.source, i] for i in indices], np.int32)}

    def documents(self, index):
        return index, index + 1


def mixture_of(text, sizes, batch_size, seed=0, host_rows=None, steps=10**6):
    windows = {name: Numbers(k, n) for k, (name, n) in enumerate(zip(NAMES, sizes, strict=False))}
    return Mixture(windows, parse_stages(text, list(windows), steps), batch_size, seed, host_rows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.lists(st.integers(1, 30), min_size=4, max_size=4),
    st.integers(1, 7),
    st.integers(0, 2**40),
)
def test_each_row_is_counted_by_hand(counts, lengths, batch_size, seed):
    stages, step = [], 0
    for of_stage, length in zip(counts, lengths, strict=False):
        stages.append(Stage(step, {name: n for name, n in zip(NAMES, of_stage, strict=True) if n}))
        step += length
    schedule = Schedule(NAMES, stages, batch_size, seed)
    seen, stage_began = collections.Counter(), 0
    for position in range(step * batch_size):
        if any(position == stage.step * batch_size for stage in stages):
            stage_began, in_block = position, collections.Counter()
        stage = max((s for s in stages if s.step * batch_size <= position), key=lambda s: s.step)
        assert schedule.rows_before(position).tolist() == [seen[k] for k in range(3)]
        source, before = schedule(position)
        assert before == seen[source]
        seen[source] += 1
        in_block[NAMES[source]] += 1
        assert in_block[NAMES[source]] <= stage.counts.get(NAMES[source], 0)  # exact over every block
        if (position + 1 - stage_began) % stage.block == 0:
            assert in_block == stage.counts
            in_block.clear()


def test_the_order_inside_blocks_is_shuffled_by_the_seed():
    orders = set()
    for seed in range(3):
        schedule = Schedule(NAMES, [Stage(0, {"web": 5, "code": 3, "math": 2})], 4, seed)
        orders |= {tuple(schedule(10 * block + i)[0] for i in range(10)) for block in range(4)}
    assert len(orders) > 9


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_rows_do_not_depend_on_the_number_of_hosts(hosts):
    text, sizes = "0: web=0.8,code=0.2; 5: web=0.5,code=0.3,math=0.2; 9: math=1", (11, 5, 30)
    whole = mixture_of(text, sizes, 8, seed=3)
    owns = [range(host, 8, hosts) for host in range(hosts)]
    for step in (13, 0, 4, 5, 8, 9, 400):  # any step alone, whatever was read before
        expected = whole[step]
        assert [(k, i) for k, i in expected["targets"]] == whole.indices(step)
        assert expected["source_number"].tolist() == expected["targets"][:, 0].tolist()
        assert expected["source_number"].dtype == np.int32
        for own in owns:
            part = mixture_of(text, sizes, 8, seed=3, host_rows=own)
            got = part[step]
            assert got.keys() == expected.keys()
            for name in got:
                np.testing.assert_array_equal(got[name], expected[name][list(own)])
            assert part.describe(step) == whole.describe(step)
    assert {name for step in range(5) for name, *_ in whole.describe(step)} == {"web", "code"}
    assert {name for name, *_ in whole.describe(9)} == {"math"}


def test_each_epoch_of_each_source_is_a_permutation():
    sizes = dict(zip(NAMES, (11, 5, 3), strict=True))
    batches = mixture_of("0: web=3,code=1; 7: code=2,math=1,web=1", (11, 5, 3), 6, seed=1)
    read = collections.defaultdict(list)
    for step in range(40):
        assert batches.epochs(step) == {n: len(read[k]) / sizes[n] for k, n in enumerate(NAMES)}
        for source, window in batches.indices(step):
            read[source].append(window)
    for source, n in enumerate((11, 5, 3)):
        epochs = [read[source][at : at + n] for at in range(0, len(read[source]) - n + 1, n)]
        assert len(epochs) > 5 and all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_a_mixture_of_one_source_reads_what_batches_reads(tmp_path):
    windows = Windows(store_of([[i] * (1 + i % 5) for i in range(40)], tmp_path / "s"), 4, isolated=True)
    plain, own = Batches(windows, 6, 5, True, [1, 4]), [1, 4]
    mixed = Mixture({"all": windows}, None, 6, 5, own)
    for step in range(30):
        expected = plain[step]
        got = mixed[step]
        assert got.pop("source_number").tolist() == [0, 0] and got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
            assert got[name].dtype == expected[name].dtype
        assert [row[1:] for row in mixed.describe(step)] == plain.describe(step)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.fractions(Fraction(1, 50), 1, max_denominator=2000), min_size=1, max_size=6))
def test_counts_are_the_smallest_or_the_largest_remainders(weights):
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    shares = [weight / sum(weights) for weight in weights]
    block = math.lcm(*(share.denominator for share in shares))
    counts = list(block_counts(named, "here").values())
    if block <= 1000:
        assert counts == [share * block for share in shares]
        assert all(any((share * b).denominator > 1 for share in shares) for b in range(1, min(block, 200)))
    else:  # largest remainder: no count differs by one or more, and no exchange of a row comes nearer
        assert sum(counts) == 1000
        rests = [share * 1000 - math.floor(share * 1000) for share in shares]
        more = [i for i, share in enumerate(shares) if counts[i] > math.floor(share * 1000)]
        assert all(abs(share * 1000 - count) < 1 for share, count in zip(shares, counts, strict=True))
        assert not more or min(rests[i] for i in more) >= max(
            (rest for i, rest in enumerate(rests) if i not in more), default=0
        )


def test_without_weights_the_sizes_decide():
    windows = {"a": Numbers(0, 300), "b": Numbers(1, 100)}
    assert Mixture(windows, None, 4).stages == [Stage(0, {"a": 3, "b": 1})]
    with pytest.raises(UserError, match=r"b has a share of 0.0001, less than one row in 1,000"):
        Mixture({"a": Numbers(0, 9999), "b": Numbers(1, 1)}, None, 4)


def test_names_and_stages_are_read():
    assert is_mixture("web=text:a.txt; code=tfds:x:1.0.0") and is_mixture(" a = pydocs")
    assert not any(map(is_mixture, ("pydocs", "text:a=b.txt", "text:a;b=c.txt", "tfds:name:field")))
    assert parse_names("web=text:a=b.txt;\n code = pydocs ;", "data.train") == {"web": "text:a=b.txt", "code": "pydocs"}
    assert parse_names("text; code=content", "data.field") == {"": "text", "code": "content"}
    assert parse_names("", "data.field") == {}
    stages = parse_stages("0: web=0.8,code=0.2; 8000: web=0.5, code=0.3,math=0.2", NAMES, 9000)
    assert stages == [Stage(0, {"web": 4, "code": 1}), Stage(8000, {"web": 5, "code": 3, "math": 2})]
    assert parse_stages("web=1/3,code=1/3,math=1/3", NAMES, 1) == [Stage(0, dict.fromkeys(NAMES, 1))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: web=1,codes=1", r"stage at step 0: 'codes=1' is not NAME=WEIGHT with a name of data.train: web, code"),
        ("0: web=1,code=0", "weight '0' of code must be a positive number"),
        ("0: web=1,code=-1", "weight '-1' of code must be"),
        ("0: web=1,code=nan", "weight 'nan' of code must be"),
        ("0: web=1,code=1e99999999", "weight '1e99999999' of code must be"),
        ("0: web=1,code=1/0", "weight '1/0' of code must be"),
        ("0: web=1,code=1/00", "weight '1/00' of code must be"),
        ("0: web=1,code", "weight '' of code must be"),
        ("0: web=1,web=2", "stage at step 0: web occurs twice"),
        ("0: web=1,code=0.0001", "code has a share of 0.0001, less than one row in 1,000"),
        ("5: web=1,code=1", "the first stage begins at step 5"),
        ("0: web=1; 0: code=1", "step 0 comes after step 0; the steps must ascend"),
        ("0: web=1; 20: code=1; 10: web=1", "step 10 comes after step 20"),
        ("0: web=1; 100: code=1", "the stage at step 100 never begins: train.steps=100"),
        ("0: web=1", "no stage uses code"),
        ("0: web=1; code=1", "'code=1' is not STEP: NAME=WEIGHT"),
        ("-1: web=1,code=1", "'-1: web=1,code=1' is not STEP"),
        ("0: web=1; " + "9" * 99 + ": code=1", "is not STEP"),
        ("0: ", "'' is not NAME=WEIGHT"),
    ],
)
def test_wrong_stages_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_stages(text, ["web", "code"], 100)


def test_wrong_names_are_refused():
    for text, message in [
        ("web=text:a; text:b", "data.train: 'text:b' is not NAME=VALUE"),
        ("web=text:a; web=text:b", "the name web occurs twice"),
        ("web=; code=text:a", "'web=' is not NAME=VALUE"),
        ("web=text:a; my code=text:b", "'my code=text:b' is not NAME=VALUE"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_names(text, "data.train")


def test_reading_is_constant_in_the_step():
    """The position alone gives the row: the last of 10^15 rows takes no longer than the first."""
    schedule = Schedule(NAMES, [Stage(0, {"web": 998, "code": 1, "math": 1}), Stage(10**9, {"web": 1})], 10**6)
    source, before = schedule(10**15 - 1)
    assert source in range(3) and before <= 10**15
    assert schedule.rows_before(10**15).tolist() == [998 * 10**12, 10**12, 10**12]
    assert schedule(10**15) == (0, 998 * 10**12)


def test_a_tokenizer_reads_the_sources_in_their_proportions():
    texts = {"web": ["w" * 10] * 300, "code": ["c" * 7] * 100, "math": ["m" * 3] * 50}
    readers = {name: (lambda items=items: iter(items)) for name, items in texts.items()}
    read = collections.Counter()
    for text in interleave(readers, {"web": 5, "code": 3, "math": 2}):
        read[text[0]] += len(text)
        total = sum(read.values())
        assert abs(read["w"] - 0.5 * total) < 20 and abs(read["c"] - 0.3 * total) < 20
    assert read["w"] == 3000 and read["c"] > 700 and read["m"] > 150  # all of the text, the small ones again
    read = sum(len(text) for text in interleave(readers, {"web": 1, "code": 98, "math": 1}))
    assert 1400 <= read < 1700  # no more repetitions than text
    found = interleave({"web": lambda: iter([]), "code": lambda: iter(["x"])}, {"web": 1, "code": 1})
    assert list(found) == ["x"]
