"""A vocabulary that the mesh does not divide: padded for the run, gone from all that leaves it."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from nanoflax import hf, parallel, peft, runs
from nanoflax.config import Config, LoRA, ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.nn import build, without_padding
from nanoflax.runs.vocabulary import with_vocabulary
from tests import processes
from tests.compiled import apply
from tests.system.programs_test import SMALL, run

EIGHT = processes.quick(devices=8)


def mesh_of(tensor):
    return parallel.abstract_mesh((1, 1, tensor))


def test_padding_is_what_the_mesh_needs():
    def sizes(V, tensor):
        m = parallel.pad_vocabulary(ModelConfig(vocab_size=V), mesh_of(tensor))
        return m.vocab_size, m.vocab_padding

    assert sizes(261, 1) == (261, 0) and sizes(262, 2) == (262, 0) and sizes(0, 8) == (0, 0)
    assert sizes(261, 2) == (384, 123) and sizes(129, 6) == (384, 255) and sizes(255, 2) == (256, 1)
    once = parallel.pad_vocabulary(ModelConfig(vocab_size=261), mesh_of(2))
    assert parallel.pad_vocabulary(once, mesh_of(8)) == once
    for fields in (dict(vocab_size=9, vocab_padding=9), dict(vocab_padding=1), dict(vocab_size=9, vocab_padding=-1)):
        with pytest.raises(UserError, match="model.vocab_padding=.* must be from 0 to below"):
            validate(ModelConfig(**fields))
    with pytest.raises(UserError, match="start_id=8 must be below model.vocab_size=8"):
        validate(ModelConfig(vocab_size=9, vocab_padding=1, start_id=8))


@pytest.mark.parametrize(
    "fields",
    [
        dict(tied=True),
        dict(tied=False),
        dict(architecture="encoder", head="mlm", head_bias=True),
        dict(architecture="encoder_decoder", tied=False),
        dict(architecture="lstm", tied=False),
    ],
)
def test_without_its_padding_a_model_gives_the_same_logits(fields):
    config = ModelConfig(vocab_size=40, vocab_padding=3, dim=16, layers=1, heads=2, **fields)
    params = parallel.init(build(config), jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: x + 0.1, params)
    cut_config, cut = without_padding(config, params)
    assert (cut_config.vocab_size, cut_config.vocab_padding) == (37, 0)
    expected = parallel.param_shapes(build(cut_config))
    assert jax.tree.map(lambda x: x.shape, cut) == jax.tree.map(lambda x: x.shape, expected)
    ids = np.arange(36).reshape(2, 18)
    more = {"source": ids} if config.architecture in ("encoder_decoder", "lstm") else {}

    def logits(config, params):
        out = apply(build(config), params, ids, **more)
        return out[0] if isinstance(out, tuple) else out

    np.testing.assert_allclose(logits(cut_config, cut), logits(config, params)[..., :37], rtol=1e-5, atol=1e-6)
    assert without_padding(cut_config, cut) == (cut_config, cut)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_has_no_padding(tied, tmp_path):
    config = ModelConfig(
        vocab_size=40,
        vocab_padding=3,
        dim=16,
        layers=1,
        heads=2,
        norm="rmsnorm",
        activation="silu",
        gated=True,
        positions="rotary",
        bias=False,
        tied=tied,
    )
    params = parallel.init(build(config), jax.random.PRNGKey(0))
    hf.save(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 37
    back_config, back = hf.load(tmp_path)
    cut_config, cut = without_padding(config, params)
    assert back_config.vocab_size == cut_config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, back, cut)


def test_an_adapter_with_its_head_has_no_padding(tmp_path):
    config = ModelConfig(
        vocab_size=40,
        vocab_padding=3,
        dim=16,
        layers=1,
        heads=2,
        norm="rmsnorm",
        activation="silu",
        gated=True,
        positions="rotary",
        bias=False,
        tied=False,
    )
    c, base = LoRA(trained="adapters,head"), parallel.init(build(config), jax.random.PRNGKey(0))
    tuned = peft.add(base, c, jax.random.PRNGKey(1))
    tuned["unembed"] = {"kernel": base["unembed"]["kernel"] + 0.1}
    hf.save_adapter(tmp_path, config, tuned, c)
    back, _ = hf.load_adapter(tmp_path, *without_padding(config, base))
    jax.tree.map(np.testing.assert_array_equal, back, without_padding(config, tuned)[1])


def test_the_size_of_a_run_is_its_own_on_any_mesh():
    def size(model, tensor, saved=None):
        return with_vocabulary(model, 261, mesh_of(tensor), saved).vocab_size

    new, named = ModelConfig(), ModelConfig(vocab_size=261)
    saved = Config(model=ModelConfig(vocab_size=384, vocab_padding=123))
    for model in (new, named):
        assert [size(model, 1), size(model, 2)] == [261, 384]
        assert [size(model, tensor, saved) for tensor in (1, 2, 8)] == [384] * 3
        assert size(model, 2, Config(model=named)) == 261  # refused then by sharding.check
    assert size(ModelConfig(vocab_size=300), 1, saved) == 300
    with pytest.raises(UserError, match="model.vocab_size=200 is less than the tokenizer's 261"):
        size(ModelConfig(vocab_size=200), 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 20 steps with tensor=2, whose vocabulary of 261 it does not divide."""
    directory = tmp_path_factory.mktemp("padded")
    (directory / "text.txt").write_text("One line, and another.\n\n" * 400)
    flags = [
        f"--workdir={directory / 'run'}",
        f"--config.data.train=text:{directory}/*.txt",
        f"--config.data.cache={directory}/cache",
        *SMALL,
        "--config.train.steps=20",
        "--config.train.sample_tokens=0",
        "--config.model.embed_scale=1",  # an export takes another scale into the table
        "--config.model.vocab_size=261",
    ]
    done = run("pretrain", *flags, "--config.train.mesh=2,2,2", env=EIGHT)
    assert done.returncode == 0, done.stderr
    return directory, flags


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_a_padded_run_goes_on_over_another_mesh(trained):
    directory, flags = trained
    run_dir = directory / "run"
    model = json.loads((run_dir / "config.json").read_text())["model"]
    assert (model["vocab_size"], model["vocab_padding"]) == (384, 123)
    before = losses(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "20")
    done = run("pretrain", *flags)
    assert done.returncode == 0 and "resuming at step 10" in done.stdout, done.stderr
    assert losses(run_dir).keys() == before.keys()
    assert max(abs(losses(run_dir)[step] - before[step]) for step in range(11, 21)) < 1e-4


def test_a_padded_run_is_opened_sampled_exported_and_tuned_without(trained):
    directory, _ = trained
    model, params, tokenizer = runs.open_model(str(directory / "run"))
    assert model.config.vocab_size == 261 and tokenizer.vocab_size == 260
    exported = run("convert", f"--from={directory / 'run'}", f"--to={directory / 'hf'}")
    assert exported.returncode == 0 and "261x32" in exported.stdout, exported.stderr
    _, back = hf.load(directory / "hf")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # Fine-tuning over tensor=2 pads once more.
    tuned = run(
        "finetune",
        "--config=language_model",
        f"--workdir={directory / 'tuned'}",
        f"--config.data.train=text:{directory}/*.txt",
        f"--config.model.init_from={directory / 'run'}",
        "--config.peft.kind=lora",
        "--config.task.length=32",
        "--config.train.steps=4",
        "--config.optim.warmup_steps=1",
        "--config.train.batch_size=8",
        "--config.train.evaluate_every=4",
        "--config.train.sample_tokens=0",
        "--config.train.tensorboard=false",
        "--config.train.mesh=2,2,2",
        env=EIGHT,
    )
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads((directory / "tuned" / "config.json").read_text())["model"]["vocab_size"] == 384
    final, first = (flatten_dict(p, sep="/") for p in (runs.open_model(str(directory / "tuned" / "final"))[1], params))
    np.testing.assert_array_equal(final["embed/embedding"], first["embed/embedding"])
    moved = [path for path in first if not np.array_equal(final[path], first[path])]
    assert moved and all("kernel" in path for path in moved)
