"""The mesh and its one table: eight fake devices give the numbers of one, and hold their parts."""

import contextlib
import json
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanoflax import parallel
from nanoflax.config import Config, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.nn import build, without_padding
from nanoflax.parallel import mesh, rules
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Run by processes of their own: the number of devices is fixed when JAX starts.
CHILD = """
import json, sys
import jax, numpy as np
from tests.parallel import rules_test
print(json.dumps(getattr(rules_test, sys.argv[1])()))
"""


def run_child(name):
    done = processes.run(["-c", CHILD, name], env=processes.quick(devices=8), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def config_of(mesh, tied, **sizes):
    # SGD: under Adam a gradient of rounding noise (a key's bias) moves by its sign alone.
    return Config(
        model=ModelConfig(
            **dict(vocab_size=48) | sizes,
            context=16,
            layers=2,
            dim=32,
            heads=4,
            kv_heads=4,
            tied=tied,
            positions="learned" if tied else "rotary",
        ),
        optim=OptimConfig(name="sgd", learning_rate=0.3, warmup_steps=0, ema=0.9),
        train=TrainConfig(steps=3, batch_size=16, accumulate=2, mesh=mesh, z_loss=1e-3, seed=3),
    )


def batch_of(i, ids=48):
    rng = np.random.default_rng(i)
    weights = (rng.random((16, 16)) < 0.7).astype(np.float32)
    return {
        "targets": rng.integers(0, ids, (16, 16)).astype(np.int32),
        "weights": weights,
        "first": rng.integers(0, ids, 16).astype(np.int32),
    }


def train_on(config, devices, ids=48):
    """Three steps: (losses and gradient norms, the final state)."""
    from nanoflax import train

    mesh = parallel.make_mesh(config.train.mesh, devices)
    parallel.check_mesh(config, mesh)
    model = build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state = train.init_state(model, optimizer, config, mesh)
    first = parallel.put_batch(batch_of(0, ids), mesh)
    step = train.compile_step(train.make_train_step(model, optimizer, config), state, first, mesh)
    metrics = []
    for i in range(config.train.steps):
        state, m = step(state, parallel.put_batch(batch_of(i, ids), mesh))
        metrics.append([float(m["loss"]), float(m["grad_norm"])])  # blocks, as it must
    return metrics, state


def difference(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def meshes_against_one_device():
    out = {}
    for tied in (True, False):
        whole = train_on(config_of("1,1,1", tied), jax.devices()[:1])
        for sizes in ("8,1,1", "1,8,1", "2,2,2", "1,2,4") if tied else ("2,2,2",):
            metrics, state = train_on(config_of(sizes, tied), jax.devices())
            out[f"{sizes} tied={tied}"] = {
                "metrics": float(np.abs(np.array(metrics) - whole[0]).max()),
                "params": difference(state.params, whole[1].params),
                "ema": difference(state.ema, whole[1].ema),
                "moved": difference(state.params, train_on_nothing(mesh, tied)),
            }
    return out


def padded_meshes_against_one_device():
    """45 tokens: padded to 48 on meshes, and without padding on one device."""
    out = {}
    for tied in (True, False):
        whole = train_on(config_of("1,1,1", tied, vocab_size=45), jax.devices()[:1], ids=45)
        for sizes in ("1,2,1", "2,2,2") if tied else ("1,1,2",):
            config = config_of(sizes, tied, vocab_size=48, vocab_padding=3)
            metrics, state = train_on(config, jax.devices()[: math.prod(map(int, sizes.split(",")))], ids=45)
            cut = without_padding(config.model, jax.tree.map(np.asarray, state.params))[1]
            out[f"{sizes} tied={tied}"] = {
                "metrics": float(np.abs(np.array(metrics) - whole[0]).max()),
                "params": difference(cut, whole[1].params),
            }
    return out


def test_a_padded_vocabulary_gives_the_numbers_of_one_device_without_padding():
    found = run_child("padded_meshes_against_one_device")
    assert len(found) == 3
    for sizes, errors in found.items():
        assert max(errors.values()) < 1e-5, (sizes, errors)


def train_on_nothing(mesh, tied):
    return parallel.init(build(config_of(mesh, tied).model), jax.random.PRNGKey(3))


def test_eight_devices_give_the_numbers_of_one():
    found = run_child("meshes_against_one_device")
    assert len(found) == 5
    for sizes, errors in found.items():
        assert errors["moved"] > 0.01, sizes
        assert max(errors["metrics"], errors["params"], errors["ema"]) < 1e-5, (sizes, errors)


def collectives_of_the_chunked_loss():
    return [collectives_of_the_head(V) for V in (480, 482)]  # fsdp x tensor divides one


def collectives_of_the_head(V):
    from nanoflax.nn import chunked_cross_entropy

    B, T, D = 16, 16, 32
    mesh = parallel.make_mesh("2,2,2", jax.devices())
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(B, T, D), (D, V)])
    targets, weights = jnp.asarray(rng.integers(0, V, (B, T))), jnp.full((B, T), 1 / (B * T))
    specs = [
        parallel.batch_sharding(mesh, 3),
        jax.NamedSharding(mesh, P("fsdp", "tensor")),
        parallel.batch_sharding(mesh, 2),
        parallel.batch_sharding(mesh, 2),
    ]

    def loss(hidden, kernel, targets, weights, chunks=4):
        return chunked_cross_entropy(hidden, kernel, targets, weights, None, chunks)[0]

    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss, (0, 1))(*args)

    whole = jax.value_and_grad(loss, (0, 1))(hidden, kernel, targets, weights, 1)
    placed = [jax.device_put(x, s) for x, s in zip((hidden, kernel, targets, weights), specs, strict=True)]
    split = jax.jit(on_mesh, out_shardings=(None, tuple(specs[:2]))).lower(*placed).compile()
    loop = re.search(r"body=(%[\w.]+)", split.as_text())[1]
    body = split.as_text().split(f"\n{loop} ")[1].split("\n}")[0]
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-|reduce-scatter)", body)
    ]
    return {
        "error": difference(split(*placed), whole),
        "largest": max(sizes, default=0),
        "states": B // 2 * T // 4 * D,
        "whole": f"{D},{V // 2}]" in split.as_text(),
    }


def test_the_loop_of_the_chunked_loss_never_reduces_the_head():
    found = run_child("collectives_of_the_chunked_loss")
    for head in found:
        assert head["error"] < 1e-5
        # What is left is of a chunk: its states, and its rows' sums of exponentials.
        assert 0 < head["largest"] <= head["states"]
    assert not found[0]["whole"]  # a device holds its fsdp part of the gradient, never more


def adapters_against_one_device():
    from nanoflax import peft, train
    from nanoflax.config import PEFT_KINDS, as_kind

    def tuned(mesh_shape, devices, kind):
        config, c = config_of(mesh_shape, False), as_kind(PEFT_KINDS[kind], SimpleNamespace(rank=3, bottleneck=6))
        mesh, model = parallel.make_mesh(mesh_shape, devices), build(config.model)
        params = peft.add(parallel.init(model, jax.random.PRNGKey(0), mesh), c, jax.random.PRNGKey(1))
        params = jax.device_put(params, parallel.shardings(params, mesh))
        trained, frozen = peft.split(params, peft.trainable(params, c))
        optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
        state = train.init_state(model, optimizer, config, mesh, trained)
        before = jax.tree.map(np.asarray, state.params)
        step = train.jit_step(train.make_train_step(model, optimizer, config), state, mesh)
        for i in range(config.train.steps):
            state, metrics = step(state, parallel.put_batch(batch_of(i), mesh), frozen)
            metrics = [float(metrics[name]) for name in ("loss", "grad_norm")]
        return metrics, state.params, difference(before, state.params)

    out = {}
    for kind in ("dora", "houlsby"):
        one, many = tuned("1,1,1", jax.devices()[:1], kind), tuned("2,2,2", jax.devices(), kind)
        out[kind] = {
            "metrics": float(np.abs(np.subtract(one[0], many[0])).max()),
            "params": difference(one[1], many[1]),
            "moved": many[2],
        }
    return out


def test_adapters_on_a_mesh_give_the_numbers_of_one_device():
    for kind, errors in run_child("adapters_against_one_device").items():
        assert errors["moved"] > 1e-3, (kind, errors)
        assert max(errors["metrics"], errors["params"]) < 1e-5, (kind, errors)


def shards_of_each_leaf():
    """Shapes of one device's part of parameters and optimizer state, however they were made."""
    import dataclasses

    import nanoflax
    from nanoflax import train

    config = config_of("2,2,2", False)
    config = dataclasses.replace(config, optim=OptimConfig(ema=0.9))
    mesh = parallel.make_mesh(config.train.mesh)
    model = build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 3)
    state = train.init_state(model, optimizer, config, mesh)
    abstract = train.abstract_state(model, optimizer, config, mesh)
    with jax.set_mesh(mesh):
        ambient = nanoflax.init(model, jax.random.PRNGKey(0))
    unsharded = nanoflax.init(model, jax.random.PRNGKey(0))
    batch = parallel.put_batch(batch_of(0), mesh)

    def parts(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): [list(s.data.shape) for s in x.addressable_shards][
                0
            ]
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    return {
        "params": parts(state.params),
        "ambient": parts(ambient),
        "ema": parts(state.ema),
        "opt_state": parts(state.opt_state),
        "batch": parts(batch),
        "same values": difference(ambient, unsharded),
        "abstract is like the state": jax.tree.all(
            jax.tree.map(
                lambda a, x: (
                    (a.shape, a.dtype) == (x.shape, x.dtype) and a.sharding.is_equivalent_to(x.sharding, x.ndim)
                ),
                abstract,
                state,
            )
        ),
        "devices": len(jax.tree.leaves(ambient)[0].sharding.device_set),
    }


def ambient_meshes():
    """What `nanoflax.init` gives under meshes of other axes, and while it is traced."""
    import nanoflax

    model, rng = build(config_of("2,2,2", False).model), jax.random.PRNGKey(0)
    plain = nanoflax.init(model, rng)
    out = {}
    for names, sizes in (("data",), (8,)), (("fsdp", "x"), (4, 2)), (("a", "b"), (2, 4)):
        mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
        with jax.set_mesh(mesh):
            params = nanoflax.init(model, rng)
            shapes = jax.eval_shape(lambda: nanoflax.init(model, rng))
            traced = jax.jit(lambda rng: nanoflax.init(model, rng))(rng)
        kernel = params["decoder"]["block_0"]["mlp"]["up"]["kernel"]
        out[",".join(names)] = {
            "part": kernel.addressable_shards[0].data.shape,
            "devices": len(kernel.sharding.device_set),
            "traced": difference(traced, plain),
            "eager": difference(params, plain),
            "shapes": jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, plain),
        }
    return out


def test_init_under_any_mesh_eager_and_traced():
    found = run_child("ambient_meshes")
    parts = {"data": [32, 128], "fsdp,x": [8, 128], "a,b": [32, 128]}
    assert {mesh: values["part"] for mesh, values in found.items()} == parts
    for values in found.values():
        assert values["devices"] == 8 and values["shapes"]
        assert max(values["traced"], values["eager"]) < 1e-6


def test_everything_is_born_in_its_shards():
    found = run_child("shards_of_each_leaf")
    # On (2, 2, 2), parameters are whole along data and halved along fsdp and tensor.
    expected = {
        "embed/embedding": [24, 16],
        "unembed/kernel": [16, 24],
        "decoder/norm/scale": [32],
        "decoder/norm/bias": [32],
    } | {
        f"decoder/block_{i}/{path}": shape
        for i in (0, 1)
        for path, shape in {
            **{f"attention/{n}/kernel": [16, 16] for n in ("query", "key", "value", "out")},
            **{f"attention/{n}/bias": [16] for n in ("query", "key", "value")},
            "attention/out/bias": [32],
            "mlp/up/kernel": [16, 64],
            "mlp/up/bias": [64],
            "mlp/down/kernel": [64, 16],
            "mlp/down/bias": [32],
            **{f"norm_{n}/{p}": [32] for n in ("attention", "mlp") for p in ("scale", "bias")},
        }.items()
    }
    assert found["params"] == found["ambient"] == found["ema"] == expected
    for moment in ("mu", "nu"):  # of AdamW, sharded as the parameters are
        assert {k.split(f"{moment}/")[1]: v for k, v in found["opt_state"].items() if f"{moment}/" in k} == expected
    assert found["batch"] == {"targets": [4, 16], "weights": [4, 16], "first": [4]}
    assert found["same values"] < 1e-6 and found["abstract is like the state"]
    assert found["devices"] == 8


# What follows needs no devices.


@pytest.mark.parametrize(
    "shape, words",
    [
        *(
            (shape, "must be three sizes for data, fsdp, tensor")
            for shape in ("", "8", "1,1", "1,1,1,1,1,1", "a,1,1", "0,1,1", "1,-2,1")
        ),
        ("-1,-1,1", "at most one of them -1"),
        ("8,2,1", "needs 16 devices, and 8 are present"),
        ("-1,16,1", "needs 16 devices, and 8 are present"),
        ("2,2,1", "does not use the 8 devices present; the sizes must multiply to 8"),
        ("-1,3,1", "does not use the 8 devices present"),
    ],
)
def test_bad_mesh_shapes_are_refused(shape, words):
    with pytest.raises(UserError) as caught:
        parallel.mesh_sizes(shape, 8)
    assert words in str(caught.value) and repr(shape) in str(caught.value)


def test_init_can_be_traced_without_a_mesh():
    import nanoflax

    model, rng = build(config_of("1,1,1", True).model), jax.random.PRNGKey(0)
    shapes = jax.eval_shape(lambda: nanoflax.init(model, rng))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, nanoflax.init(model, rng))


def test_one_device_is_a_mesh_of_one():
    mesh = parallel.make_mesh("-1,1,1", jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}


@pytest.mark.parametrize(
    "shape, sizes, name",
    [
        ("2,-1,1", (2, 4, 1, 1, 1), "2,4,1"),
        ("2,2,2", (2, 2, 2, 1, 1), "2,2,2"),
        ("1,2,1,-1", (1, 2, 1, 4, 1), "1,2,1,4"),
        ("-1,1,1,8", (1, 1, 1, 8, 1), "1,1,1,8"),
        ("1,2,1,1,-1", (1, 2, 1, 1, 4), "1,2,1,1,4"),
        ("1,1,1,2,4", (1, 1, 1, 2, 4), "1,1,1,2,4"),
    ],
)
def test_three_to_five_sizes(shape, sizes, name):
    assert parallel.mesh_sizes(shape, 8) == sizes
    assert parallel.mesh_name(sizes) == name and parallel.mesh_sizes(name, 8) == sizes


class Device(SimpleNamespace):
    """Stands for a device of a machine that is not here."""

    __hash__ = object.__hash__


def devices_of(slices, each, platform="gpu"):
    """Devices of several slices, dealt out in turn, as nothing promises another order."""
    return [
        Device(id=i, process_index=i % slices, slice_index=i % slices, platform=platform, device_kind="none")
        for i in range(slices * each)
    ]


@pytest.mark.parametrize(
    "sizes, across",
    [
        ((4, 2, 1, 1, 1), "data"),
        ((2, 2, 2, 1, 1), "data"),
        ((2, 1, 1, 4, 1), "data"),
        ((1, 4, 2, 1, 1), "fsdp"),
        ((1, 2, 1, 4, 1), "fsdp"),
        ((2, 1, 1, 1, 4), "data"),
    ],
)
def test_slices_are_apart_along_data_or_else_fsdp(sizes, across):
    devices = devices_of(2, 4)
    array = mesh.hybrid_devices(sizes, devices)
    assert array.shape == sizes and {d.id for d in array.flat} == set(range(8))
    at = np.vectorize(lambda d: d.slice_index)(array)
    axis = parallel.AXES.index(across)
    half = np.arange(sizes[axis]) // (sizes[axis] // 2)
    np.testing.assert_array_equal(at, np.broadcast_to(half.reshape([-1 if i == axis else 1 for i in range(5)]), sizes))


def test_slices_along_data_and_fsdp_together():
    array = mesh.hybrid_devices((2, 4, 1, 1, 1), devices_of(4, 2))
    assert [[d.slice_index for d in row] for row in array[:, :, 0, 0, 0]] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_tensor_across_slices_is_refused_with_the_mesh():
    with pytest.raises(
        UserError,
        match=r"train.mesh='1,1,8' must split 2 slices or nodes along "
        "data, then fsdp",
    ):
        mesh.hybrid_devices((1, 1, 8, 1, 1), devices_of(2, 4))


def test_what_a_fast_network_joins():
    tpus = devices_of(3, 2, "tpu")
    assert mesh.fast_network_groups(tpus) == (3, False)
    for d in tpus:
        del d.slice_index
    assert mesh.fast_network_groups(tpus) == (1, True)  # of one slice, whatever its hosts
    for d in tpus:
        d.platform = "gpu"
    assert mesh.fast_network_groups(tpus) == (3, True)  # nodes of two GPUs, each with a process
    assert mesh.fast_network_groups(tpus[:3]) == (1, True)  # a process for each: nothing tells the nodes
    assert mesh.fast_network_groups(jax.devices())[0] == 1


def test_the_mesh_of_several_slices_is_the_hybrid_one(monkeypatch):
    asked = []

    def hybrid(sizes, devices):
        asked.append(sizes)
        return np.array(devices).reshape(sizes)

    monkeypatch.setattr(mesh, "fast_network_groups", lambda devices: (2, False))
    monkeypatch.setattr(mesh, "hybrid_devices", hybrid)
    made = parallel.make_mesh("1,1,1", jax.devices()[:1])
    assert asked == [(1, 1, 1, 1, 1)] and made.axis_names == parallel.AXES


@pytest.mark.parametrize(
    "mesh, model, train, words",
    [
        ((8, 1, 1), {}, dict(batch_size=12), "micro-batches of 12, not divisible by data x fsdp x expert = 8"),
        ((2, 2, 1), {}, dict(batch_size=8, accumulate=4), "micro-batches of 2, not divisible by"),
        ((1, 1, 4), dict(heads=6), {}, "model.heads=6 is not divisible by tensor=4"),
        ((1, 1, 4), dict(kv_heads=2), {}, "model.kv_heads=2 is not divisible by tensor=4"),
        ((1, 1, 4), dict(mlp_dim=30), {}, "model.mlp_dim=30 is not divisible by tensor=4"),
        ((1, 1, 4), dict(vocab_size=49), {}, "model.vocab_size=49 is not divisible by tensor=4"),
        ((1, 5, 1), {}, dict(batch_size=10), "model.dim=24 is not divisible by fsdp=5"),
        ((1, 1, 1, 3), {}, {}, "model.context=256 is not divisible by context=3"),
        ((1, 1, 1, 1, 2), {}, {}, "expert=2 needs a mixture of experts"),
        ((1, 1, 1, 1, 4), dict(moe=MoEConfig(experts=6)), {}, "model.moe.experts=6 is not divisible by expert=4"),
        (
            (1, 1, 4),
            dict(moe=MoEConfig(experts=4, expert_dim=30)),
            {},
            "model.moe.expert_dim=30 is not divisible by tensor=4",
        ),
        ((1, 1, 1, 2), dict(architecture="lstm"), {}, "context=2 does not work with model.architecture='lstm'"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_named(mesh, model, train, words):
    model = ModelConfig(**dict(vocab_size=48, dim=24, heads=4) | model)
    config = Config(model=model, train=TrainConfig(**dict(batch_size=16) | train))
    parallel.check_mesh(config, parallel.abstract_mesh((1, 1, 1, 1)))
    with pytest.raises(UserError) as caught:
        parallel.check_mesh(config, parallel.abstract_mesh(mesh))
    assert words in str(caught.value)


@pytest.mark.parametrize("limit, refused", [(1999, True), (2000, False), (None, False)])
def test_what_devices_cannot_hold_is_refused(limit, refused):
    device = SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})
    mesh = SimpleNamespace(shape={"fsdp": 2}, local_devices=[device])
    half = SimpleNamespace(shard_shape=lambda shape: (shape[0] // 2, *shape[1:]))
    tree = {
        "a": SimpleNamespace(shape=(8, 100), dtype=np.dtype(np.float32), sharding=half),
        "b": SimpleNamespace(shape=(200,), dtype=np.dtype(np.int32), sharding=half),
    }
    with pytest.raises(UserError, match="fsdp") if refused else contextlib.nullcontext():
        parallel.check_memory(tree, mesh)  # 2,000 bytes of each


def test_all_problems_stand_in_one_line():
    model = ModelConfig(vocab_size=49, dim=24, heads=6, context=100)
    config = Config(model=model, train=TrainConfig(batch_size=6))
    with pytest.raises(UserError) as caught:
        parallel.check_mesh(config, parallel.abstract_mesh((1, 4, 4, 8)), {"task.length": 36})
    for words in (
        "batch_size=6",
        "model.vocab_size=49",
        "model.heads=6",
        "task.length=36 is not divisible by context=8",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value) and "model.context" not in str(caught.value)


def test_an_lstm_has_no_heads_to_divide():
    model = ModelConfig(architecture="lstm", vocab_size=48, dim=32, heads=1)
    parallel.check_mesh(Config(model=model), parallel.abstract_mesh((1, 2, 4, 1)))


def large(**shapes):
    return {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}


def test_what_no_rule_splits_must_be_little():
    tree = {
        "mlp": large(up=(4096, 16384), down=(16384, 4096)),
        "new": large(a=(2048, 1024), b=(2048, 512)),
        "norm": {"scale": large(s=(4096,))["s"]},
    }
    whole = "new/a/kernel (2048, 1024), new/b/kernel (2048, 512)"  # 3 of 137 million
    for sizes in ((1, 8, 1, 1), (1, 1, 4, 1), (4, 2, 2, 1)):
        with pytest.raises(UserError) as caught:
            parallel.shardings(tree, parallel.abstract_mesh(sizes))
        assert "2% of all numbers would be replicated on every device, more than 2%: " + whole in str(caught.value)
    parallel.shardings(tree, parallel.abstract_mesh((8, 1, 1, 1)))  # there all is whole
    tree["new"].pop("b")
    parallel.shardings(tree, parallel.abstract_mesh((1, 8, 1, 1)))  # 1.5%


def test_a_rule_with_an_axis_twice_is_refused(monkeypatch):
    monkeypatch.setattr(rules, "RULES", ((r"up/kernel", P("fsdp", ("tensor", "fsdp"))),))
    with pytest.raises(UserError, match=r"mlp/up/kernel \(8, 8\): its rule .* names an axis twice"):
        parallel.shardings({"mlp": large(up=(8, 8))}, parallel.abstract_mesh((1, 2, 2, 1)))


def test_a_batch_that_context_does_not_divide_is_refused():
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    parallel.put_batch({"targets": np.zeros((2, 5), np.int32), "label": np.zeros((2, 3))}, mesh)
    with pytest.raises(UserError, match="targets of length 5 is not divisible by context=2"):
        parallel.put_batch({"targets": np.zeros((2, 5), np.int32)}, parallel.abstract_mesh((1, 1, 1, 2)))


def test_shardings_name_the_leaves_that_do_not_divide():
    mesh = parallel.abstract_mesh((1, 1, 4, 1))
    tree = {
        "embed": {"embedding": jax.ShapeDtypeStruct((50, 8), jnp.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((7,), jnp.float32)},
    }
    with pytest.raises(UserError) as caught:
        parallel.shardings(tree, mesh)
    assert "embed/embedding (50, 8): 50 is not divisible by tensor=4" in str(caught.value)
    assert "norm" not in str(caught.value)


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("embed/embedding", (8, 4), P("tensor", "fsdp")),
        ("opt_state/0/mu/embed/embedding", (8, 4), P("tensor", "fsdp")),
        ("position_embed/embedding", (8, 4), P(None, "fsdp")),
        ("type_embed/embedding", (8, 4), P()),  # not a row of the table: whole
        ("block_11/attention/query/kernel", (4, 4), P("fsdp", "tensor")),
        ("block_0/attention/out/kernel", (4, 4), P("tensor", "fsdp")),
        ("block_0/attention/latent_up/kernel", (8, 4), P("fsdp", "tensor")),
        ("block_0/attention/query_down/kernel", (4, 8), P("fsdp", None)),
        ("block_0/cross_attention/value/bias", (4,), P("tensor")),
        ("block_0/mlp/down/bias", (4,), P()),
        ("block_0/mlp/experts/gate/kernel", (4, 8, 6), P("expert", "fsdp", "tensor")),
        ("blocks/mlp/experts/down/kernel", (3, 4, 6, 8), P(None, "expert", "tensor", "fsdp")),
        ("block_0/mlp/experts/up/bias", (4, 6), P("expert", "tensor")),
        ("block_0/mlp/experts/down/lora_b", (4, 2, 8), P("expert", None, "fsdp")),
        ("block_0/mlp/router/kernel", (8, 4), P("fsdp", None)),
        ("block_0/mlp/shared/up/kernel", (8, 6), P("fsdp", "tensor")),
        ("block_0/mlp/down/lora_a", (8, 2), P("tensor", None)),
        ("block_0/mlp/down/lora_b", (2, 4), P(None, "fsdp")),
        ("block_0/attention/value/lora_b", (2, 4), P(None, "tensor")),
        ("block_0/adapter_mlp/up/kernel", (2, 4), P(None, "fsdp")),
        ("block_0/attention/prefix_key", (2, 4), P(None, "tensor")),
        ("encoder_0/forward_input/kernel", (4, 16), P("fsdp", None)),
        ("query/kernel", (4, 4), P("fsdp", None)),  # an LSTM's
        ("block_0/mlp/up/kernel", (), P()),  # an optimizer's scalar in the place of a matrix
        ("block_0/mlp/up/kernel/scale", (4, 4), P()),
    ],
)
def test_the_first_rule_that_fits_a_path(path, shape, spec):
    assert parallel.partition_spec(path, shape) == spec
