"""experiments.sweep as a person runs it: trials, a failure among them, and going on."""

import json
import pathlib
import subprocess
import sys

import pytest

from nanoflax import runs, storage
from nanoflax.runs import sweep as sweeps
from tests.system.finetune_test import TINY, topics  # noqa: F401
from tests.system.programs_test import ROOT, run


def sweep(workdir, data, *flags):
    train, dev = data
    return run(
        "sweep",
        "--config=classify",
        f"--workdir={workdir}",
        f"--config.data.train={train}",
        f"--config.data.validation={dev}",
        *TINY,
        "--config.train.steps=4",
        "--config.train.evaluate_every=4",
        *flags,
    )


def results(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").open()]


def test_a_grid_is_tried_whole_reported_and_not_run_again(topics, tmp_path):  # noqa: F811
    flags = ["--grid", "config.optim.weight_decay=0,0.5", "--grid", "config.model.heads=2,3"]
    done = sweep(tmp_path, topics, *flags)
    assert done.returncode == 1, done.stderr
    found = results(tmp_path)
    assert [tuple(r["values"].values()) for r in found] == [("0", "2"), ("0", "3"), ("0.5", "2"), ("0.5", "3")]
    assert [r["status"] for r in found] == ["finished", "failed"] * 2
    assert "model.heads=3 does not divide" in found[1]["error"]
    assert "trial 1 failed" in done.stderr and "trial 3 failed" in done.stderr
    for r in (found[0], found[2]):
        own = json.loads((tmp_path / f"trial-{r['trial']:03d}" / "result.json").read_text())
        assert own["validation_loss"] == r["validation_loss"]
        config = json.loads((tmp_path / f"trial-{r['trial']:03d}" / "config.json").read_text())
        assert config["optim"]["weight_decay"] == float(r["values"]["config.optim.weight_decay"])
    table = done.stdout[done.stdout.index("trial  config.optim") :].splitlines()
    best = min((r for r in found if r["status"] == "finished"), key=lambda r: r["validation_loss"])
    assert table[1].split() == [str(best["trial"]), *best["values"].values(), f"{best['validation_loss']:.4f}"]
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    # Again: what has ended well is left alone; what is broken goes on.
    (tmp_path / "trial-002" / "trial.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((tmp_path / "trial-002" / "trial.json").read_text()).items() if k != "result"}
        )
    )
    again = sweep(tmp_path, topics, *flags)
    assert again.returncode == 1 and results(tmp_path) == found
    assert "trial 1/4" not in again.stdout and "trial 3/4" in again.stdout
    assert "resuming at step 4" in (tmp_path / "trial-002" / "log.txt").read_text()
    other = sweep(tmp_path, topics, "--grid", "config.optim.weight_decay=0.1,0.2")
    assert other.returncode == 2 and "holds another sweep" in other.stderr


DRAWS = """
import json, sys
from nanoflax import runs
spaces = [("a", ("log", 1e-4, 1e-2)), ("b", ("int", 2, 4)), ("c", ("uniform", -1.0, 1.0)),
          ("d", ["x", "y"])]
json.dump([runs.draw_settings(spaces, 0, i) for i in [*range(400), 7]], sys.stdout)
"""


def test_random_draws_are_of_their_ranges_and_the_same_again():
    *drawn, again = json.loads(
        subprocess.run([sys.executable, "-c", DRAWS], cwd=ROOT, capture_output=True, check=True).stdout
    )
    assert drawn[7] == again != drawn[8]
    rates = sorted(float(v["a"]) for v in drawn)
    assert 1e-4 <= rates[0] and rates[-1] <= 1e-2 and 6e-4 < rates[200] < 1.6e-3
    assert {v["b"] for v in drawn} == {"2", "3", "4"} and {v["d"] for v in drawn} == {"x", "y"}
    thirds = [float(v["c"]) for v in drawn]
    assert abs(sum(thirds)) < 60 and min(thirds) >= -1 and max(thirds) <= 1


def test_optuna_draws_or_is_asked_for(topics, tmp_path):  # noqa: F811
    flags = ["--optuna", "--random", "config.optim.learning_rate=log:1e-4:1e-2", "--trials=2"]
    done = sweep(tmp_path, topics, *flags)
    try:
        import optuna  # noqa: F401
    except ImportError:
        assert done.returncode == 2 and "--optuna needs the package optuna" in done.stderr
        assert done.stderr.count("\n") == 1
        return
    assert done.returncode == 0, done.stderr
    rates = [float(r["values"]["config.optim.learning_rate"]) for r in results(tmp_path)]
    assert len({*rates}) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to try"),
        (["--grid", "config.optim.rate=1"], "is no field of the configuration"),
        (["--grid", "config.optim.learning_rate=1,a"], "'a' is no value of config.optim.learning_rate"),
        (["--random", "config.optim.b1=log:0:1", "--trials=1"], "above 0"),
        (["--random", "config.optim.b1=uniform:0.5", "--trials=1"], "uniform:LOW:HIGH"),
        (["--random", "config.optim.b1=uniform:0:1"], "--trials=0 must be at least 1"),
        (["--grid", "config.optim.b1=0", "--optuna"], "--optuna draws from --random"),
        (["--grid", "config.optim.b1=0", "--grid", "config.optim.b1=1"], "is given twice"),
        (["--grid", "config.optim.b1=0", "--program=pretrain"], "needs --config"),
    ],
)
def test_misuse_gets_one_line_and_status_2(flags, words, tmp_path):
    done = run("sweep", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def fake_trials(monkeypatch, outcomes):
    """Replace the programs of trials: each outcome is the exit status, or the text of result.json or metrics.jsonl."""
    ran = []

    def run_program(program, arguments, log):
        outcome = outcomes[len(ran)]
        ran.append(arguments)
        if isinstance(outcome, int):
            return outcome, "the last line"
        name, text = outcome
        pathlib.Path(log).with_name(name).write_text(text)
        return 0, ""

    monkeypatch.setattr(sweeps, "run_program", run_program)
    return ran


def test_a_diverged_trial_neither_ends_a_sweep_nor_wins_it(tmp_path, monkeypatch, capsys):
    outcomes = [
        ("result.json", '{"validation_loss": "nan", "step": 1}'),
        ("metrics.jsonl", "".join(f'{{"step": {i}, "validation_loss": {x}}}\n' for i, x in enumerate(['"nan"', 2, 3]))),
        -9,
        2,
        ("result.json", '{"validation_loss": "inf"}'),
        ("result.json", '{"validation_loss": 1.5}'),
        ("metrics.jsonl", '{"step": 1, "validation_loss": "nan"}\n'),
        ("result.json", '{"validation_loss": "-inf"}'),
    ]
    ran = fake_trials(monkeypatch, outcomes)
    sweep = runs.Sweep(str(tmp_path), "program", [], "validation_loss", ["a"])

    def everything():
        return [sweep.trial(i, "trial", {"a": str(i)}, lambda i=i: {"a": str(i)}) for i in range(8)]

    found = everything()
    assert [r["trial"] for r in found if r["status"] == "finished"] == [1, 5]
    assert (found[1]["validation_loss"], found[5]["validation_loss"]) == (2, 1.5)
    assert "validation_loss is nan: the training diverged" in found[0]["error"] and "SIGKILL" in found[2]["error"]
    runs.write_jsonl(tmp_path / "results.jsonl", found)
    for file in (tmp_path / "results.jsonl", *tmp_path.glob("*/trial.json")):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=lambda name: pytest.fail(f"{file}: {name} is no JSON"))
    capsys.readouterr()
    assert sweep.summarise(found) == 6
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]][:2] == ["5", "1"]
    # Again: only the programs that broke run again; a trial that diverged is known.
    outcomes += [("result.json", '{"validation_loss": 1}')] * 2
    again = everything()
    assert len(ran) == 10 and [r["status"] for r in again].count("finished") == 4
    pytest.importorskip("optuna")
    spaces = [("a", ("int", 0, 9))]
    assert runs.suggest_settings(spaces, 0, 8, again, "validation_loss")


def test_a_trial_of_a_killed_sweep_that_takes_its_lock_late_is_waited_for(tmp_path, monkeypatch):
    calls, busy = [], f"pretrain.py: workdir x {storage.IN_USE} process 1 on host: wait for it"

    def run_program(program, arguments, log):
        calls.append(program)
        if len(calls) == 1:
            return 2, busy
        pathlib.Path(tmp_path, "trial-000", "result.json").write_text('{"loss": 1}')
        return 0, ""

    monkeypatch.setattr(sweeps, "run_program", run_program)
    sweep = sweeps.Sweep(str(tmp_path), "program", [], "loss", [])
    assert sweep.trial(0, "trial 0", {}, dict)["loss"] == 1 and len(calls) == 2
