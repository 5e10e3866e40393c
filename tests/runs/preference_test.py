"""Runs on preferences: the reference, its file, resuming to the bit, meshes, and reward models in use."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import alignment, hf, nn, parallel, peft, runs, tasks, tokenizers
from nanoflax.config import Config, ExampleData, LoRA, ModelConfig, OptimConfig, Prefer, RewardModel, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import reference
from tests import processes

BYTES = tokenizers.ByteTokenizer()
SIZES = dict(
    vocab_size=BYTES.vocab_size, context=32, layers=1, dim=32, heads=2, norm="rmsnorm", positions="rotary", bias=False,
    gated=True, activation="silu")  # fmt: skip
TRAIN = dict(batch_size=8, evaluate_every=4, checkpoint_every=4, tensorboard=False)


def write_source(directory, seed=0):
    config = ModelConfig(**SIZES)
    params = parallel.init(nn.build(config), jax.random.PRNGKey(seed))
    hf.save(directory, config, jax.tree.map(lambda x: 2 * x, params), BYTES)
    return directory


def write_pairs(path, number=80):
    """Sums with the right and a wrong answer of one digit."""
    draws = np.random.default_rng(0).permuted(np.arange(100))[:number].tolist()
    lines = [
        {"prompt": f"{d // 10}+{d % 10}=", "chosen": str((d // 10 + d % 10) % 10), "rejected": str(d % 7 + 10)}
        for d in draws
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(the directory of a random model, a file of pairs)."""
    directory = tmp_path_factory.mktemp("inputs")
    return write_source(directory / "source"), write_pairs(directory / "pairs.jsonl")


def config_of(source, pairs, task=None, **train):
    return Config(
        model=ModelConfig(init_from=str(source)),
        data=ExampleData(train=f"preferences:{pairs}", validation_fraction=0.2),
        optim=OptimConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0),
        task=task or Prefer(length=16),
        train=TrainConfig(**TRAIN | {"steps": 8} | train),
    )


def metrics(workdir):
    """{step: numbers} of training and of evaluation, without the speed."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("tokens_per_second", None)
        found[record["step"], "validation_loss" in record] = record
    return found


def arrays(workdir, which="best"):
    return jax.tree.leaves(runs.open_model(workdir / "final", which)[1])


def test_with_lora_the_reference_is_the_base_and_no_second_model(inputs, tmp_path, monkeypatch):
    source, pairs = inputs
    held = []

    def fill(self):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return original(self)

    original = reference.Reference.fill
    monkeypatch.setattr(reference.Reference, "fill", fill)
    before = sum(x.nbytes for x in jax.live_arrays())
    run = nanoflax.finetune(config=config_of(source, pairs, steps=16, evaluate_every=16), peft=LoRA(rank=2), workdir=str(tmp_path / "run"))
    model, params, _ = runs.open_model(source)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held[0] - before < 1.2 * size  # the parameters and their adapters

    values = np.load(tmp_path / "run" / reference.FILE)
    assert len(values.files) == 2
    saved = np.concatenate([values[name] for name in sorted(values.files)])
    data = tasks.load(tasks.examples_of(run.config.data), tasks.Preference)
    rows = tasks.encode([*data.train, *data.validation], BYTES, 16)
    found, _ = alignment.answer_log_probabilities(model, params, rows.batch(range(len(rows))))
    assert len(saved) == len(rows)
    np.testing.assert_allclose(saved, found, rtol=1e-5)
    with_adapters = peft.add(params, LoRA(rank=2), jax.random.PRNGKey(1))
    again, _ = alignment.answer_log_probabilities(model, with_adapters, rows.batch(range(len(rows))))
    np.testing.assert_array_equal(again, found)

    first, last = metrics(tmp_path / "run")[0, True], metrics(tmp_path / "run")[16, True]
    assert first["validation_loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["reward_margin"]) < 1e-6
    assert last["preference_accuracy"] > 0.9 and last["validation_loss"] < 0.6 and last["reward_margin"] > 0.1
    line = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["prediction"]["reward_chosen"] > line["prediction"]["reward_rejected"] and line["chosen"]
    assert run.evaluate()["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    of_final = nanoflax.open(tmp_path / "run" / "final").evaluate(f"jsonl:{pairs}")  # with adapters in the kernels
    of_run = run.evaluate(f"jsonl:{pairs}")
    assert of_run["examples"] == 80 and of_final["reward_margin"] == pytest.approx(of_run["reward_margin"], rel=1e-3)
    assert (tmp_path / "run" / "adapter").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_killed_run_resumes_to_the_bit(inputs, tmp_path, monkeypatch, kind):
    source = shutil.copytree(inputs[0], tmp_path / "source")
    config = config_of(source, inputs[1])
    adapter = {"lora": LoRA(rank=2)}.get(kind)
    for name in ("whole", "killed"):
        if name == "killed":
            with monkeypatch.context() as patch:
                evaluator = tasks.Evaluator.__call__
                patch.setattr(
                    tasks.Evaluator,
                    "__call__",
                    lambda self, *a, **k: dying(patch) if calls.pop() else evaluator(self, *a, **k),
                )
                calls = [True, False, False]  # at step 8, after the checkpoint of step 4
                with pytest.raises(Killed):
                    nanoflax.finetune(config=config, peft=adapter, workdir=str(tmp_path / name))
            values = (tmp_path / name / reference.FILE).read_bytes()
            if kind == "all":  # the log-probabilities are in the run, so its source may have changed
                for file in source.glob("*.safetensors"):
                    shutil.copy(write_source(tmp_path / "other", 1) / file.name, file)
        nanoflax.finetune(config=config, peft=adapter, workdir=str(tmp_path / name))
    assert (tmp_path / "killed" / reference.FILE).read_bytes() == values
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)


def dying(patch):
    raise Killed
