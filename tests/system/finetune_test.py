"""experiments.finetune as a person runs it: files in, a report, predictions and a model out."""

import json
import random
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.system.programs_test import fake, run

TINY = [
    "--config.model.layers=1",
    "--config.model.dim=32",
    "--config.model.heads=2",
    "--config.model.context=32",
    "--config.data.tokenizer=bytes",
    "--config.task.length=32",
    "--config.optim.warmup_steps=2",
    "--config.optim.learning_rate=0.01",
    "--config.train.batch_size=16",
    "--config.train.tensorboard=false",
]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return f"jsonl:{path}"


def finetune(config, workdir, train, validation, *flags):
    kind = next((flag.partition("=")[2] for flag in flags if flag.startswith("--config.task.kind=")), config)
    target = ["--config.task.target_length=32"] if kind in ("translate", "denoise", "bible") else []
    return run(
        "finetune",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.train={train}",
        f"--config.data.validation={validation}",
        *TINY,
        *target,
        *flags,
    )


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Files of an easy task: whether a text of letters holds a cat or a dog."""
    rng, directory = random.Random(0), tmp_path_factory.mktemp("topics")

    def record(_):
        label = rng.choice(["cat", "dog"])
        words = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(4)]
        words[rng.randrange(4)] = label
        return {"text": " ".join(words), "label": label}

    return [write(directory / f"{name}.jsonl", map(record, range(n))) for name, n in (("train", 400), ("dev", 48))]


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
    other = finetune("classify", tmp_path, *topics[::-1], "--config.train.steps=120", *flags)
    assert other.returncode == 2 and "another configuration" in other.stderr
    lines = open(topics[0].removeprefix("jsonl:")).readlines()
    try:
        open(topics[0].removeprefix("jsonl:"), "w").writelines(lines[1:])
        other = finetune("classify", tmp_path, *topics, "--config.train.steps=120", *flags)
    finally:
        open(topics[0].removeprefix("jsonl:"), "w").writelines(lines)
    assert other.returncode == 2 and "is not the one that" in other.stderr, other.stderr
    evaluated(tmp_path, topics[1], result, predictions)
    texts = ["--prompt=abc cat def", "--prompt=hgf fed dog"]
    said = run("sample", f"--workdir={tmp_path}", *texts, env=fake(2))
    assert said.returncode == 0, said.stderr
    parts = [part.split("\n")[1:3] for part in said.stdout.split("--- ")[1:]]
    assert [lines[0].split("\t")[0] for lines in parts] == ["cat", "dog"]
    for lines in parts:
        shares = [float(line.split("\t")[1]) for line in lines]
        assert sum(shares) == pytest.approx(1, abs=2e-4) and shares[0] > 0.5
    blank = run("sample", f"--workdir={tmp_path}", "--prompt= ")
    assert blank.returncode == 2 and "--prompt is empty after" in blank.stderr
    none = run("sample", f"--workdir={tmp_path}")
    assert none.returncode == 2 and "--prompt is missing" in none.stderr
    wrong = run("evaluate", f"--workdir={tmp_path}", "--data=dates:en-fr")
    assert wrong.returncode == 2 and "dates:en-fr" in wrong.stderr
    path = tmp_path / "final" / "config.json"  # older runs have the names of their classes in labels.json
    config = json.loads(path.read_text())
    assert config["model"].pop("class_names") == ["cat", "dog"]
    path.write_text(json.dumps(config))
    lost = run("evaluate", f"--workdir={tmp_path / 'final'}", f"--data={topics[1]}")
    assert lost.returncode == 2 and "there is no labels.json of an older run" in lost.stderr
    (tmp_path / "final" / "labels.json").write_text('{"labels": ["cat", "dog"], "several": false}')
    evaluated(tmp_path, topics[1], result, predictions)


def evaluated(workdir, data, result, predictions):
    """The run's own figures and predictions are those that evaluate finds, here and in final/."""
    for devices, home, flags in ((1, workdir, []), (3, workdir / "final", [f"--data={data}"])):
        out = workdir / "said.jsonl"
        done = run("evaluate", f"--workdir={home}", f"--out={out}", *flags, env=fake(devices))
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["report"] == result["report"] and found["examples"] == len(predictions)
        for name in ("validation_loss", "accuracy", "macro_f1"):
            assert found[name] == pytest.approx(result[name], rel=1e-5)
        assert [json.loads(line) for line in out.open()] == predictions


def test_lora_trains_little_and_its_merged_model_stands_alone(topics, tmp_path):
    options = ["--config.train.steps=30", "--config.train.evaluate_every=30"]
    base = finetune("classify", tmp_path / "base", *topics, *options)
    assert base.returncode == 0, base.stderr
    tuned = finetune(
        "classify",
        tmp_path / "lora",
        *topics,
        *options,
        "--config.peft.kind=lora",
        f"--config.model.init_from={tmp_path / 'base' / 'final'}",
        "--config.peft.rank=2",
        "--config.peft.trained=adapters,head",
    )
    assert tuned.returncode == 0, tuned.stderr
    trained, whole = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("lora", "base"))
    assert trained["trained_parameters"] < whole["trained_parameters"] / 3
    assert 0 < trained["validation_loss"] < 1.05 * whole["validation_loss"]
    from nanoflax import runs

    model, params, _ = runs.open_model(str(tmp_path / "lora" / "final"))
    assert "lora" not in str(params.keys()) and model.config.head == "classify"
    _, first, _ = runs.open_model(str(tmp_path / "base" / "final"))
    adapted = re.compile("(query|key|value|out|up|gate|down)/kernel|labels|pooler")
    first, params = (flatten_dict(tree, sep="/") for tree in (first, params))
    for path, x in first.items():
        assert np.array_equal(x, params[path]) != bool(adapted.search(path)), path
    from nanoflax import runs

    parts = [
        runs.restore_params(tmp_path / "lora" / "checkpoints", subtree=name)[0] for name in ("params", "opt_state")
    ]
    count = [sum(np.size(x) for x in jax.tree.leaves(part)) for part in parts]
    assert count[0] == trained["trained_parameters"] and count[1] < 2 * count[0] + 10


def test_a_head_of_other_classes_is_drawn_anew_and_trained(topics, tmp_path):
    options = ["--config.train.steps=3", "--config.train.evaluate_every=3"]
    base = finetune("classify", tmp_path / "base", *topics, *options)
    assert base.returncode == 0, base.stderr
    data = write(tmp_path / "other", [{"text": f"a {i}", "label": ["sun", "moon"][i % 2]} for i in range(20)])
    tuned = finetune(
        "classify",
        tmp_path / "lora",
        data,
        data,
        *options,
        "--config.peft.kind=lora",
        f"--config.model.init_from={tmp_path / 'base' / 'final'}",
    )
    assert tuned.returncode == 0 and "initialized randomly: labels" in tuned.stderr, tuned.stderr
    from nanoflax import runs

    trained, _ = runs.restore_params(tmp_path / "lora" / "checkpoints")
    assert "kernel" in trained["labels"]


WRONG = {
    "unknown.jsonl": [{"text": "a", "label": "bird"}, {"text": "b"}],
    "one.jsonl": [{"text": "a", "label": "cat"}, {"text": "b", "label": "cat"}],
    "empty.jsonl": [{"source": "", "target": "x"}, {"source": "x", "target": " "}],
    "long.jsonl": [{"text": "cat " * 40, "label": "cat"}, {"text": "dog", "label": "dog"}],
}


@pytest.mark.parametrize(
    "config, train, validation, words",
    [
        ("classify", "jsonl:unknown.jsonl", "", ["unknown.jsonl", "without a label", "unknown.jsonl:2"]),
        ("classify", "", "jsonl:unknown.jsonl", ["unknown label", "unknown.jsonl:1 'bird'"]),
        ("classify", "jsonl:one.jsonl", "", ["every example has the label 'cat'", "one.jsonl:1"]),
        ("classify", "jsonl:long.jsonl", "", ["longer than 32 tokens, refused", "long.jsonl:1"]),
        (
            "translate",
            "jsonl:empty.jsonl",
            "jsonl:empty.jsonl",
            ["empty 'source'", "empty.jsonl:1", "empty 'target'", "empty.jsonl:2"],
        ),
        ("translate", "pairs:three,two", "", ["three", "two", "3", "2"]),
        ("tag", "conll:bad.conll", "", ["bad.conll:2"]),
    ],
)
def test_bad_data_is_named_with_its_line(config, train, validation, words, topics, tmp_path):
    for name, records in WRONG.items():
        write(tmp_path / name, records)
    (tmp_path / "three").write_text("a\nb\nc\n")
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "bad.conll").write_text("word B-X\nbroken\n\n")
    place = lambda source, other: (
        re.sub(  # noqa: E731
            "(?<=[:,])", f"{tmp_path}/", source
        )
        if source
        else other
    )
    done = finetune(
        config, tmp_path / "run", place(train, topics[0]), place(validation, topics[1]), "--config.task.truncate=false"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_what_is_cut_is_counted_and_classes_weigh(topics, tmp_path):
    data = write(
        tmp_path / "long.jsonl",
        [
            {"text": f"{word} {i} " * n, "label": word}
            for i, (word, n) in enumerate([("cat", 20), ("dog", 1), ("dog", 2)] * 4)
        ],
    )
    done = finetune(
        "classify",
        tmp_path / "run",
        data,
        topics[1],
        "--config.train.steps=3",
        "--config.model.architecture=decoder",
        "--config.task.class_weights=balanced",
    )
    assert done.returncode == 0, done.stderr
    assert "texts longer than 32 tokens, cut: 4" in done.stdout
    assert "class weights: cat 1.5, dog 0.75" in done.stdout
    done = run("convert", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'theirs'}")
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert theirs["id2label"] == {"0": "cat", "1": "dog"}


def test_adalora_ends_with_its_budget_by_a_chosen_metric(topics, tmp_path):
    flags = [
        "--config.train.steps=24",
        "--config.train.evaluate_every=6",
        "--config.peft.rank=3",
        "--config.peft.target_rank=2",
        "--config.peft.warmup_steps=2",
        "--config.peft.final_steps=10",
        "--config.peft.kind=adalora",
        "--config.peft.trained=adapters,head",
        "--config.train.metric=accuracy",
    ]
    run = tmp_path / "run"
    done = finetune("classify", run, *topics, *flags)
    assert done.returncode == 0, done.stderr
    assert "before step 14 there are more ranks than the target" in done.stderr
    result = json.loads((run / "result.json").read_text())
    seen = {r["step"]: r for line in (run / "metrics.jsonl").open() if "accuracy" in (r := json.loads(line))}
    assert seen.keys() == {6, 12, 18, 24} and result["step"] in (18, 24)
    best = max(seen[18]["accuracy"], seen[24]["accuracy"])
    assert result["accuracy"] == best == seen[result["step"]]["accuracy"]
    from nanoflax import runs

    params, meta = runs.restore_params(run / "checkpoints", which="best")
    assert meta["tracking"]["best"] == -best
    masks = [x for path, x in flatten_dict(params).items() if path[-1] == "lora_mask"]
    assert sum(float(x.sum()) for x in masks) == 2 * len(masks) == 14
    from nanoflax import runs

    _, merged, _ = runs.open_model(str(run / "final"))
    assert not any("lora" in path[-1] for path in flatten_dict(merged))
    other = finetune("classify", run, *topics, *flags[:-1])
    assert other.returncode == 2
    assert "train.metric: 'accuracy' -> 'validation_loss'" in other.stderr


def test_targets_are_learnt_from_sources_and_written_by_sample(tmp_path):
    pairs = [{"source": a + b, "target": b + a} for a in "abcdefgh" for b in "abcdefgh"]
    train, dev = write(tmp_path / "train", pairs), write(tmp_path / "dev", pairs[::4])
    done = finetune(
        "translate",
        tmp_path / "run",
        train,
        dev,
        "--config.model.dim=64",
        "--config.train.steps=150",
        "--config.train.evaluate_every=150",
        "--config.train.batch_size=32",
        "--config.optim.learning_rate=0.005",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exact_match"] > 0.9
    said = run("sample", f"--workdir={tmp_path / 'run' / 'final'}", "--prompt=ce", "--temperature=0")
    assert said.stdout == "ec\n", said.stderr
    assert run("sample", f"--workdir={tmp_path / 'run'}", "--prompt=ce").stdout == "ec\n"
    new = write(tmp_path / "new", [{"source": "ab", "target": "ba"}, {"source": "ah", "target": "x"}])
    found = run("evaluate", f"--workdir={tmp_path / 'run'}", f"--data={new}", f"--out={tmp_path / 'said.jsonl'}")
    assert json.loads(found.stdout)["exact_match"] == 0.5, found.stderr
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").open()]
    assert [s["prediction"] for s in said] == ["ba", "ha"]
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"prompt": "ab", "candidates": ["ab", "ba", "ca"], "answer": "ba"}) + "\n"
    )
    ranked = json.loads(run("evaluate", f"--workdir={tmp_path / 'run'}", f"--candidates={tmp_path / 'c.jsonl'}").stdout)
    assert ranked["accuracy"] == ranked["mean_reciprocal_rank"] == 1
    best = ranked["rankings"][0]["candidates"][0]
    assert best["text"] == "ba" and best["tokens"] == 3 and -0.7 < best["log_likelihood"] < 0


def test_words_are_tagged_messages_answered_and_an_unfinished_adapter_is_opened(tmp_path):
    records = [
        {"tokens": [a, "in", b], "tags": ["O", "O", f"B-{b[0]}"]}
        for a in ("x", "yy", "z")
        for b in ("Paris", "Rome", "Riga")
    ]
    data = write(tmp_path / "tags", records)
    done = finetune("tag", tmp_path / "tag", data, data, "--config.train.steps=60", "--config.train.evaluate_every=60")
    assert done.returncode == 0, done.stderr
    said = run("sample", f"--workdir={tmp_path / 'tag'}", "--prompt=yy in Rome")
    assert said.stdout == "yy\tO\nin\tO\nRome\tB-R\n", said.stderr
    chats = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a + a}]} for a in "abc"]
    data, flags = (
        write(tmp_path / "chats", chats),
        [
            "--config.task.kind=instruct",
            "--config.model.architecture=decoder",
            "--config.model.head=lm",
            "--config.train.evaluate_every=50",
            "--config.model.context=64",
        ],
    )
    done = finetune("classify", tmp_path / "chat", data, data, *flags, "--config.train.steps=100")
    assert done.returncode == 0, done.stderr
    said = run("sample", f"--workdir={tmp_path / 'chat'}", "--prompt=b", "--temperature=0")
    assert said.stdout == "bb\n", said.stderr
    # Until final/ is there, the frozen parameters are taken from the source again.
    done = finetune(
        "classify",
        tmp_path / "lora",
        data,
        data,
        *flags,
        "--config.train.steps=5",
        "--config.peft.kind=lora",
        f"--config.model.init_from={tmp_path / 'chat'}",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "lora" / "result.json").read_text())
    (tmp_path / "lora" / "final").rename(tmp_path / "elsewhere")
    found = run("evaluate", f"--workdir={tmp_path / 'lora'}")
    assert json.loads(found.stdout)["validation_loss"] == pytest.approx(result["validation_loss"], rel=1e-4), (
        found.stderr
    )


def test_the_lstm_takes_the_same_road(tmp_path):
    pairs = [{"source": a + b, "target": b} for a in "abcd" for b in "abcd"]
    data = write(tmp_path / "pairs", pairs)
    done = finetune(
        "translate",
        tmp_path / "run",
        data,
        data,
        "--config.model.architecture=lstm",
        "--config.train.steps=40",
        "--config.train.evaluate_every=20",
        "--config.task.beams=2",
    )
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line).get("validation_loss") for line in (tmp_path / "run" / "metrics.jsonl").open()]
    first, last = [loss for loss in losses if loss]
    assert last < first < 6  # log 260


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.task.kind=dance"], "task.kind='dance' is not one of classify"),
        (["--config.train.metric=f2"], "train.metric='f2' is not one of validation_loss, perplexity"),
        (
            ["--config.train.metric=bleu"],
            "train.metric='bleu' is not measured here; choose one of validation_loss, accuracy, macro_f1",
        ),
        (["--config.task.kind=translate"], "no object has source or target; their fields are text, label"),
        (["--config.model.init_from=nothing"], "nothing: neither a directory"),
        (["--config.task.length=64"], "task.length=64 must be at most the model's context of 32"),
        (
            ["--config.peft.kind=lora", "--config.peft.trained=head"],
            "peft.trained='head' does not include the adapters of peft.kind='lora'",
        ),
        (["--config.peft.kind=lora"], "peft.kind='lora' without model.init_from"),
        (["--config.data.packing=isolated"], "config.data.packing is a field of data.kind=text, not of examples"),
        (["--config.data.unicode=NFD"], "data.unicode='NFD' is not one of NFC"),
        (["--config.task.kind=translate", "--config.task.bleu_tokenize=mecab"], "is not one of 13a"),
    ],
)
def test_misuse_gets_one_line_and_status_2(flags, words, topics, tmp_path):
    done = finetune("classify", tmp_path / "run", *topics, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_label_smoothing_of_several_labels_is_refused(tmp_path):
    data = write(tmp_path / "several.jsonl", [{"text": f"a {i}", "labels": ["cat", "dog"][: i % 3]} for i in range(8)])
    done = finetune(
        "classify", tmp_path / "run", data, data, "--config.train.label_smoothing=0.1", "--config.train.steps=4"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train.label_smoothing=0.1 does not work with several labels" in done.stderr


# Texts: language models, masks and noise.


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A JSONL file of texts with little in them, most longer than a row."""
    rng = random.Random(0)
    return write(
        tmp_path_factory.mktemp("texts") / "texts.jsonl",
        ({"text": " ".join(rng.choices(["abc", "bcd", "cde"], k=rng.randint(3, 30)))} for _ in range(120)),
    )


@pytest.fixture(scope="module")
def few(texts, tmp_path_factory):
    """The first three of them: what is written takes the time of a test."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    return write(path, map(json.loads, open(texts.removeprefix("jsonl:")).readlines()[:3]))


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def test_masked_tokens_are_guessed_and_the_encoder_is_gone_on_with(texts, topics, tmp_path):
    done = finetune(
        "masked_lm",
        tmp_path / "mlm",
        texts,
        texts,
        "--config.train.steps=150",
        "--config.train.evaluate_every=150",
        "--config.optim.name=muon",
    )
    assert done.returncode == 0, done.stderr
    assert "read in several rows" in done.stdout and "⟦" in done.stdout
    found = result(tmp_path / "mlm")
    assert found["masked_accuracy"] > 0.35  # always "c": 0.26
    lines = (tmp_path / "mlm" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) > 240 and all("⟦" in json.loads(x)["prediction"] for x in lines)
    again = run("evaluate", f"--workdir={tmp_path / 'mlm'}")
    assert json.loads(again.stdout)["masked_accuracy"] == pytest.approx(found["masked_accuracy"])
    said = run("sample", f"--workdir={tmp_path / 'mlm'}", "--prompt=abc bcd abc")
    assert "⟦" in said.stdout, said.stderr
    other = finetune(
        "classify",
        tmp_path / "classes",
        *topics,
        "--config.train.steps=5",
        "--config.train.evaluate_every=5",
        f"--config.model.init_from={tmp_path / 'mlm' / 'final'}",
    )
    assert other.returncode == 0, other.stderr
    assert "initialized randomly: labels, pooler\n" in other.stderr


@pytest.mark.parametrize(
    "noise, tokenizer, architecture, vocabulary",
    [("spans", "bpe:280", "encoder_decoder", 381), ("infilling", "bytes", "lstm", 260)],
)
def test_a_denoiser_is_what_translate_begins_from(noise, tokenizer, architecture, vocabulary, texts, few, tmp_path):
    options = [
        f"--config.data.tokenizer={tokenizer}",
        "--config.train.evaluate_every=4",
        f"--config.model.architecture={architecture}",
        "--config.train.evaluate_batches=1",
    ]
    done = finetune(
        "denoise", tmp_path / "noisy", texts, few, *options, "--config.train.steps=8", f"--config.task.noise={noise}"
    )
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "noisy")
    assert {"exact_match", "token_accuracy", "validation_loss"} < found.keys()
    first = json.loads((tmp_path / "noisy" / "predictions.jsonl").open().readline())
    assert ("<extra_id_0>" if noise == "spans" else "<mask>") in first["source"]
    same = run("evaluate", f"--workdir={tmp_path / 'noisy'}")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["token_accuracy"] == pytest.approx(found["token_accuracy"])
    said = run("sample", f"--workdir={tmp_path / 'noisy'}", "--prompt=abc bcd cde", env=fake(3))
    assert said.returncode == 0, said.stderr
    pairs = [{"source": a + b, "target": b} for a in "abcd" for b in "abcd"]
    data, final = write(tmp_path / "pairs", pairs), tmp_path / "noisy" / "final"
    tuned = finetune(
        "translate",
        tmp_path / "run",
        data,
        data,
        *options[:2],
        f"--config.model.init_from={final}",
        "--config.train.steps=4",
    )
    assert tuned.returncode == 0, tuned.stderr
    assert "initialized randomly" not in tuned.stderr and "not needed" not in tuned.stderr
    from nanoflax import runs

    models = [runs.open_model(str(path)) for path in (final, tmp_path / "run" / "final")]
    (a, params, own), (b, _, same) = models
    assert a.config.vocab_size == b.config.vocab_size == vocabulary == len(params["embed"]["embedding"])
    assert own.fingerprint == same.fingerprint


def test_a_vocabulary_grows_under_a_model_that_had_no_marks(texts, few, tmp_path):
    pairs = [{"source": "abc bcd " + a, "target": a} for a in "abcdefgh"]
    data = write(tmp_path / "pairs", pairs)
    options = [
        "--config.data.tokenizer=bpe:270",
        "--config.train.steps=2",
        "--config.train.evaluate_every=2",
        "--config.optim.warmup_steps=0",
        "--config.optim.learning_rate=0",
        "--config.optim.name=adamw",
    ]
    base = finetune("translate", tmp_path / "base", data, data, *options)
    assert base.returncode == 0, base.stderr
    done = finetune(
        "denoise", tmp_path / "noisy", texts, few, *options, f"--config.model.init_from={tmp_path / 'base' / 'final'}"
    )
    assert done.returncode == 0, done.stderr
    from nanoflax import runs

    old, new = (runs.open_model(str(tmp_path / name / "final"))[1]["embed"]["embedding"] for name in ("base", "noisy"))
    assert (len(old), len(new)) == (270, 371) and (old == new[:270]).all()


def test_an_autoencoder_learns_through_its_bottleneck(tmp_path):
    words = [{"text": a + b} for a in "abcdefgh" for b in "abcdefgh"]
    data = write(tmp_path / "words", words)
    done = finetune(
        "denoise",
        tmp_path / "run",
        data,
        data,
        "--config.task.noise=none",
        "--config.model.bottleneck=mean",
        "--config.model.dim=64",
        "--config.train.steps=150",
        "--config.train.evaluate_every=150",
        "--config.optim.name=muon",
        "--config.optim.learning_rate=0.005",
        "--config.optim.ema=0.9",
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["exact_match"] > 0.9
    said = run("sample", f"--workdir={tmp_path / 'run'}", "--prompt=ce")
    assert said.stdout == "ce\n", said.stderr
    pairs = write(tmp_path / "pairs", [{"source": a, "target": a} for a in "abcdefgh"])
    other = finetune(
        "translate",
        tmp_path / "other",
        pairs,
        pairs,
        "--config.train.steps=3",
        f"--config.model.init_from={tmp_path / 'run'}",
    )
    assert other.returncode == 0, other.stderr


@pytest.mark.parametrize("config", ["language_model", "instruct"])
def test_decoders_take_texts_and_chats(config, texts, tmp_path):
    chats = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c}]} for c in "abcd"]
    data = texts if config == "language_model" else write(tmp_path / "chats", chats)
    done = finetune(config, tmp_path / "run", data, data, "--config.train.steps=4", "--config.train.evaluate_every=4")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["perplexity"] < 300
    assert ("read in several rows" in done.stdout) == (config == "language_model")
