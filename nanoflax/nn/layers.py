"""The smallest pieces: functions, and the thin Linen shells that own their weights.

Parameters are float32; a shell computes in the dtype of its input.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax import parallel

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


@jax.custom_vjp
def matmul(x, w):
    """x @ w for x [..., D_in] and w [D_in, D_out]; the result is [..., D_out] in x's dtype.

    Equal to `x @ w` in value and gradient. The weight gradient of a narrowing product is taken as
    the transpose of dy^T x, which XLA's CPU backend computes in about half the time.
    """
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(saved, dy):
    x, w = saved
    dx = dy @ w.T
    if parallel.axis_size("context") == 1:  # which else splits a second dimension of the rows
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows = tuple(range(x.ndim - 1))
    product = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    dw = product(dy, x).T if w.shape[0] > w.shape[1] else product(x, dy)
    return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def activate(name, x):
    """An activation of x by its name. Only x is kept for the backward pass."""
    return jax.checkpoint(ACTIVATIONS[name])(x)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardise(x, eps, centre):
    """x [..., D] float32 over its root mean square, less its mean first if `centre`.

    The backward pass keeps only the result and one number a row.
    """
    return _standardise(x, eps, centre)[0]


def _standardise(x, eps, centre):
    if centre:
        x = x - x.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * rate, (x * rate, rate)


def _standardise_backward(eps, centre, saved, dy):
    y, rate = saved
    dx = dy - y * (dy * y).mean(-1, keepdims=True)
    if centre:
        dx = dx - dy.mean(-1, keepdims=True)
    return (dx * rate,)


standardise.defvjp(_standardise, _standardise_backward)


def layer_norm(x, scale, bias, eps):
    """Ba et al. 2016. x: [..., D]; scale: [D]; bias: [D] or None. Statistics in float32."""
    y = standardise(x.astype(jnp.float32), eps, True) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x, scale, eps):
    """Zhang and Sennrich 2019. x: [..., D]; scale: [D]. Statistics in float32."""
    return (standardise(x.astype(jnp.float32), eps, False) * scale).astype(x.dtype)


def adapt(y, x, p):
    """y = x @ kernel as changed by the low-rank adapters that a Linear's parameters p hold.

    x: [..., D_in]; y: [..., D_out]; r the rank. LoRA (Hu et al. 2021) adds scale x a b: lora_a
    [D_in, r], lora_b [r, D_out], lora_scale []. AdaLoRA (Zhang et al. 2023) puts lora_e * lora_mask
    [r] between a and b. DoRA (Liu et al. 2024) then gives column j of the sum of kernel and adapter
    the length lora_magnitude[j]. Returns [..., D_out] in y's dtype.
    """
    scale = jax.lax.stop_gradient(p["lora_scale"])
    scale = scale * masked(p) if "lora_e" in p else scale
    h = x @ p["lora_a"].astype(x.dtype) * scale.astype(x.dtype)
    y = y + h @ p["lora_b"].astype(x.dtype)
    if "lora_magnitude" in p:
        # Section 4.3: the length that is divided out counts as a constant.
        length = jax.lax.stop_gradient(column_lengths(p["kernel"] + low_rank(p)))
        y = y * (p["lora_magnitude"] / length).astype(y.dtype)
    return y


def low_rank(p):
    """The matrix [D_in, D_out] float32 that `adapt` adds to the kernel."""
    a = p["lora_a"] * masked(p) if "lora_e" in p else p["lora_a"]
    return jnp.dot(a, p["lora_b"], preferred_element_type=jnp.float32) * p["lora_scale"]


def masked(p):
    """lora_e where lora_mask is 1, else 0; yet its gradient is whole, so that what was masked may
    come back (Zhang et al. 2023, section 3.3)."""
    e = p["lora_e"]
    return e + jax.lax.stop_gradient(e * p["lora_mask"] - e)


def column_lengths(w):
    """The Euclidean length of each column of w [D_in, D_out]: [D_out]."""
    return jnp.sqrt((w * w).sum(0))


def bottleneck(h, p, activation):
    """h + up(activation(down(h))) (Houlsby et al. 2019). h: [B, T, D]; p: {down, up}, each {kernel,
    bias}. Returns [B, T, D] in h's dtype."""
    p = jax.tree.map(lambda x: x.astype(h.dtype), p)
    inner = activate(activation, h @ p["down"]["kernel"] + p["down"]["bias"])
    return h + (inner @ p["up"]["kernel"] + p["up"]["bias"])


class Linear(nn.Module):
    """x @ kernel + bias. x: [..., D_in] -> [..., features]. Kernel [D_in, features] float32.

    Low-rank adapters that `peft.add` put beside the kernel are applied.
    """

    features: int
    bias: bool = True
    stddev: float = 0.02  # of the initial kernel (GPT-2)

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.features))
        y = matmul(x, kernel.astype(x.dtype))
        if self.has_variable("params", "lora_a"):
            y = adapt(y, x, self.variables["params"])
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Embedding(nn.Module):
    """A table of vectors: ids [B, T] int32 -> [B, T, D]. Ids must be below `size`: JAX clamps."""

    size: int
    dim: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (self.size, self.dim))

    def __call__(self, ids):
        return self.embedding.astype(self.dtype)[ids]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis of x [..., D]."""

    kind: str
    eps: float
    bias: bool
    unit_offset: bool = False  # the scale is 1 + its parameter

    @nn.compact
    def __call__(self, x):
        first = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", first, (x.shape[-1],)).astype(jnp.float32)
        scale = scale + 1 if self.unit_offset else scale
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, self.eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.bias else None
        return layer_norm(x, scale, bias, self.eps)


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (Shazeer 2020). [B, T, D] -> same."""

    hidden: int  # F
    activation: str
    gated: bool
    bias: bool
    out_stddev: float

    @nn.compact
    def __call__(self, x):
        h = Linear(self.hidden, self.bias, name="up")(x)
        if self.gated:
            h = activate(self.activation, Linear(self.hidden, self.bias, name="gate")(x)) * h
        else:
            h = activate(self.activation, h)
        return Linear(x.shape[-1], self.bias, self.out_stddev, name="down")(h)
