"""experiments.finetune as a person runs it: files in, a report, predictions and a model out."""

import json
import random
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.programs_test import run

TINY = ["--config.model.layers=1", "--config.model.dim=32", "--config.model.heads=2",
        "--config.model.context=32", "--config.data.tokenizer=bytes", "--config.task.length=32",
        "--config.task.target_length=32", "--config.optim.warmup_steps=2",
        "--config.optim.learning_rate=0.01", "--config.train.batch_size=16",
        "--config.train.tensorboard=false"]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return f"jsonl:{path}"


def finetune(config, workdir, train, validation, *flags):
    return run("finetune", f"--config={config}", f"--workdir={workdir}",
               f"--config.data.train={train}", f"--config.data.validation={validation}", *TINY,
               *flags)


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Files of an easy task: whether a text of letters holds a cat or a dog."""
    rng, directory = random.Random(0), tmp_path_factory.mktemp("topics")

    def record(_):
        label = rng.choice(["cat", "dog"])
        words = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(4)]
        words[rng.randrange(4)] = label
        return {"text": " ".join(words), "label": label}

    return [write(directory / f"{name}.jsonl", map(record, range(n)))
            for name, n in (("train", 400), ("dev", 48))]


def test_classes_are_learnt_reported_and_gone_on_with(topics, tmp_path):
    flags = ["--config.train.evaluate_every=40", "--config.train.checkpoint_every=40"]
    first = finetune("classify", tmp_path, *topics, "--config.train.steps=120", *flags)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] > 0.9
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    right = sum(p["label"] == p["prediction"] for p in predictions)
    assert len(predictions) == 48 and right / 48 == pytest.approx(result["accuracy"])
    assert "macro average" in first.stdout and "step 120/120" in first.stderr
    again = finetune("classify", tmp_path, *topics, "--config.train.steps=120", *flags)
    assert "resuming at step 120" in again.stdout
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_lora_trains_little_and_its_merged_model_stands_alone(topics, tmp_path):
    options = ["--config.train.steps=30", "--config.train.evaluate_every=30"]
    base = finetune("classify", tmp_path / "base", *topics, *options)
    assert base.returncode == 0, base.stderr
    tuned = finetune("classify", tmp_path / "lora", *topics, *options, "--config.peft.kind=lora",
                     f"--config.model.init_from={tmp_path / 'base' / 'final'}",
                     "--config.peft.rank=2", "--config.peft.trained=adapters,head")
    assert tuned.returncode == 0, tuned.stderr
    trained, whole = (json.loads((tmp_path / name / "result.json").read_text())
                      for name in ("lora", "base"))
    assert trained["trained_parameters"] < whole["trained_parameters"] / 3
    assert 0 < trained["validation_loss"] < 1.05 * whole["validation_loss"]
    from experiments import common
    model, params, _ = common.open_model(str(tmp_path / "lora" / "final"))
    assert "lora" not in str(params.keys()) and model.config.head == "classify"
    _, first, _ = common.open_model(str(tmp_path / "base" / "final"))
    adapted = re.compile("(query|key|value|out|up|gate|down)/kernel|labels|pooler")
    first, params = (flatten_dict(tree, sep="/") for tree in (first, params))
    for path, x in first.items():
        assert np.array_equal(x, params[path]) != bool(adapted.search(path)), path
    from nanoflax import checkpoint
    parts = [checkpoint.restore_params(tmp_path / "lora" / "checkpoints", subtree=name)[0]
             for name in ("params", "opt_state")]
    count = [sum(np.size(x) for x in jax.tree.leaves(part)) for part in parts]
    assert count[0] == trained["trained_parameters"] and count[1] < 2 * count[0] + 10


WRONG = {
    "unknown.jsonl": [{"text": "a", "label": "bird"}, {"text": "b"}],
    "one.jsonl": [{"text": "a", "label": "cat"}, {"text": "b", "label": "cat"}],
    "empty.jsonl": [{"source": "", "target": "x"}, {"source": "x", "target": " "}],
    "long.jsonl": [{"text": "cat " * 40, "label": "cat"}, {"text": "dog", "label": "dog"}],
}


@pytest.mark.parametrize("config, train, validation, words", [
    ("classify", "jsonl:unknown.jsonl", "", ["unknown.jsonl", "without a label", "unknown.jsonl:2"]),
    ("classify", "", "jsonl:unknown.jsonl", ["unknown label", "unknown.jsonl:1 'bird'"]),
    ("classify", "jsonl:one.jsonl", "", ["every example has the label 'cat'", "one.jsonl:1"]),
    ("classify", "jsonl:long.jsonl", "", ["longer than 32 tokens, refused", "long.jsonl:1"]),
    ("translate", "jsonl:empty.jsonl", "jsonl:empty.jsonl",
     ["empty 'source'", "empty.jsonl:1", "empty 'target'", "empty.jsonl:2"]),
    ("translate", "pairs:three,two", "", ["three", "two", "3", "2"]),
    ("tag", "conll:bad.conll", "", ["bad.conll:2"]),
])
def test_bad_data_is_named_with_its_line(config, train, validation, words, topics, tmp_path):
    for name, records in WRONG.items():
        write(tmp_path / name, records)
    (tmp_path / "three").write_text("a\nb\nc\n")
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "bad.conll").write_text("word B-X\nbroken\n\n")
    place = lambda source, other: re.sub(  # noqa: E731
        "(?<=[:,])", f"{tmp_path}/", source) if source else other
    done = finetune(config, tmp_path / "run", place(train, topics[0]),
                    place(validation, topics[1]), "--config.task.truncate=false")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_what_is_cut_is_counted_and_classes_weigh(topics, tmp_path):
    data = write(tmp_path / "long.jsonl", [
        {"text": f"{word} {i} " * n, "label": word} for i, (word, n) in
        enumerate([("cat", 20), ("dog", 1), ("dog", 2)] * 4)])
    done = finetune("classify", tmp_path / "run", data, topics[1], "--config.train.steps=3",
                    "--config.model.architecture=decoder", "--config.task.class_weights=balanced")
    assert done.returncode == 0, done.stderr
    assert "texts longer than 32 tokens, cut: 4" in done.stdout
    assert "class weights: cat 1.5, dog 0.75" in done.stdout


def test_adalora_ends_with_its_budget_by_a_chosen_metric(topics, tmp_path):
    flags = ["--config.train.steps=24", "--config.train.evaluate_every=6", "--config.peft.rank=3",
             "--config.peft.target_rank=2", "--config.peft.warmup_steps=2",
             "--config.peft.final_steps=10", "--config.peft.kind=adalora",
             "--config.peft.trained=adapters,head", "--config.train.metric=accuracy"]
    run = tmp_path / "run"
    done = finetune("classify", run, *topics, *flags)
    assert done.returncode == 0, done.stderr
    assert "before step 14 AdaLoRA has more ranks than its budget" in done.stderr
    result = json.loads((run / "result.json").read_text())
    seen = {r["step"]: r for line in (run / "metrics.jsonl").open()
            if "accuracy" in (r := json.loads(line))}
    assert seen.keys() == {6, 12, 18, 24} and result["step"] in (18, 24)
    best = max(seen[18]["accuracy"], seen[24]["accuracy"])
    assert result["accuracy"] == best == seen[result["step"]]["accuracy"]
    from nanoflax import checkpoint
    params, meta = checkpoint.restore_params(run / "checkpoints", which="best")
    assert meta["tracking"]["best"] == -best
    masks = [x for path, x in flatten_dict(params).items() if path[-1] == "lora_mask"]
    assert sum(float(x.sum()) for x in masks) == 2 * len(masks) == 14
    from experiments import common
    _, merged, _ = common.open_model(str(run / "final"))
    assert not any("lora" in path[-1] for path in flatten_dict(merged))
    other = finetune("classify", run, *topics, *flags[:-1])
    assert other.returncode == 2
    assert "train.metric: 'accuracy' -> 'validation_loss'" in other.stderr


def test_targets_are_learnt_from_sources_and_written_by_sample(tmp_path):
    pairs = [{"source": a + b, "target": b + a} for a in "abcdefgh" for b in "abcdefgh"]
    train, dev = write(tmp_path / "train", pairs), write(tmp_path / "dev", pairs[::4])
    done = finetune("translate", tmp_path / "run", train, dev, "--config.model.dim=64",
                    "--config.train.steps=150", "--config.train.evaluate_every=150",
                    "--config.train.batch_size=32", "--config.optim.learning_rate=0.005")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exact_match"] > 0.9
    said = run("sample", f"--workdir={tmp_path / 'run' / 'final'}", "--prompt=ce",
               "--temperature=0")
    assert said.stdout == "ec\n", said.stderr


def test_the_lstm_takes_the_same_road(tmp_path):
    pairs = [{"source": a + b, "target": b} for a in "abcd" for b in "abcd"]
    data = write(tmp_path / "pairs", pairs)
    done = finetune("translate", tmp_path / "run", data, data, "--config.model.architecture=lstm",
                    "--config.model.embed_scale=50", "--config.train.steps=40",
                    "--config.train.evaluate_every=20", "--config.task.beams=2")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line).get("validation_loss")
              for line in (tmp_path / "run" / "metrics.jsonl").open()]
    first, last = [loss for loss in losses if loss]
    assert last < first < 6  # log 260


@pytest.mark.parametrize("flags, words", [
    (["--config.task.kind=dance"], "task.kind='dance' is not one of classify"),
    (["--config.train.metric=f2"], "train.metric='f2' is not one of validation_loss, perplexity"),
    (["--config.train.metric=bleu"],
     "train.metric='bleu' is not measured here; choose one of validation_loss, accuracy, macro_f1"),
    (["--config.task.kind=translate"], "'source'"),
    (["--config.model.init_from=nothing"], "nothing: neither a directory"),
    (["--config.task.length=64"], "must be at most the model's context of 32"),
])
def test_misuse_gets_one_line_and_status_2(flags, words, topics, tmp_path):
    done = finetune("classify", tmp_path / "run", *topics, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
