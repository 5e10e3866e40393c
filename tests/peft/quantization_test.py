"""Models with quantised matrices: the outputs and gradients of the model with the dequantised matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanoflax
from nanoflax import peft
from nanoflax.config import ModelConfig, MoEConfig
from nanoflax.errors import UserError
from nanoflax.kernels import Quantized

SIZES = dict(vocab_size=50, dim=32, layers=1, heads=2, mlp_dim=64, context=16)
MODELS = {
    "decoder": ModelConfig(**SIZES),
    "untied": ModelConfig(**SIZES, tied=False, norm="rmsnorm", gated=True, positions="rotary"),
    "experts": ModelConfig(**SIZES, moe=MoEConfig(experts=4, active=2)),
    "encoder_decoder": ModelConfig(**SIZES, architecture="encoder_decoder"),
    "lstm": ModelConfig(**SIZES, architecture="lstm"),
}


def is_packed(x):
    return isinstance(x, Quantized)


@pytest.mark.parametrize(
    "name, kind, prompts",
    [("decoder", "int4", [[3, 4, 5], [6, 7]]), ("untied", "int8", [[3, 4, 5]]), ("experts", "int4", []),
     ("encoder_decoder", "int8", []), ("lstm", "int8", [])],
)  # fmt: skip
def test_outputs_and_replies_are_those_of_the_dequantised_model(name, kind, prompts):
    model = nanoflax.build(MODELS[name])
    packed = peft.quantize_params(nanoflax.init(model, jax.random.key(0)), kind)
    assert sum(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))) > (1 if name == "lstm" else 5)
    plain = peft.dequantize_params(packed)
    tokens = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 1]])
    source = {"source": tokens[:, ::-1]} if model.config.reads_source else {}
    ours, theirs = (model.apply({"params": params}, tokens, **source)[0] for params in (packed, plain))
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
