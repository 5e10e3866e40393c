"""Products and norms of rows, with gradients that take less time or memory than those that JAX derives."""

from functools import partial

import jax
from jaxtyping import Float

from nanoflax import parallel
from nanoflax.kernels.arrays import Array


@jax.custom_vjp
def matmul(x: Float[Array, "*B I"], w: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x @ w, with a faster gradient on CPU: for I > O, dw is the transpose of dy^T x, which XLA computes
    in about half the time of x^T dy."""
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(saved, dy):
    x, w = saved
    dx = dy @ w.T
    if parallel.axis_size("context") == 1:  # otherwise `context` splits a second dimension of the rows
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows = tuple(range(x.ndim - 1))
    product = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    dw = product(dy, x).T if w.shape[0] > w.shape[1] else product(x, dy)
    return dx, dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardise(x: Float[Array, "*B D"], eps: float, centre: bool) -> Float[Array, "*B D"]:
    """x in float32 divided by its root mean square, after its mean is subtracted if `centre`.

    The backward pass keeps only the result and one number per row.
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
