"""Runs with task.packing: what they print, and that they resume to the bit."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax.config import Config, ExampleData, Instruct, ModelConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError


def config_of(tmp_path, packing):
    rng = random.Random(0)
    records = [
        {"messages": [{"role": r, "content": "abc " * rng.randint(1, 9)} for r in ("user", "assistant")]}
        for _ in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Config(
        model=ModelConfig(layers=1, dim=32, heads=2, context=96, dropout=0.1),
        data=ExampleData(train=f"jsonl:{tmp_path}/chats.jsonl", tokenizer="bytes", keep_duplicates=True),
        optim=OptimConfig(learning_rate=0.01, warmup_steps=2),
        task=Instruct(length=96, packing=packing),
        train=TrainConfig(
            steps=9, batch_size=4, accumulate=2, evaluate_every=3, checkpoint_every=3, tensorboard=False, keep=3
        ),
    )


def metrics_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in ("time", "tokens_per_second")} for line in lines]


def test_a_packed_run_says_how_full_its_rows_are_and_resumes_to_the_bit(tmp_path, capsys):
    config, workdirs = config_of(tmp_path, "best_fit"), [tmp_path / name for name in "ab"]
    run = nanoflax.finetune(config=config, workdir=str(workdirs[0]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packed: ")]
    assert " examples in " in line and " rows of 96 tokens, " in line and "9 steps of 4 rows read each example" in line
    shutil.copytree(*workdirs)
    for path in ("checkpoints/6", "checkpoints/9", "final"):  # as if the run had been killed after step 5
        shutil.rmtree(workdirs[1] / path)
    again = nanoflax.finetune(config=config, workdir=str(workdirs[1]))
    assert "resuming at step 3" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)
    assert metrics_of(workdirs[0]) == metrics_of(workdirs[1])
    with pytest.raises(UserError, match="task.packing: .*best_fit.* -> .*none"):
        nanoflax.finetune(config=config_of(tmp_path, "none"), workdir=str(workdirs[0]))
