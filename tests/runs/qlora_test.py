"""Adapters over a quantised base: a run trains, resumes, is opened again, and its final/ is what was measured."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import nanoflax
from nanoflax import runs
from nanoflax.config import Config, ExampleData, LanguageModel, LoRA, OptimConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.kernels import Quantized
from tests.compiled import apply
from tests.runs.adapter_test import LLAMA, write_base


@pytest.mark.filterwarnings("ignore")
def test_a_run_over_a_quantised_base(tmp_path, capsys):
    source, data, workdir = write_base(tmp_path / "base", LLAMA), tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(f'{{"text": "alpha beta {i}"}}\n' for i in range(30)))
    config = Config(
        data=ExampleData(train=f"jsonl:{data}"),
        optim=OptimConfig(warmup_steps=0, learning_rate=0.02, schedule="constant"),
        task=LanguageModel(length=40),
        train=TrainConfig(steps=2, batch_size=4, evaluate_every=1, checkpoint_every=1, tensorboard=False),
    )
    tune = lambda: nanoflax.finetune(source, peft=LoRA(rank=2, quantize="int4"), workdir=str(workdir), config=config)
    tune()
    result = json.loads((workdir / "result.json").read_text())
    run = nanoflax.open(workdir, "latest")
    kinds = {path: x for path, x in flatten_dict(run.params, sep="/").items() if isinstance(x, Quantized)}
    assert len(kinds) == 8 and kinds["decoder/block_0/mlp/up/kernel"].values.dtype == np.uint8
    assert run.evaluate()["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    tokens = np.arange(1, 9)[None]
    ours = apply(run.model, run.params, tokens)[0]
    model, params, _ = runs.open_model(workdir / "final")
    assert not any(isinstance(x, Quantized) for x in flatten_dict(params).values())
    final = apply(model, params, tokens)[0]
    np.testing.assert_allclose(ours, final, atol=1e-5 * np.abs(final).max())
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.rmtree(workdir / "final")
    tune()
    assert "resuming at step 1" in capsys.readouterr().out
    again = nanoflax.open(workdir, "latest").params
    jax.tree.map(np.testing.assert_array_equal, again, run.params)
    with pytest.raises(UserError, match=r"peft.quantize='int2' is not one of none, int8, int4"):
        nanoflax.finetune(source, peft=LoRA(quantize="int2"), workdir=str(tmp_path / "other"), config=config)
