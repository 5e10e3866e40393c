"""Basic layers: functions, and the Linen modules that own their weights.

Parameters are float32; a module computes in the dtype of its input.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nanoflax.kernels import Array, Quantized, activate, add_bias, multiply, normalise


def gated(
    name: str, gate: Float[Array, "*B F"], up: Float[Array, "*B F"], limit: float = 0.0, alpha: float = 1.702
) -> Float[Array, "*B F"]:
    """The activation of gate, times up (Shazeer 2020). limit > 0: (clip(up, -limit, limit) + 1) g sigmoid(alpha g)
    with g = min(gate, limit), in place of the activation (OpenAI 2025, gpt-oss)."""
    if not limit:
        return activate(name, gate) * up
    g = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * g * jax.nn.sigmoid(alpha * g)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "*H D"], bias: Float[Array, " D"] | None, eps: float
) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016), computed in float32."""
    return normalise(x, scale, bias, eps, True)  # type: ignore  # custom_vjp hides the type


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """RMSNorm (Zhang and Sennrich 2019), computed in float32."""
    return normalise(x, scale, None, eps, False)  # type: ignore  # custom_vjp hides the type


def adapt(y: Float[Array, "*B O"], x: Float[Array, "*B I"], p: Mapping[str, Any]) -> Float[Array, "*B O"]:
    """Change y = x @ kernel by the low-rank adapters of rank R among a Linear's parameters p.

    LoRA (Hu et al. 2021) adds scale x a b: lora_a [I, R], lora_b [R, O], lora_scale []. AdaLoRA
    (Zhang et al. 2023) puts lora_e * lora_mask [R] between a and b. DoRA (Liu et al. 2024) then gives
    column j of the sum of kernel and adapter the length lora_magnitude[j].
    """
    scale = jax.lax.stop_gradient(p["lora_scale"])
    scale = scale * masked(p) if "lora_e" in p else scale
    h = x @ p["lora_a"].astype(x.dtype) * scale.astype(x.dtype)
    y = y + h @ p["lora_b"].astype(x.dtype)
    if "lora_magnitude" in p:
        # Section 4.3: no gradient through the divisor.
        length = jax.lax.stop_gradient(column_lengths(p["kernel"].astype(jnp.float32) + low_rank(p)))
        y = y * (p["lora_magnitude"] / length).astype(y.dtype)
    return y


def low_rank(p: Mapping[str, Any]) -> Float[Array, "*E I O"]:
    """The float32 matrix that `adapt` adds to the kernel."""
    a = p["lora_a"] * masked(p) if "lora_e" in p else p["lora_a"]
    return jnp.matmul(a, p["lora_b"], preferred_element_type=jnp.float32) * p["lora_scale"]


def masked(p: Mapping[str, Any]) -> Float[Array, " R"]:
    """lora_e where lora_mask is 1, else 0. The gradient ignores the mask, so that masked ranks can
    return (Zhang et al. 2023, section 3.3)."""
    e = p["lora_e"]
    return e + jax.lax.stop_gradient(e * p["lora_mask"] - e)


def column_lengths(w: Float[Array, "I O"]) -> Float[Array, " O"]:
    """The Euclidean length of each column."""
    return jnp.sqrt((w * w).sum(0))


def bottleneck(h: Float[Array, "B T D"], p: dict[str, Any], activation: str) -> Float[Array, "B T D"]:
    """h + up(activation(down(h))) (Houlsby et al. 2019). p: {down, up}, each {kernel, bias}."""
    p = jax.tree.map(lambda x: x.astype(h.dtype), p)
    inner = activate(activation, h @ p["down"]["kernel"] + p["down"]["bias"])
    return h + (inner @ p["up"]["kernel"] + p["up"]["bias"])


def parameter(module: nn.Module, name: str, init: Callable[..., Array], *args: Any) -> Any:
    """module.param, or the Quantized that the parameters hold in place of the array."""
    held = module.get_variable("params", name)
    return held if isinstance(held, Quantized) else module.param(name, init, *args)


class Linear(nn.Module):
    """x @ kernel + bias, and the low-rank adapters of `peft.add` if the parameters have them."""

    features: int
    bias: bool = True
    stddev: float = 0.02  # of the initial kernel (GPT-2)
    padding: int = 0  # columns at the end that start as 0, and do not change the numbers drawn for the others

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        def initial(key):
            drawn = nn.initializers.normal(self.stddev)(key, (x.shape[-1], self.features - self.padding))
            return jnp.pad(drawn, [(0, 0), (0, self.padding)])

        y = multiply(x, parameter(self, "kernel", initial))
        if self.has_variable("params", "lora_a"):
            y = adapt(y, x, self.variables["params"])
        if self.bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))
        return y


class Embedding(nn.Module):
    """A table of `size` vectors. Ids must be below `size`: JAX clamps larger ones."""

    size: int
    dim: int
    dtype: Any = jnp.float32

    def setup(self):
        self.embedding = parameter(self, "embedding", nn.initializers.normal(0.02), (self.size, self.dim))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        table = self.embedding
        return (table if isinstance(table, Quantized) else table.astype(self.dtype))[ids].astype(self.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis."""

    kind: str
    eps: float
    bias: bool
    unit_offset: bool = False  # the scale is 1 + its parameter
    has_scale: bool = True
    axes: int = 1  # of x that the scale has; 2: a scale for each head

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        first = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        shape = x.shape[-self.axes :]
        scale = self.param("scale", first, shape).astype(jnp.float32) if self.has_scale else jnp.ones(shape)
        scale = scale + 1 if self.unit_offset else scale
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, self.eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.bias else None
        return layer_norm(x, scale, bias, self.eps)


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)); swiglu: the limit and alpha of `gated`.

    linear: makes the three layers; further arguments of a call go to them.
    """

    hidden: int  # F
    activation: str
    gated: bool
    bias: bool
    out_stddev: float
    swiglu: tuple[float, float] = (0.0, 1.702)
    linear: Callable[..., Any] = Linear

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *more: Array) -> Float[Array, "B T D"]:
        h = self.linear(self.hidden, self.bias, name="up")(x, *more)
        if self.gated:
            h = gated(self.activation, self.linear(self.hidden, self.bias, name="gate")(x, *more), h, *self.swiglu)
        else:
            h = activate(self.activation, h)
        return self.linear(x.shape[-1], self.bias, self.out_stddev, name="down")(h, *more)
