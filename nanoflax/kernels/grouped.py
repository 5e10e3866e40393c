"""Products of each row with the one of several matrices that is chosen for it, for mixtures of experts."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nanoflax import parallel
from nanoflax.kernels.arrays import Array
from nanoflax.kernels.quantized import Quantized, quantized_matmul

MAX_BLOCK = 256  # rows


def blocks_of(ids: Int[Array, " M"], E: int, most: int) -> tuple[Int[Array, " R"], Int[Array, " M"], Int[Array, " n"]]:
    """Rows sorted by expert, in n blocks of R / n rows with one expert each. ids: the expert of each of M tokens, E for
    none; most: how many tokens have one, at most.

    Returns (the token of each row, M in a row without one; the row of each token, R for none; the expert of each
    block, E in a block without rows).
    """
    M = len(ids)
    b = 2 ** int(math.log2(min(max(most / (4 * E), 1), MAX_BLOCK)))  # at most a quarter of the rows are empty
    n = (most + E * (b - 1)) // b
    sizes = jnp.bincount(ids, length=E)
    blocks = -(-sizes // b)
    ends = jnp.cumsum(blocks)
    order = jnp.argsort(ids)
    before = (ends - blocks) * b - (jnp.cumsum(sizes) - sizes)  # empty rows before those of an expert
    rows = jnp.where(ids[order] < E, jnp.arange(M) + before[ids[order]], n * b)
    experts = jnp.searchsorted(ends, jnp.arange(n), side="right")
    return jnp.full(n * b, M).at[rows].set(order), jnp.zeros_like(order).at[order].set(rows), experts


@jax.custom_vjp
def move(x: Float[Array, "M D"], index: Int[Array, " R"], back: Int[Array, " M"]) -> Float[Array, "R D"]:
    """x[index], 0 where index is M. back: the place of each row of x in the result; the gradient reads it, because
    reading rows is faster than adding to them."""
    return x.at[index].get(mode="fill", fill_value=0)


def _move_forward(x, index, back):
    return move(x, index, back), (index, back)


def _move_backward(saved, dy):
    index, back = saved
    return move(dy, back, index), None, None


move.defvjp(_move_forward, _move_backward)


def grouped_matmul(
    x: Float[Array, "n b I"], w: Float[Array, "E I O"] | Quantized, experts: Int[Array, " n"]
) -> Float[Array, "n b O"]:
    """x[i] @ w[experts[i]]. experts: ascending. XLA has a kernel for ragged_dot on TPU and GPU; on CPU it
    multiplies all rows with all experts."""
    product = by_block if parallel.current_platform() == "cpu" else ragged
    return product(x, w, experts)


def by_block(x, w, experts):
    """`grouped_matmul`, one block at a time."""
    return _by_block_quantized(x, w, experts) if isinstance(w, Quantized) else _by_block(x, w, experts)


def _by_block_quantized(x, w, experts):
    def product(block):
        return quantized_matmul(block[0], jax.tree.map(lambda leaf: leaf[block[1]], w))

    return jax.lax.map(product, (x, experts))


@jax.custom_vjp
def _by_block(x: Float[Array, "n b I"], w: Float[Array, "E I O"], experts: Int[Array, " n"]) -> Float[Array, "n b O"]:
    """The gradient that JAX derives takes twice as long: it adds every block's part to all of dw."""
    return jax.lax.map(lambda block: block[0] @ w[block[1]], (x, experts))


def _by_block_backward(saved, dy):
    x, w, experts = saved
    dx = jax.lax.map(lambda block: block[0] @ w[block[1]].T, (dy, experts))
    dw = jnp.zeros_like(w).at[experts].add(jnp.einsum("nbi,nbo->nio", x, dy), mode="drop")
    return dx, dw, None


_by_block.defvjp(lambda x, w, experts: (_by_block(x, w, experts), (x, w, experts)), _by_block_backward)


@jax.custom_vjp
def ragged(x: Float[Array, "n b I"], w: Float[Array, "E I O"] | Quantized, experts: Int[Array, " n"]):
    """`grouped_matmul` as one ragged_dot, which jax.vmap over x and experts leaves one. Gradients under jax.vmap need a
    w for each x: JAX has no rule for ragged_dot with one w."""
    return _of_texts(x, w, experts)


def _ragged(x, w, experts):
    rows = x.shape[1] * jnp.bincount(experts, length=w.shape[0])
    return jax.lax.ragged_dot(x.reshape(-1, x.shape[-1]), w.astype(x.dtype), rows).reshape(*x.shape[:2], -1)


def _ragged_backward(saved, dy):
    x, w, experts = saved
    return *jax.vjp(lambda x, w: _ragged(x, w, experts), x, w)[1](dy), None


ragged.defvjp(lambda *saved: (_ragged(*saved), saved), _ragged_backward)
_of_texts = jax.custom_batching.custom_vmap(_ragged)


@_of_texts.def_vmap
def _together(size, batched, x, w, experts):
    of_all = lambda a, is_batched: a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
    x, experts = of_all(x, batched[0]), of_all(experts, batched[2])
    if any(jax.tree.leaves(batched[1])):
        return jax.vmap(_ragged)(x, w, experts), True
    order = jnp.argsort(experts.reshape(-1))  # ragged_dot needs the blocks of all texts by expert
    y = _of_texts(x.reshape(-1, *x.shape[2:])[order], w, experts.reshape(-1)[order])
    return jnp.zeros_like(y).at[order].set(y).reshape(*x.shape[:3], -1), True
