"""Cross entropy of tokens, and its sum over a batch without all logits in memory at once.

Sums: the caller divides by the global count of target tokens.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from nanoflax import parallel
from nanoflax.kernels.arrays import Array


def mask_padding(logits: Float[Array, "*B V"], padding: int) -> Float[Array, "*B V"]:
    """Logits with -inf in the last `padding` columns: config.vocab_padding ids have no probability and no gradient."""
    V = logits.shape[-1]
    return jnp.where(jnp.arange(V) < V - padding, logits, -jnp.inf) if padding else logits


def token_losses(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(the objective, the plain cross entropy) of each token in nats, float32.

    The objective is the cross entropy with z_loss * log(Z)^2 added (Chowdhery et al. 2022, section 5)
    and the targets mixed with the uniform distribution by label_smoothing (Szegedy et al. 2016, section 7).
    """
    logits = logits.astype(jnp.float32)
    return _token_losses(logits, jax.nn.logsumexp(logits, axis=-1), targets, z_loss, label_smoothing)


def most_probable(
    logits: Float[Array, "*B V"], token: Int[Array, "*B"], n: int
) -> tuple[Float[Array, "*B"], Int[Array, "*B n"], Float[Array, "*B n"]]:
    """(the log-probability of each token, the ids of the n most probable tokens, best first, and theirs), in nats."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    best, ids = jax.lax.top_k(logp, n)
    return jnp.take_along_axis(logp, token[..., None], -1)[..., 0], ids, best


def _token_losses(logits, log_z, targets, z_loss, label_smoothing, padding=0):
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    objective = nll
    if label_smoothing:
        mean = logits.mean(axis=-1, where=~jnp.isneginf(logits) if padding else None)
        objective = (1 - label_smoothing) * nll + label_smoothing * (log_z - mean)
    if z_loss:
        objective = objective + z_loss * log_z**2
    return objective, nll


def _log_normaliser(logits):
    """log(sum(exp(logits))) of each row, without a gradient. On a GPU the maximum and the sum are one reduction, which
    reads the logits once (Milakov and Gimelshein 2018)."""
    if parallel.current_platform() != "gpu" or parallel.axis_size("tensor", "fsdp") > 1:  # these may split V
        return jax.nn.logsumexp(logits, axis=-1)

    def join(a, b):
        most = jnp.maximum(a[0], b[0])
        return most, a[1] * jnp.exp(a[0] - most) + b[1] * jnp.exp(b[0] - most)

    first = (jnp.finfo(logits.dtype).min, jnp.zeros((), logits.dtype))
    most, total = jax.lax.reduce((logits, jnp.ones_like(logits)), first, join, (logits.ndim - 1,))
    return most + jnp.log(total)


def chunks_of(B: int, T: int, V: int, least: int = 512) -> int:
    """The number of pieces of T for the loss of [B, T] targets: a divisor of T such that a piece has about 2^22
    logits (the cache of a CPU; elsewhere 2^28 on each device), and at least `least` targets."""
    budget = 2**22 if parallel.current_platform() == "cpu" else 2**28 * parallel.axis_size(*parallel.AXES)
    wanted = min(-(-B * T * V // budget), max(1, B * T // least))
    return max(n for n in range(1, T + 1) if T % n == 0 and n <= max(wanted, 1))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9, 10))
def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    chunks: int = 1,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    padding: int = 0,
    of_rows: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """Weighted sums of `token_losses`, from hidden states, without holding all logits at once.

    kernel, bias: of the output head; softcap: logits become cap tanh(logit / cap), 0 for none; padding:
    the number of columns at the end of V that are no tokens (config.vocab_padding).
    Computes `chunks` pieces of T one after another. Under jax.grad, the forward pass also computes the
    gradients, so that the logits of a piece are computed once (as in Liger Kernel, Hsu et al. 2024).
    Returns (sum of objectives, sum of cross entropies), float32, and if of_rows, the cross entropies summed in each
    row [B]. Only the first sum has a gradient.
    """
    options = (chunks, z_loss, label_smoothing, softcap, padding, of_rows)
    return _chunked(hidden, kernel, targets, weights, bias, *options, gradients=False)[0]


def _pad_vocabulary(kernel, bias):
    """(kernel, bias, the number of columns added): on a GPU, products with V a multiple of 128 take half the time."""
    extra = -kernel.shape[1] % 128 if parallel.current_platform() == "gpu" else 0
    if extra:
        kernel = jnp.pad(kernel, [(0, 0), (0, extra)])
        bias = bias if bias is None else jnp.pad(bias, (0, extra))
    return kernel, bias, extra


def _chunked(
    hidden, kernel, targets, weights, bias, chunks, z_loss, label_smoothing, softcap, padding, of_rows, gradients
):
    # On a mesh, fsdp splits V here if it divides V, instead of the rows: each device then sums the
    # gradient of its own part of the kernel. b and t are the numbers of splits of B and T. There is one
    # sum per split; these sums are reduced once at the end, not once per chunk. In an einsum i and j count the splits.
    B, T, D = hidden.shape
    V = kernel.shape[1]
    kernel, bias, extra = _pad_vocabulary(kernel, bias)
    padding += extra
    fits = kernel.shape[1] % parallel.axis_size("tensor", "fsdp") == 0
    # The axes of the mesh that split the rows, and V.
    rows, vocabulary = (("data", "expert"), ("tensor", "fsdp")) if fits else (parallel.BATCH[0], ("tensor",))
    b, t = parallel.batch_splits(B, T, rows)
    chunks = math.gcd(chunks, T // t)
    of_pieces = P(rows, "context", None, None)
    kernel = parallel.constrain(kernel.astype(hidden.dtype), P(None, vocabulary))

    def piece(carry, xs):
        loss, nll, dkernel, dbias = carry
        h, targets, weights = (parallel.constrain(x, of_pieces) for x in xs)
        logits = jnp.einsum("ijbtd,dv->ijbtv", h, kernel, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += bias
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        logits = mask_padding(logits, padding)
        log_z = _log_normaliser(logits)
        objective, plain = _token_losses(logits, log_z, targets, z_loss, label_smoothing, padding)
        loss, nll = loss + (objective * weights).sum((2, 3)), nll + (plain * weights).sum(3 if of_rows else (2, 3))
        if not gradients:
            return (loss, nll, dkernel, dbias), None
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        probability = jnp.exp(logits - log_z[..., None])
        dlogits = weights[..., None] * (
            probability * (1 + 2 * z_loss * log_z)[..., None]
            - (1 - label_smoothing) * hit
            - label_smoothing / (logits.shape[-1] - padding)
        )
        if softcap:
            dlogits *= 1 - (logits / softcap) ** 2
        if padding:
            dlogits = jnp.where(jnp.isneginf(logits), 0, dlogits)
        if bias is not None:
            dbias += dlogits.sum((2, 3))
        dlogits = dlogits.astype(h.dtype)
        dh = jnp.einsum("ijbtv,dv->ijbtd", dlogits, kernel)
        dh = parallel.constrain(dh, P(rows, "context", "fsdp" if fits else None))
        dkernel += jnp.einsum("ijbtd,ijbtv->ijdv", h, dlogits, preferred_element_type=jnp.float32)
        return (loss, nll, dkernel, dbias), dh

    def split(x):  # [B, T, ...] -> [chunks, b, t, B / b, T / t / chunks, ...]
        x = x.reshape(b, B // b, t, chunks, -1, *x.shape[2:])
        return x.transpose(3, 0, 2, 1, 4, *range(5, x.ndim))

    pieces = jax.tree.map(split, (hidden, targets, weights))

    def zeros(*shape):
        axes = P(rows, "context", *[None] * (len(shape) - 1), *[vocabulary] * bool(shape))
        return parallel.constrain(jnp.zeros((b, t, *shape), jnp.float32), axes)

    dkernel = zeros(*kernel.shape) if gradients else None
    dbias = None if bias is None else zeros(*bias.shape)
    carry = (zeros(), jnp.zeros((b, t, B // b)) if of_rows else zeros(), dkernel, dbias)
    if chunks == 1:
        carry, dh = piece(carry, jax.tree.map(lambda x: x[0], pieces))
        dh = jax.tree.map(lambda x: x[None], dh)
    else:
        carry, dh = jax.lax.scan(piece, carry, pieces)
    if gradients:
        dh = dh.transpose(1, 3, 2, 0, 4, 5).reshape(B, T, D)  # type: ignore  # not None with gradients
    loss, nll, dkernel, dbias = jax.tree.map(lambda x: x.sum((0, 1)), carry)
    sums = (loss, nll.sum(), carry[1].sum(1).reshape(B)) if of_rows else (loss, nll)
    return sums, (dh, *jax.tree.map(lambda x: x[..., :V], (dkernel, dbias)))


def _chunked_forward(hidden, kernel, targets, weights, bias, *options):
    sums, (dh, dkernel, dbias) = _chunked(hidden, kernel, targets, weights, bias, *options, gradients=True)
    return sums, (dh, dkernel.astype(kernel.dtype), dbias if bias is None else dbias.astype(bias.dtype))


def _chunked_backward(chunks, z_loss, label_smoothing, softcap, padding, of_rows, saved, cotangents):
    dh, dkernel, dbias = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), saved)
    return dh, dkernel, None, None, dbias


chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward)
