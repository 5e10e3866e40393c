"""Weights of 8 or 4 bits with a scale for each group of inputs, and products that dequantise a part at a time."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt8

from nanoflax import parallel
from nanoflax.kernels.arrays import Array
from nanoflax.kernels.rows import matmul

GROUP = 32  # inputs with one scale, as in the types Q8_0 and Q4_0 of GGUF
WEIGHT_KINDS = ("int8", "int4")
_PART = 2**20  # weights that a CPU dequantises at a time: 4 MiB, which stay in its cache
_SMALL = 2**16  # weights that it dequantises together: the parts would cost more
_FEW = 2  # rows, for which a product each takes half the time of part @ x.T; for 4 rows it takes longer


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "offsets"],
    meta_fields=["transposed", "by_inputs"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix of O rows, one for each output, of I inputs; or several such matrices.

    In place of a kernel [I, O] it is `transposed`; in place of an embedding [V, D] it is not. A weight is
    scale * value, or scale * value + offset with offsets. `shape`, `dtype`, `T`, `astype` and so on are those of
    the float32 array for which it stands, so that code without a product for it sees that array.
    """

    # Any: JAX also makes trees of this class with shapes or specs as leaves.
    values: Any  # int8 [*E, O, I], or uint8 [*E, O / 2, I] with 4 bits of row o (the low ones) and of row O / 2 + o
    scales: Any  # float16 [*E, O, G], of I / G inputs each
    offsets: Any = None  # float16 [*E, O, G]: then 4 bits are 0 .. 15; without, they are -8 .. 7
    transposed: bool = True
    by_inputs: bool = False  # whether the last two dimensions of the arrays are swapped: see `for_rows`
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.by_inputs:
            (*E, I, _), O = self.values.shape, self.scales.shape[-1]
        else:
            (*E, _, I), O = self.values.shape, self.scales.shape[-2]
        return (*E, I, O) if self.transposed else (*E, O, I)

    @property
    def kind(self) -> str:
        """One of WEIGHT_KINDS."""
        return "int4" if self.values.dtype == jnp.uint8 else "int8"

    @property
    def ndim(self) -> int:
        return len(self.scales.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def T(self) -> "Quantized":
        return dataclasses.replace(self, transposed=not self.transposed)

    def __getitem__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B I"]:
        """The dequantised rows of these ids, as those of an embedding; negative ids count from the end."""
        ids, R = jnp.where(ids < 0, ids + self.scales.shape[-2], ids), len(self.values)
        if _halves(self) == 2:
            values = self.values[ids % R]
            values = jnp.where((ids < R)[..., None], values & 15, values >> 4)
        else:
            values = self.values[ids]
        return _weights(values, self.scales[ids], None if self.offsets is None else self.offsets[ids])

    def astype(self, dtype: DTypeLike) -> Array:
        """The dequantised array."""
        w = dequantize(self).astype(dtype)
        return w.swapaxes(-1, -2) if self.transposed else w


def quantize(w: Float[Array, "*E I O"], kind: str, transposed: bool = True, group: int = GROUP) -> Quantized:
    """A kernel in int8 or int4, rounded to the nearest; not transposed: an embedding [V, D].

    int8: -127 .. 127 times a scale of the largest magnitude / 127; int4: -8 .. 7, where the weight of the largest
    magnitude is -8 (Q8_0 and Q4_0 of GGUF). An odd number of outputs is int8. `group` divides the inputs.
    """
    w = jnp.asarray(w, jnp.float32)
    rows = w.swapaxes(-1, -2) if transposed else w
    grouped = rows.reshape(*rows.shape[:-1], -1, group)
    if kind == "int8" or rows.shape[-2] % 2:
        scales = (jnp.abs(grouped).max(-1) / 127).astype(jnp.float16)
        values = jnp.clip(_divide(grouped, scales), -127, 127).astype(jnp.int8).reshape(rows.shape)
        return Quantized(values, scales, None, transposed)
    largest = jnp.take_along_axis(grouped, jnp.abs(grouped).argmax(-1, keepdims=True), -1)[..., 0]
    scales = (largest / -8).astype(jnp.float16)
    values = (jnp.clip(_divide(grouped, scales), -8, 7) + 8).astype(jnp.uint8).reshape(rows.shape)
    return Quantized(pack(values), scales, None, transposed)


def _divide(grouped, scales):
    scales = scales.astype(jnp.float32)[..., None]
    return jnp.round(jnp.where(scales == 0, 0, grouped / jnp.where(scales == 0, 1, scales)))


def pack(values: UInt8[Array, "*E O I"]) -> UInt8[Array, "*E P I"]:
    """Rows of numbers below 16, two in a byte; O is even."""
    half = values.shape[-2] // 2
    return values[..., :half, :] | values[..., half:, :] << 4


def dequantize(w: Quantized) -> Float[Array, "*E O I"]:
    """The float32 matrix, one row for each output."""
    w = _swapped(w) if w.by_inputs else w
    return jnp.concatenate([_rows(w, half, 0, w.values.shape[-2]) for half in range(_halves(w))], -2)


def for_rows(w: Quantized, rows: int) -> Quantized:
    """The same matrix, with its numbers in the order that is fastest for products of so many rows: on a CPU, x @ part
    takes half the time of part @ x.T for 4 to 16 rows."""
    stays = rows <= _FEW or w.ndim > 2 or w.size <= _SMALL or not w.transposed or w.by_inputs
    return w if stays or parallel.current_platform() != "cpu" else _swapped(w)


def _swapped(w):
    """The same matrix, with the last two dimensions of its arrays swapped."""
    return dataclasses.replace(jax.tree.map(lambda x: x.swapaxes(-1, -2), w), by_inputs=not w.by_inputs)


def is_quantized(x: Any) -> bool:
    """Whether x is a Quantized: the `is_leaf` of jax.tree's functions, for trees of parameters."""
    return isinstance(x, Quantized)


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """A tree with its arrays in a dtype; Quantized matrices stay as they are."""
    return jax.tree.map(lambda x: x if is_quantized(x) else jnp.asarray(x, dtype), tree, is_leaf=is_quantized)


def _halves(w):
    """How many weights are in a number of `values`."""
    return 2 if w.values.dtype == jnp.uint8 else 1


def _rows(w, half, start, size):
    """float32 [*E, size, I]: the low bits (half 0) or the high bits (half 1) of `values` from row `start`. Of a matrix
    by inputs [*E, I, size]."""
    axis = -1 if w.by_inputs else -2
    cut = lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, size, axis)
    values = cut(w.values, start)
    if _halves(w) == 2:
        values = values >> jnp.asarray(4 * half, jnp.uint8) & 15
    first = half * w.values.shape[axis] + start
    scales, offsets = (None if x is None else cut(x, first) for x in (w.scales, w.offsets))
    return _weights(values, scales, offsets, w.by_inputs)


def _weights(values, scales, offsets, by_inputs=False):
    """float32 numbers of values [*B, I] (uint8: 4 bits) and scales [*B, G]; by inputs of [*E, I, O] and [*E, G, O]."""
    *B, last = scales.shape
    q = values.astype(jnp.float32).reshape((*B, -1, last) if by_inputs else (*B, last, -1))
    of_groups = lambda x: jnp.expand_dims(x.astype(jnp.float32), -2 if by_inputs else -1)
    scales = of_groups(scales)
    if offsets is not None:
        return (q * scales + of_groups(offsets)).reshape(values.shape)
    return ((q - 8 if values.dtype == jnp.uint8 else q) * scales).reshape(values.shape)


@jax.custom_vjp
def quantized_matmul(x: Float[Array, "*B I"], w: Quantized) -> Float[Array, "*B O"]:
    """x @ w for one transposed matrix. The gradient of x is that with the dequantised matrix; w gets none.

    A CPU dequantises parts of a large w in turn, each of which is still in its cache for the product. With several rows
    a core reads what another core has written. On cores that share no cache 8 rows take 2.4 times as long. The host of
    a virtual machine may move it between such cores and others within minutes.
    """
    rows = x.reshape(-1, x.shape[-1])
    in_parts = _forward if math.prod(w.shape) > _SMALL else _product
    y = jax.lax.platform_dependent(rows, w, cpu=in_parts, default=_product)
    return y.reshape(*x.shape[:-1], -1)


def multiply(x: Float[Array, "*B I"], w: Float[Array, "I O"] | Quantized) -> Float[Array, "*B O"]:
    """x @ w in the dtype of x, with the faster gradients of `matmul`."""
    return quantized_matmul(x, w) if isinstance(w, Quantized) else matmul(x, w.astype(x.dtype))


def _product(x, w):
    return x @ w.astype(x.dtype)


def _parts(w):
    """The number of parts of the bits of each half of w, and the rows of a part. The last part may overlap the one
    before."""
    R, inputs = w.values.shape[::-1] if w.by_inputs else w.values.shape
    parts = min(R, max(2 // _halves(w), -(-R * inputs // _PART)))
    return parts, -(-R // parts)


def _forward(x, w):
    M, R, halves, (parts, size) = len(x), w.values.shape[-1 if w.by_inputs else 0], _halves(w), _parts(w)
    few = M <= _FEW and not w.by_inputs

    def step(i, y):
        half, start = i // parts, jnp.minimum(i % parts * size, R - size)
        part = _rows(w, half, start, size).astype(x.dtype)
        if few:
            new = jnp.concatenate([x[k : k + 1] @ part.T for k in range(M)])
        else:
            new = x @ part if w.by_inputs else part @ x.T
        return jax.lax.dynamic_update_slice(y, new[None], (half, 0, start) if columns else (half, start, 0))

    columns = few or w.by_inputs
    y = jnp.zeros((halves, M, R) if columns else (halves, R, M), x.dtype)
    y = jax.lax.fori_loop(0, halves * parts, step, y)
    return y.swapaxes(0, 1).reshape(M, -1) if columns else y.reshape(-1, M).T


def _backward(dy, w):
    R, (parts, size) = len(w.values), _parts(w)

    def step(i, dx):
        half, first = i // parts, i % parts * size
        start = jnp.minimum(first, R - size)
        rows = jax.lax.dynamic_slice_in_dim(dy, half * R + start, size, 1)
        rows = jnp.where(start + jnp.arange(size) >= first, rows, 0)  # not again those of the part before
        return dx + rows @ _rows(w, half, start, size).astype(dy.dtype)

    dx = jnp.zeros((len(dy), w.values.shape[1]), jnp.float32)  # also of bfloat16: there are many parts
    return jax.lax.fori_loop(0, _halves(w) * parts, step, dx).astype(dy.dtype)


def _matmul_backward(w, dy):
    rows, w = dy.reshape(-1, dy.shape[-1]), _swapped(w) if w.by_inputs else w
    in_parts = _backward if math.prod(w.shape) > _SMALL else lambda dy, w: dy @ w.astype(dy.dtype).T
    dx = jax.lax.platform_dependent(rows, w, cpu=in_parts, default=lambda dy, w: dy @ w.astype(dy.dtype).T)
    return dx.reshape(*dy.shape[:-1], -1), None


quantized_matmul.defvjp(lambda x, w: (quantized_matmul(x, w), w), _matmul_backward)
