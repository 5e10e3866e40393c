"""The programs as a person runs them: train, stop, resume, sample, evaluate, and misuse."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from experiments.flags import _FieldParser, leaves
from nanoflax import config as configs
from nanoflax import kernels, parallel, runs
from nanoflax.errors import UserError
from nanoflax.runs import directory, trainer, vocabulary
from nanoflax.tokenizers import ByteTokenizer, StreamingDecoder
from tests import kills, processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
    "--config.model.layers=1",
    "--config.model.dim=32",
    "--config.model.heads=2",
    "--config.model.context=32",
    "--config.data.tokenizer=bytes",
    "--config.optim.warmup_steps=2",
    "--config.train.batch_size=4",
    "--config.train.sample_tokens=8",
    "--config.train.evaluate_every=10",
    "--config.train.checkpoint_every=10",
]


def run(program, *flags, fresh=False, **options):
    """Run a program to its end, as a fork of a running Python, or in a fresh interpreter as a person does."""
    arguments = ["-m", f"experiments.{program}", *map(str, flags)]
    if not fresh:
        return processes.run(arguments, **options)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


def fake(devices):
    """The environment of a program that finds so many fake devices."""
    return processes.quick(devices)


def pretrain(workdir, corpus, *flags, **options):
    return run(
        "pretrain",
        f"--workdir={workdir}",
        f"--config.data.train=text:{corpus}/*.txt",
        f"--config.data.cache={corpus}/cache",
        *SMALL,
        *flags,
        **options,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    import random

    directory = tmp_path_factory.mktemp("corpus")
    kills.write_corpus(directory, random.Random(0))
    return directory


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    done = pretrain(workdir, corpus, "--config.train.steps=20", fresh=True)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_everything_it_promises(trained):
    workdir, done = trained
    assert {"config.json", "tokenizer", "metrics.jsonl", "checkpoints", "tensorboard", "loss.png"} <= set(
        os.listdir(workdir)
    )
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    evaluations = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in evaluations] == [10, 20]
    assert evaluations[1]["validation_loss"] < evaluations[0]["validation_loss"] < 5.6
    assert "FLOPs per trained token" in done.stdout and "step 20/20" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_command_again_is_complete_and_a_changed_one_is_refused(trained, corpus):
    workdir, _ = trained
    again = pretrain(workdir, corpus, "--config.train.steps=20")
    assert again.returncode == 0 and "the run is complete: 20 steps" in again.stdout
    changed = pretrain(workdir, corpus, "--config.train.steps=20", "--config.optim.b1=0.5")
    assert changed.returncode == 2 and "optim.b1: 0.9 -> 0.5" in changed.stderr
    assert changed.stderr.count("\n") == 1


def test_a_new_run_from_the_weights_keeps_the_old_one(corpus, tmp_path):
    assert pretrain(tmp_path / "w", corpus, "--config.train.steps=10").returncode == 0
    new = pretrain(tmp_path / "w", corpus, "--config.train.steps=10", "--config.optim.b1=0.5", "--restart_from_weights")
    assert new.returncode == 0, new.stderr
    old = tmp_path / "w" / "previous-1"
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines() if '"loss"' in line]
        for path in (old / "metrics.jsonl", tmp_path / "w" / "metrics.jsonl")
    ]
    assert losses[1][0] < losses[0][0] - 0.3
    again = pretrain(
        tmp_path / "w", corpus, "--config.train.steps=10", "--config.optim.b1=0.5", "--restart_from_weights"
    )  # goes on with what it began
    assert again.returncode == 0 and "the run is complete: 10 steps" in again.stdout
    for home, changed, words in (("w", ["--config.model.dim=16"], "does not fit: "), ("elsewhere", [], "holds no run")):
        refused = pretrain(tmp_path / home, corpus, "--restart_from_weights", *changed)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
        assert not (tmp_path / "w" / "previous-2").exists()


def test_a_restart_that_is_refused_changes_nothing(corpus, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "w")
    (tmp_path / "blank.txt").write_text(" \n")
    before = sorted(os.listdir(tmp_path / "w"))
    for changed, words in (
        ([f"--config.data.train=text:{tmp_path}/blank.txt"], "has no text"),
        (["--config.data.tokenizer=bpe:300"], "keeps the tokenizer"),
    ):
        refused = pretrain(tmp_path / "w", corpus, "--restart_from_weights", *changed)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
        assert sorted(os.listdir(tmp_path / "w")) == before


def test_a_restart_may_be_killed_anywhere(tmp_path, monkeypatch):
    """archive_run is cut off before each of its renames, and after the last; then it is gone on with."""
    config = configs.Config()
    other = dataclasses.replace(config, train=configs.TrainConfig(steps=7))
    rename, killed, cut = os.rename, 0, 0
    while killed == cut:
        workdir = tmp_path / str(cut)
        (workdir / "checkpoints" / "5").mkdir(parents=True)
        (workdir / "tokenizer").mkdir()
        (workdir / "config.json").write_text(json.dumps(configs.to_dict(config)))
        done = itertools.count()

        def until(a, b):
            if next(done) == cut:
                raise KeyboardInterrupt
            rename(a, b)

        assert directory.check_workdir(str(workdir), other, True)[1] == str(workdir)
        monkeypatch.setattr(os, "rename", until)
        try:
            directory.archive_run(str(workdir))
        except KeyboardInterrupt:
            killed += 1
        monkeypatch.setattr(os, "rename", rename)
        (workdir / "previous-1").rename(workdir / "previous-4")  # the others were removed
        if cut == 0:  # the old run goes on
            assert directory.check_workdir(str(workdir), config) == (config, None)
        else:
            with pytest.raises(UserError, match="start it again with --restart_from_weights"):
                directory.check_workdir(str(workdir), other)
            saved, weights = directory.check_workdir(str(workdir), other, True)
            assert saved == config and weights == str(workdir / "previous-4")
            assert sorted(os.listdir(weights)) == ["checkpoints", "config.json", "tokenizer"]
            assert directory.archive_run(str(workdir)) == weights
            (workdir / "checkpoints" / "0").mkdir(parents=True)
            (workdir / "config.json").write_text("new")
            assert directory.archive_run(str(workdir)) == str(workdir / "previous-5")
            assert (workdir / "previous-5" / "config.json").read_text() == "new"
        cut += 1
    assert cut == 4


def test_a_tokenizer_without_a_run_is_not_trusted(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("")
    found = vocabulary.get_tokenizer(configs.TextData(tokenizer="bytes"), str(tmp_path), list)
    assert found.decode(found.encode("é")) == "é"
    directory.write_run(str(tmp_path), configs.Config(), found)
    again = vocabulary.get_tokenizer(configs.TextData(tokenizer="bpe:300"), str(tmp_path), list)
    assert again.fingerprint == found.fingerprint


def test_the_flag_quantize_offers_what_can_be_packed():
    assert {*configs.QUANTIZE} == {"", *kernels.WEIGHT_KINDS, "file"}


def test_wandb_that_is_not_there_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = configs.Config(train=configs.TrainConfig(wandb="project"))
    with pytest.raises(UserError, match=r"train.wandb=project needs .* nanoflax\[wandb\]"):
        trainer.check_wandb(config)
    trainer.check_wandb(configs.Config())


def test_a_disk_without_room_is_one_line(tmp_path):
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"ulimit -f 0; exec {sys.executable} -m experiments.pretrain "
            f"--workdir={tmp_path / 'w'} --config.data.cache={tmp_path / 'c'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr


def test_evaluate_reads_all_whatever_the_run_measured(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    config["train"]["evaluate_batches"] = 1
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    found = [
        run("evaluate", f"--workdir={w}", env=fake(devices)) for w, devices in ((trained[0], 1), (tmp_path / "w", 3))
    ]
    whole, limited = (json.loads(done.stdout) for done in found)
    assert whole["tokens"] == limited["tokens"]
    for name in ("loss", "bits_per_byte"):
        assert limited[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(number, corpus, tmp_path):
    flags = [
        f"--workdir={tmp_path / 'w'}",
        f"--config.data.train=text:{corpus}/*.txt",
        f"--config.data.cache={corpus}/cache",
        *SMALL,
        "--config.train.steps=3000",
        "--config.train.checkpoint_every=100000",
        "--config.train.evaluate_every=100000",
    ]
    process = processes.start(["-m", "experiments.pretrain", *flags])
    metrics = tmp_path / "w" / "metrics.jsonl"
    while kills.count_lines(metrics) < 5 and process.poll() is None:
        time.sleep(0.02)
    second = run("pretrain", *flags)
    assert second.returncode == 2 and str(process.pid) in second.stderr  # the workdir is in use
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    saved = int(re.search(r"saved at step (\d+)", out)[1])
    assert saved == kills.count_lines(metrics)
    from nanoflax.runs import checkpoint

    assert checkpoint.read_metadata(tmp_path / "w" / "checkpoints")["position"] == saved * 4


def test_three_random_kills_change_no_bit():
    done, difference, left = kills.main(kills=3, steps=80, seed=1, log=lambda _: None)
    assert done == 3 and difference is None and not left


def test_of_several_processes_only_the_first_writes(tmp_path, monkeypatch, capsys):
    import jax

    config = configs.Config(train=configs.TrainConfig(steps=1))
    for index, files in ((1, set()), (0, {"metrics.jsonl", "tensorboard"})):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        with trainer.displays(tmp_path, config, 0, 10.0) as (log, progress):
            progress.update(1, 5.0)  # all that train.fit does with them
            log.log(1, loss=5.0, tokens_per_second=progress.tokens_per_second or 0)
            with progress.pause():
                progress.write("a sample")
        assert set(os.listdir(tmp_path)) == files and parallel.is_main_process() == (index == 0)
        assert bool(capsys.readouterr().err) == (index == 0)


def test_evaluate_prints_json(trained, corpus, tmp_path):
    workdir, _ = trained
    own = json.loads(run("evaluate", f"--workdir={workdir}", fresh=True).stdout)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = min(r["validation_loss"] for r in records if "validation_loss" in r)
    assert own["loss"] == pytest.approx(best, rel=1e-6)
    (tmp_path / "a.txt").write_bytes(b"the model reads\xff")
    other = json.loads(run("evaluate", f"--workdir={workdir}", f"--data=text:{tmp_path}/a.txt").stdout)
    assert other["tokens"] == 19 and "invalid UTF-8" in other["report"][0]


def test_candidates_are_ranked_and_bad_lines_named(trained, tmp_path):
    workdir, _ = trained
    questions = [
        {"prompt": "the model", "candidates": [" reads", " qqqqq"], "answer": " reads"},
        {"prompt": "the", "candidates": [" xx", " a", " model"], "answer": 2},
        {"prompt": "a", "candidates": ["\u00e9"]},
    ]
    path, out = tmp_path / "c.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    flags = [f"--workdir={workdir}", f"--candidates={path}"]
    both = [json.loads(run("evaluate", *flags, *more).stdout) for more in ([], [f"--out={out}"])]
    rankings = [json.loads(line) for line in out.open()]
    assert both[0] == both[1] | {"rankings": rankings} and both[0]["answers"] == 2
    assert both[0]["mean_reciprocal_rank"] == sum(1 / r["rank"] for r in rankings[:2]) / 2
    assert both[0]["accuracy"] == sum(r["rank"] == 1 for r in rankings[:2]) / 2
    for ranking, q in zip(rankings, questions, strict=True):
        rows = ranking["candidates"]
        assert sorted(r["text"] for r in rows) == sorted(q["candidates"])
        totals = [r["log_likelihood"] for r in rows]
        assert totals == sorted(totals, reverse=True) and max(totals) < 0
        assert all(
            r["per_token"] * r["tokens"]
            == pytest.approx(r["log_likelihood"])
            == r["per_byte"] * len(r["text"].encode())
            for r in rows
        )
    path.write_text('{"prompt": "a", "candidates": ["b"], "answer": 1}\n{"prompt": "a"}\n[')
    done = run("evaluate", *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for words in ("c.jsonl:1 has the answer 1", "c.jsonl:2 must have", "c.jsonl:3 is not JSON"):
        assert words in done.stderr


def test_sample_continues_prompts_stops_and_talks(trained, tmp_path):
    workdir, _ = trained
    flags = [f"--workdir={workdir}", "--max_new_tokens=12", "--temperature=0"]
    one = run("sample", *flags, "--prompt=the")
    assert one.returncode == 0 and one.stdout.startswith("the")
    (tmp_path / "p.txt").write_text("the\na model\n")
    many = run("sample", *flags, f"--prompt_file={tmp_path / 'p.txt'}")
    assert many.stdout.startswith("--- 1\nthe") and "--- 2\na model" in many.stdout
    assert one.stdout.strip() == many.stdout.split("---")[1].removeprefix(" 1\n").strip()
    talk = run("sample", *flags, "--interactive", input="the\n\n", fresh=True)
    assert talk.returncode == 0 and one.stdout.strip() in talk.stdout
    assert run("sample", *flags).returncode == 0  # begins a document
    long = run("sample", f"--workdir={workdir}", "--prompt=" + "x" * 40)
    assert long.returncode == 2 and "context of 32" in long.stderr


def test_a_wrong_tokenizer_is_refused(trained, tmp_path):
    import shutil

    workdir, _ = trained
    shutil.copytree(workdir, tmp_path / "w")
    from nanoflax import tokenizers

    shutil.rmtree(tmp_path / "w" / "tokenizer")
    tokenizers.train_sentencepiece(["one two three four five six"] * 50, 280).save(tmp_path / "w" / "tokenizer")
    for program in ("sample", "evaluate"):
        done = run(program, f"--workdir={tmp_path / 'w'}")
        assert done.returncode == 2 and "tokenizer" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("pretrain", ["--config.model.dmi=3"], "config.model.dim"),
        ("pretrain", ["--config.model.dim=wide"], "an integer"),
        ("pretrain", ["--config=nowhere"], "pydocs_tiny"),
        ("pretrain", ["--config="], "pydocs_tiny"),
        ("pretrain", ["--config=experiments"], "pydocs_tiny"),
        ("pretrain", ["--config=README.md"], "a Python file"),
        ("pretrain", [f"--config.train.seed={10**20}"], "train.seed"),
        ("pretrain", ["--config.model.heads=3"], "model.heads=3"),
        ("pretrain", ["--config.train.batch_size=10", "--config.train.accumulate=4"], "accumulate"),
        ("pretrain", ["--config.data.train=text:nothing/*.txt"], "nothing/*.txt"),
        ("pretrain", ["--config.data.train=books"], "pydocs, text:GLOB, hub:OWNER"),
        ("pretrain", ["--config.data.tokenizer=words"], "words"),
        ("pretrain", ["--config.train.mesh=3,1,1"], "train.mesh"),
        ("pretrain", ["--config.train.batch_size=2", "--config.train.mesh=2,1,1"], "train.mesh"),
        ("pretrain", ["--config.model.vocab_size=100", "--config.data.tokenizer=bytes"], "vocab_size"),
        ("pretrain", ["again"], "again"),
        ("pretrain", ["--workdir=/dev/null/x"], "/dev/null/x"),
        ("sample", [], "workdir"),
        ("sample", ["--workdir=nowhere"], "nowhere"),
        ("sample", ["--workdir=nowhere", f"--seed={10**20}"], "--seed"),
        ("evaluate", ["--workdir=nowhere"], "nowhere"),
        ("evaluate", [], "either --workdir"),
        (
            "pretrain",
            ["--config.model.init_from=gpt2", "--config.peft.kind=lora"],
            "peft.kind='lora': pretrain trains a decoder on text",
        ),
        ("pretrain", ["--config.model.architecture=lstm"], "model.architecture='lstm': pretrain"),
        ("pretrain", ["--config=pydocs_tiny", "--config=nowhere"], "--config=nowhere does not exist"),
        ("evaluate", ["--model=x"], "--model needs --candidates"),
        ("evaluate", ["--workdir=x", "--split=train"], "--split=train needs --data"),
        ("evaluate", ["--model=x", "--tasks=a", "--stride=4"], "--stride=4 measures text"),
        ("evaluate", ["--workdir=x", "--tasks="], "--tasks= is empty"),
        ("evaluate", ["--workdir=x", "--data="], "--data= is empty"),
        ("evaluate", ["--model=x", "--candidates=a", "--cache_dtype=int8"], "--cache_dtype=int8 has no effect"),
        ("sample", ["--workdir=x", "--stop="], "--stop has an empty text"),
        ("sample", ["--workdir=x", "--json_schema=/nonexist"], "--json_schema=/nonexist: no such file"),
        ("sample", ["--workdir=x", "--grammar=nonexist"], "--grammar=nonexist: no such file"),
        ("sample", ["--workdir=x", "--json_schema=README.md"], "--json_schema=README.md is not JSON"),
        (
            "evaluate",
            ["--model=x", "--data=text:a.txt", "--num_fewshot=3"],
            "--num_fewshot=3 is only read with --tasks",
        ),
        ("evaluate", ["--workdir=x", "--candidates=a.jsonl", "--reward=length"], "--reward=length is not read with"),
        ("sample", ["--workdir=x", "--interactive", "--prompt=a"], "give one of --chat"),
        ("evaluate", ["--model=x", "--candidates=nowhere.jsonl"], "nowhere.jsonl"),
        ("benchmark", ["race"], "packing, serve, where, speculate, tokenize or all"),
        ("benchmark", ["encode", "--no_bias"], "--no_bias is for train"),
        ("benchmark", ["decode", "--slots=2"], "--slots is for serve, not decode"),
        ("benchmark", ["speculate", "--batch_size=8"], "--batch_size is for train and decode"),
    ],
)
def test_misuse_gets_one_line_and_status_2(program, flags, words, tmp_path):
    if program == "pretrain" and not any("workdir" in f for f in flags):
        flags = [f"--workdir={tmp_path / 'w'}", *flags]
    done = run(program, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"model": ', "Expecting value"),
        ("[1]", "must hold a"),
        ('{"model": {"dim": "64"}}', "config.model.dim='64' must be an integer"),
        (None, "is not a file"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.mkdir() if text is None else path.write_text(text)
    check_workdir = lambda workdir: directory.check_workdir(workdir, configs.Config())  # noqa: E731
    for read in (runs.read_run, check_workdir):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert str(path) in str(caught.value) and words in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Inner:
    blocks: tuple[int, ...] = (1,)
    scales: tuple[float, ...] | None = None
    layers: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    name: str = "x"


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("--c.inner.blocks=0,2,4", "inner.blocks", (0, 2, 4)),
        ("--c.inner.blocks=7", "inner.blocks", (7,)),
        ("--c.inner.blocks=", "inner.blocks", ()),
        ("--c.name=y", "inner.blocks", (1,)),
        ("--c.inner.scales=1,0.5", "inner.scales", (1.0, 0.5)),
        ("--c.inner.scales=none", "inner.scales", None),
        ("--c.name=0,2", "name", "0,2"),
        ("--c.inner.blocks=0,,2", "inner.blocks", "must be a list, each an integer"),
        ("--c.inner.blocks=0,1.5", "inner.blocks", "must be a list, each an integer"),
        ("--c.inner.scales=a", "inner.scales", "must be a list, each a number or none"),
    ],
)
def test_tuples_are_flags(text, field, value):
    values = flags.FlagValues()
    for name, kind, default, _ in leaves(Outer(), "c"):
        flags.DEFINE(_FieldParser(kind), name, default, "", flag_values=values)
    if isinstance(value, str) and field != "name":
        with pytest.raises(flags.IllegalFlagValueError, match=value):
            values(["program", text])
        return
    values(["program", text])
    assert values[f"c.{field}"].value == value


def test_import_is_quick_and_pulls_in_no_other_framework():
    code = (
        "import sys, time; t = time.time(); import nanoflax; t = time.time() - t;"
        "nanoflax.build, nanoflax.init, nanoflax.sample;"
        "assert t < 1.5, t; assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "text, stops, ended, expected",
    [
        ("one two", ["two"], False, ("one ", True)),
        ("one tw", ["two"], False, ("one ", False)),
        ("one tw", ["two"], True, ("one tw", False)),
        ("caf\ufffd", [], False, ("caf", False)),
        ("a b c", ["c", "b"], False, ("a ", True)),
    ],
)
def test_visible_text_never_has_to_be_taken_back(text, stops, ended, expected):
    decoder = StreamingDecoder(ByteTokenizer(), stops=stops)
    ids = ByteTokenizer().encode(text.replace("\ufffd", "")) + [0xC3] * text.endswith("\ufffd")
    pieces = "".join(decoder.add([i]) for i in ids) + (decoder.finish() if ended else "")
    assert (pieces, decoder.stopped) == expected
