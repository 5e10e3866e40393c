"""Runs that distil: the teacher is loaded, not trained, not exported, and noticed when it changes."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import nn, parallel, runs, tokenizers
from nanoflax.config import Config, Distill, ExampleData, LoRA, ModelConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError

BYTES = tokenizers.load("bytes")
SIZES = dict(vocab_size=260, context=32, layers=2, dim=16, heads=2)


def write_model(directory, seed=0, config=ModelConfig(**SIZES)):
    """A run with random weights."""
    model = nn.build(config)
    with runs.Checkpoints(directory / "checkpoints") as saves:
        params = parallel.init(model, jax.random.PRNGKey(seed))
        saves.save(0, {"params": params}, {"tokenizer": BYTES.fingerprint, "step": 0})
    runs.directory.write_run(str(directory), Config(model=model.config), BYTES)
    return params


@pytest.fixture
def teacher(tmp_path):
    write_model(tmp_path / "teacher")
    return tmp_path / "teacher"


def a_config(tmp_path, **changes):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "alpha beta {i}, gamma"}}\n' for i in range(40)))
    config = Config(
        model=ModelConfig(**SIZES | {"layers": 1, "vocab_size": 0}),
        data=ExampleData(train=f"jsonl:{tmp_path}/t.jsonl"),
        optim=OptimConfig(warmup_steps=0),
        task=Distill(length=32, teacher=str(tmp_path / "teacher"), mix=0.25, temperature=2.0),
        train=TrainConfig(steps=2, batch_size=4, evaluate_every=1, checkpoint_every=1, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_distillation_from_its_start_to_its_final_model(tmp_path, teacher, capsys):
    run = nanoflax.finetune(config=a_config(tmp_path), workdir=str(tmp_path / "run"))
    printed = capsys.readouterr().out
    count = lambda layers: sum(
        x.size for x in jax.tree.leaves(parallel.param_shapes(nn.build(ModelConfig(**SIZES | {"layers": layers}))))
    )
    assert f"{count(1):,} of {count(1):,} parameters are trained (100.00%)" in printed
    assert f"the teacher, which is not trained, has {count(2):,} parameters" in printed
    assert re.search(rf"^total .* {count(1):,} ", printed, re.M)
    steps = [m for m in metrics_of(tmp_path / "run") if "loss" in m]
    assert all({"kl", "divergence"} <= m.keys() for m in steps)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"validation_loss", "perplexity", "bits_per_byte", "kl"} <= result.keys()
    # The exported model is the student alone, which opens and is measured without its teacher.
    shutil.rmtree(teacher)
    params, _ = runs.restore_params(tmp_path / "run" / "final" / "checkpoints")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, nanoflax.open(tmp_path / "run").params)
    assert "teacher" not in params
    found = nanoflax.open(tmp_path / "run").evaluate(f"jsonl:{tmp_path}/t.jsonl")
    assert found["perplexity"] > 1 and "kl" not in found
