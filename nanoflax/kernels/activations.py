"""Activations. The backward pass keeps only their input, and computes the activation again."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax import parallel
from nanoflax.kernels.arrays import Array


def _gelu_tanh(x):
    if parallel.current_platform() != "gpu":
        return jax.nn.gelu(x, approximate=True)
    return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))  # the same; there tanh takes longer


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _gelu_tanh,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


def activate(name: str, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The activation called `name`, computed in float32. The backward pass recomputes it from x."""
    return _activate(name, x)  # type: ignore  # custom_vjp hides the type


def _plain(name, x):
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


_activate = jax.custom_vjp(_plain, nondiff_argnums=(0,))


def _backward(name, x, dy):
    x = jax.lax.optimization_barrier(x)  # or XLA keeps numbers of the forward pass for this one
    (dx,) = jax.vjp(partial(_plain, name), x)[1](dy)
    # On a GPU a barrier, or XLA writes dx in float32 too, for the sum of a bias gradient.
    return (jax.lax.optimization_barrier(dx) if parallel.current_platform() == "gpu" else dx,)


_activate.defvjp(lambda name, x: (_plain(name, x), x), _backward)
