"""profile=FROM:TO: which steps are in the trace, its files, and how it ends."""

import gzip
import json
import os
import random
import signal

import jax
import jax.numpy as jnp
import pytest

import nanoflax
from nanoflax.config import Config, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs.profile import MAX_STEPS, parse_profile, traced
from tests import kills


def steps_in(path):
    """The numbers of the steps in a trace for Perfetto."""
    with gzip.open(path) as file:
        events = json.load(file, parse_constant=pytest.fail)["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train_step")


def newest_trace(workdir):
    return max(workdir.glob("profile/plugins/profile/*/perfetto_trace.json.gz"), key=os.path.getmtime)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    kills.write_corpus(directory, random.Random(0))
    return Config(
        model=ModelConfig(layers=1, dim=16, heads=2, context=16),
        data=TextData(train=f"text:{directory}/*.txt", cache=f"{directory}/cache", tokenizer="bytes", workers=1),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=9, batch_size=4, evaluate_batches=1, sample_tokens=0, tensorboard=False),
    )


@pytest.mark.parametrize("text", ["3", "3:2", "0:2", "1:10", "a:b", "1:2:3", "-1:2", " 1:2", "1:" + "9" * 30])
def test_other_profiles_are_refused_before_anything_is_done(text, config, tmp_path):
    with pytest.raises(UserError, match="--profile=.*FROM:TO.*train.steps=9"):
        nanoflax.pretrain(config, str(tmp_path / "run"), profile=text)
    assert not (tmp_path / "run").exists()


def test_a_profile_has_a_limit_and_may_be_absent():
    config = Config(train=TrainConfig(steps=1000))
    assert parse_profile(f"1:{MAX_STEPS}", config) == (1, MAX_STEPS)
    assert parse_profile("", config) is parse_profile(None, config) is None
    with pytest.raises(UserError, match="at most"):
        parse_profile(f"1:{MAX_STEPS + 1}", config)


def test_sigterm_ends_the_trace_and_the_resumed_run_traces_the_rest(config, tmp_path, monkeypatch, capsys):
    start = jax.profiler.start_trace

    def start_and_signal(*arguments, **named):
        start(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(jax.profiler, "start_trace", start_and_signal)
    run = nanoflax.pretrain(config, str(tmp_path), profile="3:6")
    assert run.signal == signal.SIGTERM and steps_in(newest_trace(tmp_path)) == [3]
    captured = capsys.readouterr()
    assert f"trace of steps 3 to 3: open {newest_trace(tmp_path)}" in captured.out + captured.err
    monkeypatch.setattr(jax.profiler, "start_trace", start)
    run = nanoflax.pretrain(config, str(tmp_path), profile="3:6")
    assert run.reason == "finished" and steps_in(newest_trace(tmp_path)) == [4, 5, 6]
    (xplane,) = newest_trace(tmp_path).parent.glob("*.xplane.pb")  # for TensorBoard
    assert xplane.stat().st_size
    assert nanoflax.pretrain(config, str(tmp_path), profile="3:6").reason == "finished"
    assert "--profile=3:6: nothing is traced, because the run is at step 9 already" in capsys.readouterr().out


def test_without_a_profile_the_step_is_the_compiled_step_itself(tmp_path):
    step, lines = jax.jit(lambda state, batch: (state + batch, {})), []
    with traced(step, None, 0, str(tmp_path), lines.append) as run:
        assert run is step and not lines
    with traced(step, (2, 3), 3, str(tmp_path), lines.append) as run:
        assert run is step and "step 3 already" in lines.pop()
    assert not os.listdir(tmp_path)


def test_an_error_in_a_step_ends_the_trace(tmp_path):
    lines = []

    def step(state, batch):
        raise ValueError("a bad step")

    for _ in range(2):  # the profiler can be started again
        with pytest.raises(ValueError, match="bad step"), traced(step, (1, 3), 0, str(tmp_path), lines.append) as run:
            run(jnp.zeros(2), jnp.ones(2))
    assert [line.split(":")[0] for line in lines] == ["trace of steps 1 to 1"] * 2


def test_a_trace_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    step, lines, stop = jax.jit(lambda state, batch: (state + batch, {})), [], jax.profiler.stop_trace

    def full():
        stop()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    state = jnp.zeros(2)
    with traced(step, (1, 1), 0, str(tmp_path), lines.append) as run:
        for _ in range(3):
            state, _ = run(state, jnp.ones(2))
    assert state.tolist() == [3, 3] and "cannot be written" in lines[0] and len(lines) == 1
