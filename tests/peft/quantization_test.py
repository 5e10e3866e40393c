"""Models with quantised matrices: the outputs and gradients of the model with the dequantised matrices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanoflax
from nanoflax import parallel, peft
from nanoflax.config import DoRA, LoRA, ModelConfig, MoEConfig
from nanoflax.errors import UserError
from nanoflax.kernels import Quantized
from tests import processes
from tests.compiled import apply

SIZES = dict(vocab_size=50, dim=32, layers=1, heads=2, mlp_dim=64, context=16)
MODELS = {
    "decoder": ModelConfig(**SIZES),
    "untied": ModelConfig(**SIZES, tied=False, norm="rmsnorm", gated=True, positions="rotary"),
    "experts": ModelConfig(**SIZES, moe=MoEConfig(experts=4, active=2)),
    "encoder_decoder": ModelConfig(**SIZES, architecture="encoder_decoder"),
    "lstm": ModelConfig(**SIZES, architecture="lstm"),
}


quantize, dequantize = jax.jit(peft.quantize_params, static_argnums=1), jax.jit(peft.dequantize_params)


def is_packed(x):
    return isinstance(x, Quantized)


@pytest.mark.parametrize(
    "name, kind, prompts",
    [("decoder", "int4", [[3, 4, 5], [6, 7]]), ("untied", "int8", [[3, 4, 5]]), ("experts", "int4", []),
     ("encoder_decoder", "int8", []), ("lstm", "int8", [])],
)  # fmt: skip
def test_outputs_and_replies_are_those_of_the_dequantised_model(name, kind, prompts):
    model = nanoflax.build(MODELS[name])
    packed = quantize(nanoflax.init(model, jax.random.key(0)), kind)
    assert sum(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))) > (1 if name == "lstm" else 5)
    plain = dequantize(packed)
    tokens = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 1]])
    source = {"source": tokens[:, ::-1]} if model.config.reads_source else {}
    ours, theirs = (apply(model, params, tokens, **source)[0] for params in (packed, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    if prompts:
        options = {"max_new_tokens": 6, "temperature": 0.0}
        ours, theirs = (nanoflax.sample(model, params, prompts, **options) for params in (packed, plain))
        assert ours == theirs


def test_what_cannot_be_quantised_is_refused():
    model = nanoflax.build(ModelConfig(**SIZES | {"dim": 24, "mlp_dim": 40}))
    params = nanoflax.init(model, jax.random.key(0))
    with pytest.raises(UserError, match="fits no matrix"):
        peft.quantize_params(params, "int8")
    with pytest.raises(UserError, match="quantize='int2' is not one of int8, int4"):
        peft.quantize_params(params, "int2")


@pytest.mark.parametrize("kind, adapter", [("int8", LoRA), ("int4", DoRA)])
def test_gradients_of_adapters_are_those_over_the_dequantised_base(kind, adapter):
    model, config = nanoflax.build(MODELS["untied"]), adapter(rank=2, quantize=kind)
    params = peft.add(nanoflax.init(model, jax.random.key(0)), config, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.01 if x.shape[-1:] == (32,) else x, params)  # also lora_b is not 0
    packed = peft.quantize_frozen(params, config)
    tokens = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 1]])
    mask = peft.trainable(params, config)

    def gradients(params):
        trained, frozen = peft.split(params, mask)
        loss = lambda trained: jnp.square(model.apply({"params": peft.join(trained, frozen)}, tokens)[0]).sum()
        return jax.jit(jax.grad(loss))(trained)

    ours, theirs = map(jax.tree.leaves, (gradients(packed), gradients(dequantize(packed))))
    scale = max(float(jnp.abs(x).max()) for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)
    merged, plain = peft.merge(packed), peft.merge(dequantize(packed))
    np.testing.assert_array_equal(*(tree["decoder"]["block_0"]["mlp"]["up"]["kernel"] for tree in (merged, plain)))


def test_matrices_that_are_trained_stay_floats():
    config = LoRA(rank=2, trained="adapters,unembed", quantize="int8")
    params = peft.add(nanoflax.init(nanoflax.build(MODELS["untied"]), jax.random.key(0)), config, jax.random.key(1))
    packed = peft.quantize_frozen(params, config)
    assert is_packed(packed["embed"]["embedding"]) and not is_packed(packed["unembed"]["kernel"])


def on_a_mesh():
    """Largest difference of the logits on eight devices from those on one, and the devices of some leaves."""
    mesh, tokens, found = parallel.make_mesh("2,2,2"), jnp.ones((4, 8), jnp.int32), {}
    for name, kind in (("untied", "int4"), ("experts", "int8")):
        model = nanoflax.build(dataclasses.replace(MODELS[name], vocab_size=64, mlp_dim=128, dim=64))
        packed = quantize(nanoflax.init(model, jax.random.key(0)), kind)
        apply = jax.jit(lambda params, model=model: model.apply({"params": params}, tokens)[0])
        one, split = apply(packed), parallel.put_params(packed, mesh)
        with jax.set_mesh(mesh):
            many = apply(split)
        found[name] = float(jnp.abs(np.asarray(many) - np.asarray(one)).max() / jnp.abs(one).max())
        if name != "experts":
            values = split["decoder"]["block_0"]["mlp"]["up"]["kernel"].values
            found[f"{name} parts"] = values.size // values.addressable_shards[0].data.size
    return found


def test_a_mesh_splits_quantised_matrices_as_their_kernels():
    child = "import json; from tests.peft import quantization_test as t; print(json.dumps(t.on_a_mesh()))"
    done = processes.run(["-c", child], env=processes.quick(devices=8), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("untied parts") == 4  # fsdp x tensor
    assert max(found.values()) < 1e-5, found
