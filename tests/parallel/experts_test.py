"""Experts on eight fake devices: the numbers of one device, and only the collectives that are predicted."""

import math

import jax
import numpy as np
import pytest

from nanoflax import parallel, peft, train
from nanoflax.config import LoRA, ModelConfig, MoEConfig
from nanoflax.nn import build
from tests.parallel import mesh_test

B, T, V, E, K, D = 16, 8, 96, 8, 2, 32
MESHES = ("1,1,1,1,4", "1,2,1,1,4", "1,2,2,1,2", "1,1,1,2,4", "8,1,1")


def model_of(**changes):
    moe = dict(experts=E, active=K, expert_dim=40, shared_dim=24) | changes
    return build(
        ModelConfig(
            vocab_size=V,
            context=T,
            layers=1,
            dim=D,
            heads=4,
            kv_heads=4,
            mlp_dim=48,
            gated=True,
            norm="rmsnorm",
            positions="rotary",
            tied=False,
            moe=MoEConfig(**moe),
        )
    )


def on_meshes():
    """Of each mesh: the largest difference of loss, gradients and logits to one device, and the collectives."""
    model, rng, out = model_of(), np.random.default_rng(0), {}
    params = parallel.init(model, jax.random.PRNGKey(0))
    params = peft.add(params, LoRA(rank=3, targets="experts/(up|down)"), jax.random.PRNGKey(1))
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    batch = {
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "first": rng.integers(0, V, B).astype(np.int32),
        "weights": (rng.random((B, T)) < 0.7).astype(np.float32),
    }

    def loss(params, batch):
        sums = train.causal_lm(model, params, batch, chunks=2)
        return sums.objective / sums.weight

    step = jax.value_and_grad(loss)
    logits = lambda params, tokens: model.apply({"params": params}, tokens)[0]
    whole = jax.device_get((jax.jit(step)(params, batch), jax.jit(logits)(params, batch["targets"][:3])))
    for shape in MESHES:
        count = math.prod(map(int, shape.split(",")))
        mesh = parallel.make_mesh(shape, jax.devices()[:count])
        places = parallel.shardings(params, mesh)
        split, rows = jax.device_put(params, places), parallel.put_batch(batch, mesh)
        compiled = jax.jit(parallel.with_mesh(mesh, step), out_shardings=(None, places)).lower(split, rows).compile()
        # Three rows, which no axis divides, as in decoding.
        odd = jax.jit(parallel.with_mesh(mesh, logits))(split, batch["targets"][:3])
        found = jax.device_get((compiled(split, rows), odd))
        moved = mesh_test.collectives(compiled.as_text(), mesh, count)
        out[shape] = {
            "error": mesh_test.difference(found, whole),
            "gradient": float(np.abs(whole[0][1]["decoder"]["block_0"]["mlp"]["experts"]["up"]["kernel"]).max()),
            "moved": [[kind, axes, shapes] for kind, axes, shapes in moved],
            "part": split["decoder"]["block_0"]["mlp"]["experts"]["down"]["kernel"].addressable_shards[0].data.shape,
        }
    return out


def weights_on_inputs():
    """The largest difference to one device of a model whose weights multiply the inputs of experts (Llama 4)."""
    model = model_of(weigh_inputs=True, scores="sigmoid", renormalise=False)
    params = jax.tree.map(lambda x: 4 * x, parallel.init(model, jax.random.PRNGKey(0)))
    tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    step = jax.value_and_grad(lambda params: model.apply({"params": params}, tokens)[0].var())
    whole, mesh = jax.device_get(jax.jit(step)(params)), parallel.make_mesh("1,1,2,1,4")
    split = jax.device_put(params, parallel.shardings(params, mesh))
    return mesh_test.difference(jax.device_get(jax.jit(parallel.with_mesh(mesh, step))(split)), whole)


def test_weights_on_the_inputs_of_experts_give_the_numbers_of_one_device():
    assert mesh_test.run_child("weights_on_inputs", file="parallel.experts_test") < 1e-5


def opened():
    """The largest differences to one device of opened models: one with 3 experts of 33 units, which the meshes do not
    divide, and one of 8 bits whose groups are as long as the inputs."""
    tokens, found = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32), []
    for changes, kind, meshes in (
        (dict(experts=3, expert_dim=33), "", ("1,1,4,1,2", "1,1,1,1,8", "2,2,2")),
        (dict(expert_dim=64), "int8", ("1,1,2,1,4", "2,1,4")),
    ):
        model = model_of(**changes)
        params = jax.tree.map(lambda x: 4 * x, parallel.init(model, jax.random.PRNGKey(0)))
        params = peft.quantize_params(params, kind) if kind else params
        logits = lambda params, model=model: model.apply({"params": params}, tokens)[0]
        whole = jax.device_get(jax.jit(logits)(params))
        for mesh in map(parallel.make_mesh, meshes):
            split = jax.device_put(params, parallel.shardings(params, mesh, uneven=True))
            found.append(mesh_test.difference(jax.device_get(jax.jit(parallel.with_mesh(mesh, logits))(split)), whole))
    return found


def test_opened_experts_give_the_numbers_of_one_device_on_any_mesh():
    assert max(mesh_test.run_child("opened", file="parallel.experts_test")) < 1e-5


@pytest.fixture(scope="module")
def found():
    return mesh_test.run_child("on_meshes", file="parallel.experts_test")


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_on_a_mesh_give_the_numbers_of_one_device(found, mesh):
    assert found[mesh]["error"] < 1e-5 and found[mesh]["gradient"] > 1e-3
    data, fsdp, tensor, *rest = (*map(int, mesh.split(",")), 1, 1)[:5]
    assert found[mesh]["part"] == [E // rest[1], 40 // tensor, D // fsdp]


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "8,1,1"])
def test_tokens_move_as_predicted(found, mesh):
    sizes = dict(zip(parallel.AXES, (*map(int, mesh.split(",")), 1)[:5], strict=True))
    tokens = B * T // math.prod(n for axis, n in sizes.items() if axis != "tensor")  # of a device
    along = [(kind, shapes) for kind, axes, shapes in found[mesh]["moved"] if axes == ["expert"]]
    gathered = [shape for kind, shapes in along for shape in shapes if kind == "all-gather"]
    numbers = sorted(math.prod(shape) for shape in gathered)
    # Tokens, their experts and weights; backward, the gradient of what the experts gave.
    everything = tokens * sizes["expert"]
    assert numbers == sorted([everything * K, everything * K, everything * D, everything * D])
    # What the experts gave goes back, and backward the gradients of the tokens and of their weights.
    scattered = [math.prod(s) for kind, shapes in along for s in shapes if kind == "reduce-scatter"]
    assert sorted(scattered) == sorted([tokens * D, tokens * D, tokens * K])
    assert not any(kind == "all-to-all" or kind == "collective-permute" for kind, _ in along)
