"""Stacked blocks: the numbers, states, files and shards of the loop, from one compiled block."""

import dataclasses
import functools
import json
import pathlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import generate, parallel, peft, train
from nanoflax.config import (
    OPTIMIZERS,
    PEFT_KINDS,
    AdaLoRA,
    Config,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RecurrentConfig,
    RopeConfig,
    TrainConfig,
    as_kind,
    validate,
)
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.nn.blocks import Stack
from nanoflax.parallel import is_stacked
from nanoflax.runs import Checkpoints, restore_params
from tests import processes
from tests.closeness import assert_trees_close
from tests.compiled import prefill

stack, unstack = jax.jit(parallel.stack, static_argnums=1), jax.jit(parallel.unstack)
ROOT = pathlib.Path(__file__).resolve().parents[2]
V, T = 61, 12
SMALL = dict(vocab_size=V, context=32, layers=3, dim=32, heads=4)
LLAMA = SMALL | dict(
    kv_heads=2, norm="rmsnorm", activation="silu", gated=True, bias=False, positions="rotary", tied=False
)
RECURRENT = RecurrentConfig(heads=2, groups=2, key_dim=8, value_dim=8)
MODELS = {
    "gpt2": SMALL,
    "gemma": LLAMA
    | dict(
        layers=4,
        norm_place="sandwich",
        norm_unit_offset=True,
        window=4,
        layer_types=("sliding", "full"),
        rope=RopeConfig(local_theta=100.0),
        qk_norm="head",
        attention_softcap=5.0,
    ),
    "parallel": SMALL | dict(parallel=True, positions="rotary", rope=RopeConfig(fraction=0.5)),
    "shared-norm": SMALL
    | dict(
        positions="rotary",
        rope=RopeConfig(interleaved=True, reversed=True),
        nope_layers=(1,),
        parallel=True,
        shared_norm=True,
        norm_scale=False,
        norm_bias=False,
        qk_norm="each_head",
        residual_scale=0.5,
        embed_dim=24,
    ),
    "bert": SMALL | dict(architecture="encoder", head="tag", norm_place="post", embed_norm=True),
    "t5": SMALL
    | dict(architecture="encoder_decoder", decoder_layers=2, positions="relative", norm="rmsnorm", bias=False),
}


def make(name, **changes):
    """A model, and parameters large enough that every part of it shows in the logits."""
    model = build(ModelConfig(**(MODELS | UNEQUAL)[name] | changes))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(3 * p if p.ndim > 1 else p + 0.2 * rng.normal(size=p.shape), jnp.float32),
        jax.device_get(parallel.init(model, jax.random.PRNGKey(0))),
    )
    return model, params


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def assert_same(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        if tolerance is None:
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    if tolerance is not None:
        assert_trees_close(a, b, relative_to_tree=tolerance)


@partial(jax.jit, static_argnums=(0, 2))
def loss_and_gradient(model, params, remat="none"):
    def loss(params):
        if model.config.architecture == "encoder_decoder":
            out = runner.apply(
                {"params": params},
                tokens_of(0, 2, T),
                tokens_of(1, 2, T + 3),
                jnp.arange(T + 3)[None] < jnp.array([[T + 3], [5]]),
            )[0]
        elif model.config.architecture == "encoder":
            out = runner.apply({"params": params}, tokens_of(0, 2, T), jnp.arange(T)[None] < jnp.array([[T], [5]]))
        else:
            segments = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
            out = runner.apply({"params": params}, tokens_of(0, 2, T), segments)[0]
        weights = np.random.default_rng(2).normal(size=out.shape).astype(np.float32)
        return (out * weights).mean(), out

    runner = model.clone(remat=remat)
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return out, grads


@pytest.mark.parametrize("name", MODELS)
def test_stacking_is_exact_and_goes_back(name):
    _, params = make(name)
    stacked = stack(params)
    part = "encoder" if name == "bert" else "decoder"
    blocks = [block for key, block in params[part].items() if key.startswith("block_")]
    kernel = stacked[part]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (len(blocks), 32, 96 if name == "gemma" else 128)
    assert "block_0" not in stacked[part] and is_stacked(stacked) and not is_stacked(params)
    assert_same(unstack(stacked), params, None)
    assert_same(unstack(params), params, None)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_loop(name):
    model, params = make(name)
    out, grads = loss_and_gradient(model, params)
    found, slopes = loss_and_gradient(model, stack(params))
    assert np.abs(out).max() > 0.1
    assert_same(found, out, 1e-5 if name == "t5" else 2e-6)
    assert_same(unstack(slopes), grads, 2e-6)
    assert all(
        np.abs(g).max() > 0
        for g in jax.tree.leaves(grads["decoder" if "decoder" in grads else "encoder"]["block_1"]["mlp"])
    )


UNEQUAL = {
    "dense prefix": LLAMA | dict(layers=4, moe=MoEConfig(experts=3, active=2, expert_dim=24, dense_layers=(0,))),
    "period": LLAMA | dict(layers=4, moe=MoEConfig(experts=3, active=2, expert_dim=24, dense_layers=(0, 2))),
    "hybrid": LLAMA | dict(layers=4, layer_types=("delta", "full"), recurrent=RECURRENT),
    "modernbert": LLAMA
    | dict(
        architecture="encoder",
        head="mlm",
        layers=4,
        kv_heads=4,
        activation="gelu",
        norm="layernorm",
        first_norm=False,
        embed_norm=True,
        window=4,
        layer_types=("full", "sliding", "sliding"),
        rope=RopeConfig(local_theta=100.0),
    ),
}
GROUPS = {"dense prefix": ((1, 1),), "period": ((0, 2), (1, 2)), "hybrid": ((0, 2), (1, 2)), "modernbert": ((1, 1),)}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_blocks_run_in_groups(name):
    model, params = make(name)
    groups = model.config.layer_groups
    stacked = stack(params, groups)
    assert groups == GROUPS[name] == parallel.groups_of(stacked)
    assert_same(unstack(stacked), params, None)
    out, grads = loss_and_gradient(model, params)
    found, slopes = loss_and_gradient(model, stacked, "blocks")
    assert_same(found, out, 5e-6)
    assert_same(unstack(slopes), grads, 5e-6)
    if name in ("hybrid", "dense prefix"):
        prompts = [[4, 8, 6], [5, 3, 9, 9, 2]]
        written = [generate.sample(model, tree, prompts, 6, temperature=0) for tree in (params, stacked)]
        assert written[0] == written[1]


DEEPER_DECODER = SMALL | dict(architecture="encoder_decoder", layers=1, decoder_layers=3)


@pytest.mark.parametrize("changes", [dict(scale_by_layer=True), dict(moe=MoEConfig(experts=3, dense_layers=(0,)))])
def test_a_decoder_deeper_than_its_encoder_has_groups_of_its_own(changes):
    model = build(ModelConfig(**DEEPER_DECODER, **changes))
    params = jax.tree.map(lambda x: 5 * x, parallel.init(model, jax.random.PRNGKey(0)))
    stacked = stack(params, model.config.layer_groups)
    assert is_stacked(stacked)
    assert_same(loss_and_gradient(model, stacked)[0], loss_and_gradient(model, params)[0], 5e-6)


@pytest.mark.parametrize(
    "layers, dense, groups",
    [
        (6, (0, 1), ((2, 1),)),
        (7, (0, 2, 4, 6), ((1, 2), (2, 2))),
        (6, (0, 1, 3, 4), ((0, 3), (1, 3), (2, 3))),
        (1, (), ((0, 1),)),
    ],
)
def test_the_groups_of_layers(layers, dense, groups):
    config = ModelConfig(**LLAMA | dict(layers=layers, moe=MoEConfig(experts=2, dense_layers=dense)))
    assert config.layer_groups == groups


def test_groups_of_different_lengths_are_refused():
    # The decoder of an encoder-decoder may have other layers than the encoder, from which the groups are.
    blocks = {f"block_{i}": {"x": jnp.ones(2)} for i in range(3)}
    with pytest.raises(UserError, match="train.scan_layers needs blocks with equal parameters"):
        stack({"decoder": blocks}, ((0, 2), (1, 2)))
    assert is_stacked(stack({"decoder": blocks | {"block_3": {"x": jnp.ones(2)}}}, ((0, 2), (1, 2))))


def test_kinds_that_do_not_repeat_are_refused():
    for model in (dict(layers=3, moe=MoEConfig(experts=2, dense_layers=(2,))), dict(layers=2, first_norm=False)):
        with pytest.raises(UserError, match="train.scan_layers=true needs kinds of layers that repeat"):
            validate(config_of(True, model=LLAMA | model))


@pytest.mark.parametrize("remat", ["dots", "offload", "blocks"])
def test_recomputing_changes_nothing(remat):
    for name in ("gemma", "t5"):
        model, params = make(name)
        assert_same(loss_and_gradient(model, stack(params), remat), loss_and_gradient(model, stack(params)), 2e-6)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "t5"])
def test_cached_decoding_is_that_of_the_loop(name):
    model, params = make(name)
    prompts = np.array([[0, 0, 4, 8, 6], [5, 3, 9, 9, 2]], np.int32)
    decode, found = jax.jit(model.decode), []
    for tree in (params, stack(params)):
        tokens, cache = prefill(model, tree, prompts, np.array([3, 5]), 6)
        rows = []
        for _ in range(6):
            logits, cache = decode(tree, tokens[:, None], cache)
            tokens = logits[:, -1].argmax(-1).astype(jnp.int32)
            rows.append(logits)
        found.append((jnp.stack(rows), cache))
    assert_same(*found, 2e-5)
    prompts = [[4, 8, 6], [5, 3, 9, 9, 2]]
    for write in (partial(generate.sample, temperature=0), partial(generate.beam_search, beams=2)):
        assert write(model, stack(params), prompts, max_new_tokens=6) == write(model, params, prompts, max_new_tokens=6)


def test_dropout_is_repeatable_and_differs_from_layer_to_layer():
    config = ModelConfig(**SMALL | dict(layers=2, dropout=0.5, dim=64))
    body = Stack(config, 2)
    x = jnp.zeros((1, 4, 64))
    shapes = jax.eval_shape(body.init, jax.random.PRNGKey(0), x)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    for i, amount in enumerate((1.0, 10.0)):  # what each block adds, to half of the numbers
        params[f"block_{i}"]["mlp"]["down"]["bias"] += amount
    params["norm"]["scale"] += 1

    @jax.jit
    def drawn(key, params=stack(params)):
        return body.apply({"params": params}, x, deterministic=False, rngs={"dropout": key})[0]

    run = lambda seed: np.asarray(drawn(jax.random.PRNGKey(seed)))

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    # Neither, the first, the second, both: with one key for all there would be two numbers.
    assert [len(np.unique(row.round(3))) for row in run(0)[0]] == [4] * 4


def test_a_stacked_model_compiles_one_block_however_deep():
    def size(layers):
        model = build(ModelConfig(**LLAMA | dict(layers=layers)))

        def loss(params):
            return model.apply({"params": params}, tokens_of(0, 1, 8))[0].sum()

        return len(jax.jit(jax.grad(loss)).lower(parallel.stack(parallel.param_shapes(model))).as_text())

    assert size(32) < 1.01 * size(4)


# Training.


def config_of(scan, mesh="1,1,1", **changes):
    fields = {"model": LLAMA | dict(context=16, layers=2)} | changes
    same = dict(steps=4, batch_size=8, mesh=mesh, scan_layers=scan, sample_tokens=0)
    return Config(
        model=ModelConfig(**fields["model"]),
        optim=OptimConfig(**dict(warmup_steps=1, learning_rate=0.01) | fields.get("optim", {})),
        train=TrainConfig(**same | fields.get("train", {})),
    )


BATCH = {
    "targets": tokens_of(0, 8, 16) % 48,
    "first": tokens_of(1, 8) % 48,
    "weights": (tokens_of(2, 8, 16) > 20).astype(np.float32),
}


@functools.cache
def trainer(config, devices=1):
    """(mesh, optimizer, model, the compiled train step)."""
    mesh = parallel.make_mesh(config.train.mesh, jax.devices()[:devices])
    model = build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    shapes = train.abstract_state(model, optimizer, config, mesh)
    return mesh, optimizer, model, train.jit_step(train.make_train_step(model, optimizer, config), shapes, mesh)


def started(config, devices=1):
    """The first state."""
    mesh, optimizer, model, _ = trainer(config, devices)
    return train.init_state(model, optimizer, config, mesh)


def run(config, state=None, steps=range(4), devices=1, after=lambda i, state: None):
    """(losses and gradient norms, the last state as a tree per block). after: is called after each step."""
    mesh, _, _, step = trainer(config, devices)
    state = started(config, devices) if state is None else state
    assert is_stacked(state) == config.train.scan_layers
    metrics = []
    for i in steps:
        state, m = step(state, parallel.put_batch(BATCH, mesh))
        metrics.append([float(m["loss"]), float(m["grad_norm"])])
        after(i, state)
    return np.array(metrics), unstack(state)


def test_a_run_begins_with_the_parameters_of_the_loop():
    loop, scan = (started(config_of(scan, optim={"ema": 0.9})) for scan in (False, True))
    assert_same(unstack(scan), loop, None)
    mesh, optimizer, model, _ = trainer(config_of(True))
    shapes = train.abstract_state(model, optimizer, config_of(True), mesh)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, started(config_of(True)))


WIDE = LLAMA | dict(context=16, layers=2, dim=128, mlp_dim=160)  # from 128 on, Adafactor factors


@pytest.mark.parametrize(
    "name, changes", [*((name, dict(clip=0)) for name in OPTIMIZERS), ("adamw", dict(layer_decay=0.7, clip=0.05))]
)
def test_every_optimizer_treats_a_layer_as_a_layer(name, changes):
    changes = dict(model=WIDE, optim=dict(name=name, weight_decay=0.3, muon_learning_rate=0.01) | changes)
    loop, state = run(config_of(False, **changes))
    found, scanned = run(config_of(True, **changes))
    assert abs(loop[0, 0] - loop[-1, 0]) > 0.02  # it moves
    np.testing.assert_allclose(found, loop, atol=1e-5, rtol=1e-5)
    assert_same(scanned.params, state.params, 2e-4)
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, state)


# With one active expert the router has no gradient, and Muon would make rounding errors as large as gradients.
SPARSE = WIDE | dict(layers=3, moe=MoEConfig(experts=4, active=2, expert_dim=130, dense_layers=(0,)))


@pytest.mark.parametrize("name, model", [("adamw", WIDE), ("muon", WIDE), ("adafactor", WIDE), ("muon", SPARSE)])
@pytest.mark.parametrize("scan", [False, True], ids=["from the loop", "to the loop"])
def test_a_run_goes_on_with_its_blocks_the_other_way(tmp_path, name, model, scan):
    changes = dict(model=model, optim=dict(name=name, ema=0.5, layer_decay=0.9))
    before, other = config_of(scan, **changes), config_of(not scan, **changes)
    mesh, optimizer, model, _ = trainer(before)
    with Checkpoints(tmp_path) as saves:

        def save_half(i, state):
            if i == 1:
                saves.save(2, state._asdict(), {})
                half.append(jax.tree.map(np.array, unstack(state)))  # the next step donates it

        half: list = []
        whole, end = run(before, after=save_half)
        shapes = train.abstract_state(model, optimizer, other, mesh)
        restored, _ = saves.restore(shapes._asdict())
    restored = train.TrainState(**restored)
    assert is_stacked(restored.ema) != scan
    assert_same(unstack(restored), half[0], None)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), restored, shapes))
    metrics, last = run(other, restored, range(2, 4))
    np.testing.assert_allclose(metrics, whole[2:], atol=1e-5, rtol=1e-5)
    assert_same(last.params, end.params, 2e-4)
    params, _ = restore_params(tmp_path)  # what evaluate, sample and convert read
    assert_same(params, half[0].params, None)


def tuned(scan, kind, trained=""):
    c = as_kind(PEFT_KINDS[kind], SimpleNamespace(rank=3, bottleneck=6, virtual_tokens=2, trained=trained))
    config = config_of(scan)
    mesh, optimizer, model, _ = trainer(config)
    params = peft.add(parallel.init(model, jax.random.PRNGKey(7)), c, jax.random.PRNGKey(1))
    own, frozen = peft.split(params, peft.trainable(params, c))
    frozen = stack(frozen) if scan else frozen
    state = train.init_state(model, optimizer, config, mesh, own)
    step = train.jit_step(train.make_train_step(model, optimizer, config), state, mesh)
    losses = []
    for _i in range(4):
        state, metrics = step(state, parallel.put_batch(BATCH, mesh), frozen)
        losses.append(float(metrics["loss"]))
    return losses, unstack(state.params), unstack(frozen)


@pytest.mark.parametrize("kind", ["lora", "dora", "houlsby", "prefix", "prompt"])
def test_adapters_are_trained_as_in_the_loop(kind):
    losses, params, frozen = tuned(False, kind)
    found, scanned, same = tuned(True, kind)
    assert len(set(losses)) == 4
    np.testing.assert_allclose(found, losses, atol=1e-5)
    assert_same(scanned, params, 1e-4)
    assert_same(same, frozen, None)


@pytest.mark.parametrize("trained", ["last:1", "decoder/block_0", "decoder/block_1/mlp"])
def test_blocks_that_differ_are_refused(trained):
    tuned(False, "lora", trained)
    with pytest.raises(UserError, match="train.scan_layers needs blocks with equal parameters"):
        tuned(True, "lora", trained)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(peft=AdaLoRA(warmup_steps=1, final_steps=1)),
            "train.scan_layers=true does not work with peft.kind='adalora'",
        ),
        (dict(model=ModelConfig(architecture="lstm")), "model.architecture='lstm' has none"),
        (
            dict(model=ModelConfig(**DEEPER_DECODER, scale_by_layer=True)),
            "needs kinds of layers that repeat: .*model.scale_by_layer",
        ),
    ],
)
def test_what_has_no_layers_to_scan_is_refused(changes, words):
    config = dataclasses.replace(config_of(True), **changes)
    with pytest.raises(UserError, match=words):
        validate(config)
    validate(dataclasses.replace(config, train=config_of(False).train))


# On eight devices: run by a process of its own, where JAX starts with so many.


def mesh_against_one_device():
    out = {}
    for mesh in ("2,2,2", "1,8,1"):
        config = config_of(
            True,
            mesh,
            model=LLAMA | dict(context=16, kv_heads=4, vocab_size=48),
            optim=dict(name="sgd", learning_rate=0.3, ema=0.9),
            train=dict(accumulate=1, remat="blocks"),
        )
        loop = dataclasses.replace(config, train=dataclasses.replace(config.train, mesh="1,1,1", scan_layers=False))
        metrics, state = run(loop)
        found, scanned = run(config, devices=8)
        first = started(config, 8)
        kernel = first.params["decoder"]["blocks"]["mlp"]["down"]["kernel"]
        out[mesh] = {
            "metrics": float(np.abs(found - metrics).max()),
            "params": max(
                float(np.abs(np.asarray(x) - np.asarray(y)).max())
                for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(scanned), strict=True)
            ),
            "moved": float(metrics[0, 0] - metrics[-1, 0]),
            "whole": kernel.shape,
            "part": kernel.addressable_shards[0].data.shape,
        }
    return out


def test_eight_devices_give_the_numbers_of_one():
    code = "import json; from tests.train import scan_layers_test as t; print(json.dumps(t.mesh_against_one_device()))"
    done = processes.run(["-c", code], env=processes.quick(devices=8), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for _mesh, errors in found.items():
        assert errors["moved"] > 0.05 and max(errors["metrics"], errors["params"]) < 1e-5, errors
    assert found["2,2,2"]["whole"] == [3, 96, 32] and found["2,2,2"]["part"] == [3, 48, 16]
    assert found["1,8,1"]["part"] == [3, 96, 4]
