"""What experiments.inspect_data shows is what training reads."""

import dataclasses
import json
import re

import numpy as np
import pytest

from nanoflax import config as configs
from nanoflax import runs, tasks
from nanoflax.errors import UserError
from nanoflax.runs.finetune import Finetuning
from nanoflax.runs.pretrain import make_job
from nanoflax.tokenizers import ByteTokenizer
from tests import processes

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(the settings of a run on 12 short documents, all text that it may train on)."""
    directory = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (directory / f"{i:02}.txt").write_text(f"Document {i} says é.\n" * (1 + i))
    config = configs.Config(
        model=configs.ModelConfig(layers=1, dim=16, heads=1, context=32),
        data=configs.TextData(train=f"text:{directory}/*.txt", tokenizer="bytes", cache=str(directory / "cache")),
        train=configs.TrainConfig(steps=40, batch_size=4, seed=3, sample_tokens=0),
    )
    return config, directory


def test_the_rows_are_those_of_training(texts, tmp_path):
    config, _ = texts
    job = make_job(config, str(tmp_path / "run"), False)
    batches, shown = job.read_data().batches, runs.inspect_data(config)
    for step in (0, 7, 39):  # the last is in a later epoch
        for name, array in batches[step].items():
            np.testing.assert_array_equal(array, shown.batches[step][name])
    assert shown.rows(39)[0].epoch == 39 * 4 // len(batches.windows) > 0


@pytest.mark.parametrize("packing", configs.data.PACKINGS)
def test_facts_agree_with_a_search_in_the_text(texts, packing):
    config, directory = texts
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
    shown = runs.inspect_data(config)
    # With few documents, each is cut in two, and its first part is trained on.
    whole = [path.read_text().encode() for path in sorted(directory.glob("*.txt"))]
    ids, lengths = [], next(iter(shown.lengths().values()))
    for text, n in zip(whole, lengths, strict=True):
        assert n - 1 <= len(text)
        ids += [*text[: n - 1], BYTES.eos_id]
    for step in (0, 5):
        targets = shown.batches[step]["targets"]
        for row, facts in enumerate(shown.rows(step)):
            start = facts.numbers[0] * 32
            expected = ids[start : start + 32]
            assert targets[row, : len(expected)].tolist() == expected
            document = [sum(i == BYTES.eos_id for i in ids[:at]) for at in (start, start + len(expected) - 1)]
            assert facts.numbers[1:] == tuple(document)
            assert facts.text == BYTES.decode(expected)
            # The tokens that are shown, joined again, are the row.
            blocks = [line[4:] for line in shown.show(step, row) if line.startswith("    ")]
            assert "".join(blocks).replace("│", "") == named(expected)


CASES = {
    "classify": ({"text": "good {i}", "label": "ab"}, configs.Classify(length=16), "label: a"),
    "tag": ({"tokens": "w{i} v", "tags": ("B-x", "O")}, configs.Tag(length=16), "tags: "),
    "mlm": ({"text": "some words {i}"}, configs.MaskedLM(length=32), "predicted: "),
    "packed": (
        {"messages": "hello {i}"}, configs.Instruct(length=64, packing="best_fit"), "⟦"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_examples_of_finetuning(case, tmp_path):
    fields, task, shown_word = CASES[case]

    def value(name, content, i):
        text = content.format(i=i) if isinstance(content, str) else list(content)
        if name == "messages":
            return [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return text.split() if name == "tokens" else content[i % 2] if name == "label" else text

    for split, n in (("train", 13), ("valid", 3)):
        records = [{name: value(name, content, i) for name, content in fields.items()} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    decoder = case == "packed"
    kind = {"architecture": "decoder"} if decoder else {"architecture": "encoder", "head": "mlm"}
    config = configs.Config(
        model=configs.ModelConfig(layers=1, dim=16, heads=1, context=64, **kind),
        data=configs.ExampleData(
            train=f"jsonl:{tmp_path}/train.jsonl", validation=f"jsonl:{tmp_path}/valid.jsonl", tokenizer="bytes"
        ),
        task=task,
        train=configs.TrainConfig(steps=20, batch_size=4, seed=1),
    )
    batches = Finetuning(config, str(tmp_path / "run")).job.read_data().batches
    found = runs.inspect_data(config)
    for step in (0, 6):
        for name, array in batches[step].items():
            np.testing.assert_array_equal(array, found.batches[step][name])
        rows = found.rows(step)
        lines = [line for row in range(4) for line in found.show(step, row)]
        assert any(shown_word in line for line in lines)
        for facts, row in zip(rows, range(4), strict=True):
            assert all(f"train.jsonl:{i + 1}" in facts.place for i in facts.numbers[:3])
            assert facts.text.split()[-1 if case != "tag" else 0].lstrip("w") == str(facts.numbers[0])
            assert facts.text in "".join(found.show(step, row)).replace("│", "") or case in ("tag", "mlm")
    # Every complete epoch reads each example once; the last epoch may be cut.
    reads = sorted((facts.epoch, i) for step in range(16) for facts in found.rows(step) for i in facts.numbers)
    last = reads[-1][0]
    assert [r for r in reads if r[0] < last] == [(epoch, i) for epoch in range(last) for i in range(13)]
    assert len(set(reads)) == len(reads) and last > 0
    assert found.unit == "examples" and len(next(iter(found.lengths().values()))) == 13


def named(ids):
    """The ids as `show` writes them: é has two bytes."""
    names = {BYTES.eos_id: "<eos>", 0xC3: "<c3>", 0xA9: "<a9>", 10: "↵"}
    return "".join(names.get(i) or chr(i) for i in ids)


def test_rows_of_a_mixture(texts, tmp_path):
    config, directory = texts
    files = {"a": f"text:{directory}/0*.txt", "b": f"text:{directory}/1*.txt"}
    train = "; ".join(f"{name}={source}" for name, source in files.items())
    mixed = dataclasses.replace(config.data, train=train, mixture="0: a=3,b=1; 20: a=1,b=1")
    config = dataclasses.replace(config, data=mixed)
    batches, shown = make_job(config, str(tmp_path / "run"), False).read_data().batches, runs.inspect_data(config)
    assert shown.shares() == ([0, 20, 40], {"a": [0.75, 0.5], "b": [0.25, 0.5]})
    texts_of = {name: runs.inspect_data(with_train(config, source)) for name, source in files.items()}
    read = {"a": [], "b": []}
    for step in (0, 19, 20):
        np.testing.assert_array_equal(batches[step]["targets"], shown.batches[step]["targets"])
        sources = [facts.source for facts in shown.rows(step)]
        assert sources.count("a") == (3 if step < 20 else 2)
    for step in range(40):
        for row, facts in enumerate(shown.rows(step)):
            window = texts_of[facts.source].batches.windows[facts.numbers[0]]["targets"]
            np.testing.assert_array_equal(shown.batches[step]["targets"][row], window)
            read[facts.source].append((facts.epoch, facts.numbers[0]))
    for name, found in read.items():  # each epoch reads every window of its source once
        last, n = max(found)[0], len(texts_of[name].batches.windows)
        assert sorted(x for x in found if x[0] < last) == [(e, i) for e in range(last) for i in range(n)]


def with_train(config, source):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=source, mixture=""))


def test_padding_and_untrained_tokens_are_marked():
    batch = {
        "first": np.array([65]),
        "targets": np.array([[66, 67, 68, 69, 0, 0, 0]]),
        "weights": np.array([[0, 0, 1, 1, 0, 0, 0]], np.float32),
    }
    assert tasks.show_batch_row(batch, 0, BYTES) == [
        "  after 'A': 4 tokens",
        "    B│C│⟦D│E⟧",
        "  3 positions of padding",
    ]
    documents = {"segments": np.array([[1, 1, 2, 3, 3, 0, 0]]), "start": np.array([90]), "weights": np.ones((1, 7))}
    assert tasks.show_batch_row(batch | documents, 0, BYTES) == [
        *("  after 'A': 2 tokens", "    B│C"),
        *("  after 'Z': 1 token", "    D"),
        *("  after 'Z': 2 tokens", "    E│\\x00"),
        "  2 positions of padding",
    ]


def test_the_program_shows_a_run_and_refuses_other_data(texts, tmp_path):
    config, directory = texts
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, evaluate_every=2))
    runs.pretrain(config, str(tmp_path / "run"))
    picture = tmp_path / "data.png"
    program = ["-m", "experiments.inspect_data", f"--workdir={tmp_path / 'run'}"]
    done = processes.run([*program, "--step=2", "--rows=3", f"--out={picture}"])
    assert done.returncode == 0, done.stderr
    assert "training: 12 documents" in done.stdout and "lengths of 12 documents" in done.stdout
    facts = runs.inspect_data(config).rows(1)
    assert re.findall(r"window (\d+), document", done.stdout) == [str(row.numbers[0]) for row in facts[:3]]
    assert "... and 1 row more (--rows=4 lists all)" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = processes.run([*program, "--step=3"])
    assert done.returncode == 2 and "--step=3 is after the last one" in done.stderr and done.stderr.count("\n") == 1
    changed = dataclasses.replace(config.data, train=f"text:{directory}/0*.txt")
    with pytest.raises(UserError, match=r"text of data.train is not the one that the checkpoint was trained with"):
        runs.inspect_data(dataclasses.replace(config, data=changed), str(tmp_path / "run"))
