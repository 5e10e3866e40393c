"""Runs that keep frozen weights outside their checkpoints notice when those weights have changed."""

import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import nn, parallel, peft, runs, tokenizers
from nanoflax.config import PEFT_KINDS, Config, ExampleData, LanguageModel, ModelConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import opening

SIZES = dict(vocab_size=260, context=32, layers=1, dim=16, heads=2)
BYTES = tokenizers.load("bytes")


def write_base(directory, seed):
    """A run with random weights."""
    model = nn.build(ModelConfig(**SIZES))
    with runs.Checkpoints(directory / "checkpoints") as saves:
        params = parallel.init(model, jax.random.PRNGKey(seed))
        saves.save(0, {"params": params}, {"tokenizer": BYTES.fingerprint, "step": 0})
    runs.directory.write_run(str(directory), Config(model=model.config), BYTES)
    return params


@pytest.mark.parametrize(
    "kind, trained",
    [("lora", ""), ("houlsby", ""), ("prefix", ""), ("none", "last:1"), ("none", "biases"), ("lora", "adapters,embed")],
)
def test_a_checkpoint_is_not_opened_on_another_base(kind, trained, tmp_path):
    write_base(tmp_path / "base", 0)
    config = Config(
        model=ModelConfig(**SIZES, init_from=str(tmp_path / "base")), peft=PEFT_KINDS[kind](trained=trained)
    )
    model, mesh = nn.build(config.model), parallel.make_mesh("1,1,1", jax.devices()[:1])
    source = opening.open_initial(config.model)
    params, base = opening.initial_parameters(model, source.load, config, mesh)
    kept, frozen = peft.split(params, peft.trainable(params, config.peft))
    assert base and jax.tree.leaves(frozen)
    meta = {"tokenizer": BYTES.fingerprint, "step": 3, "base": base}
    with runs.Checkpoints(tmp_path / "run" / "checkpoints") as saves:
        saves.save(3, {"params": kept}, meta)
    runs.directory.write_run(str(tmp_path / "run"), config, BYTES)
    _, opened, _ = runs.open_model(tmp_path / "run", "latest")
    jax.tree.map(np.testing.assert_array_equal, opened, params)
    shutil.rmtree(tmp_path / "base")
    write_base(tmp_path / "base", 1)
    with pytest.raises(UserError, match=f"^model.init_from={tmp_path}/base has changed since this run began"):
        runs.open_model(tmp_path / "run", "latest")


def test_the_values_are_what_counts(tmp_path):
    """Not their dtype, nor the files; and not the values that are trained."""
    params = jax.tree.map(lambda x: x.astype("bfloat16"), write_base(tmp_path / "base", 0))
    same = jax.tree.map(lambda x: x.astype("float32"), params)
    paths = {"embed/embedding", "decoder/norm/scale"}
    first = opening.base_fingerprint(params, paths)
    assert first == opening.base_fingerprint(same, paths)
    same["decoder"]["block_0"]["mlp"]["up"]["kernel"] += 1
    assert first == opening.base_fingerprint(same, paths)
    same["embed"]["embedding"] = same["embed"]["embedding"].at[3, 4].add(1e-3)
    assert first != opening.base_fingerprint(same, paths)
    assert opening.base_fingerprint(params, set()) == ""


def test_a_finetuning_does_not_resume_on_another_base(tmp_path):
    write_base(tmp_path / "base", 0)
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "alpha beta {i}"}}\n' for i in range(40)))
    config = Config(
        data=ExampleData(train=f"jsonl:{tmp_path}/t.jsonl"),
        optim=OptimConfig(warmup_steps=0),
        task=LanguageModel(length=32),
        train=TrainConfig(steps=2, batch_size=4, evaluate_every=1, checkpoint_every=1, tensorboard=False),
    )
    tune = lambda: nanoflax.finetune(str(tmp_path / "base"), peft="lora", workdir=str(tmp_path / "run"), config=config)
    tune()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(tmp_path / "base")
    write_base(tmp_path / "base", 1)
    with pytest.raises(UserError, match=r"base has changed since this run began .* restore that model, or choose"):
        tune()
