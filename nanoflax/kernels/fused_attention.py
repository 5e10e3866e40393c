"""Fused attention kernels: what each can compute, and how it is called.

A kernel is chosen only if it computes exactly the mask, bias, scale and cap that a layer needs.
Otherwise attention is plain (`attention.heads_first`).
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nanoflax import parallel
from nanoflax.errors import UserError
from nanoflax.kernels.arrays import Array, Keys, Queries, SourceMask, Tokens


@partial(jax.tree_util.register_dataclass, data_fields=("segments", "valid"), meta_fields=("window",))
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Segments, valid keys and window, for kernels that take no dense mask. Causality is separate."""

    segments: Tokens | None = None  # a query attends to the keys of its own segment
    valid: SourceMask | None = None  # a query attends to the keys that are True
    window: int = 0  # a query attends to keys fewer than `window` positions before or after it; 0: to all


class Call(NamedTuple):
    """The static properties of an attention call, known when a step is traced."""

    platform: str
    q: tuple[int, ...]  # the shape [B, H, T, K]
    k: tuple[int, ...]  # the shape [B, G, S, K]
    dtype: DTypeLike
    causal: bool
    spec: MaskSpec | None  # None: a MaskSpec cannot describe the mask
    bias: bool
    softcap: float
    sinks: bool = False


class Backend(NamedTuple):
    """A row of BACKENDS."""

    platform: str
    refusals: Callable[[Call], dict[str, bool]]  # {reason against the kernel: whether it applies}
    attend: Callable[..., Array]  # (q, k, v, causal, spec, scale, softcap) -> [B, H, T, K]


def choose(wanted: str, call: Call) -> tuple[str, str]:
    """(the name of the backend for a call, the reasons why it is not a kernel, or ""). wanted: a name or "auto".

    Raises: UserError if a kernel is wanted by name and cannot compute the call.
    """
    name = wanted
    if wanted == "auto":
        name = next((n for n, b in BACKENDS.items() if b.platform == call.platform), "plain")
    if name == "plain":
        return name, ""
    row, context = BACKENDS[name], parallel.axis_size("context")
    refusals = {
        f"it runs on {row.platform}, not {call.platform}": row.platform != call.platform,
        f"context={context} splits the sequence": context > 1,
        "attention has a bias of relative positions": call.bias,
        "the softmax has sinks": call.sinks,
        "prompt tuning, prefix tuning and chunked layers need a dense mask": call.spec is None,
    }
    if call.spec is not None:
        refusals |= row.refusals(call)
    why = ", ".join(reason for reason, applies in refusals.items() if applies)
    if why and wanted != "auto":
        raise UserError(f"model.attention_backend={wanted!r} is not possible: {why}; auto uses it only if possible")
    return ("plain", f"not {name}: {why}") if why else (name, "")


# cuDNN's FlashAttention, on NVIDIA GPUs.


def _cudnn_refusals(call):
    spec, K, dtype, capability = call.spec, call.q[-1], jnp.dtype(call.dtype).name, _compute_capability()
    max_size = 256 if capability >= 9 else 128
    return {
        f"it takes bfloat16 and float16, not {dtype}": dtype not in ("bfloat16", "float16"),
        f"the head size {K} is not a multiple of 8 up to {max_size}": K % 8 > 0 or K > max_size,
        "the GPU is older than Ampere": capability < 8,
        "scores have a softcap": call.softcap > 0,
        "packed documents need a mask of segments": spec.segments is not None,
        "a window without causality": spec.window > 0 and not call.causal,
        "padding with causality": spec.valid is not None and call.causal,
        "causality between sequences of different lengths": call.causal and call.q[2] != call.k[2],
    }


@functools.cache
def _compute_capability():
    """The compute capability of the first GPU; without a GPU (when compiling for one) 9.0."""
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    return float(gpus[0].compute_capability) if gpus else 9.0


def cudnn(q: Queries, k: Keys, v: Keys, causal: bool, spec: MaskSpec, scale: float | None, softcap: float) -> Queries:
    """`attention.heads_first` by cuDNN. A row without a valid key is finite, but not the mean."""
    lengths = None
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # time before heads
    if spec.valid is not None:
        # cuDNN takes the number of valid keys, so move them to the front: attention without causality
        # does not depend on the order of keys.
        order = jnp.argsort(~spec.valid, axis=1, stable=True)[:, :, None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
        lengths = jnp.maximum(spec.valid.sum(1), 1).astype(jnp.int32)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        local_window_size=(spec.window - 1, 0) if spec.window else None,
        implementation="cudnn",
    )
    return y.swapaxes(1, 2)


@jax.custom_vjp
def _planned(q, k, v):
    """Stands for cuDNN's attention in plans: JAX can trace the real operation only on a machine with a GPU."""
    return _planned_forward(q, k, v)[0]


def _planned_forward(q, k, v):
    results = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    y, total = jax.ffi.ffi_call("planned_attention", results)(q, k, v)
    return y, (q, k, v, y, total)


def _planned_backward(saved, dy):
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved[:3]]
    return tuple(jax.ffi.ffi_call("planned_attention_gradient", results)(*saved, dy))


_planned.defvjp(_planned_forward, _planned_backward)


# Splash, JAX's attention kernel for TPUs.


def _splash_refusals(call):
    (B, _, T, _), (_, G, S, _), rows = call.q, call.k, parallel.axis_size(*parallel.BATCH[0])
    tensor = parallel.axis_size("tensor")
    return {
        f"lengths of {T} and {S} are not multiples of 128": T % 128 > 0 or S % 128 > 0,
        f"{B} rows are not divisible by data x fsdp x expert = {rows}": B % rows > 0,
        f"{G} heads are not divisible by tensor = {tensor}": G % tensor > 0,
        "causality between sequences of different lengths": call.causal and T != S,
    }


def splash(
    q: Queries,
    k: Keys,
    v: Keys,
    causal: bool,
    spec: MaskSpec,
    scale: float | None,
    softcap: float,
    interpret: bool = False,
) -> Queries:
    """`attention.heads_first` by the Splash kernel; each device computes its own rows and heads.

    interpret: run the kernel's code on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    (T, K), S, ids = q.shape[2:], k.shape[2], None
    if spec.segments is not None:
        ids = lib.SegmentIds(spec.segments, spec.segments)
    elif spec.valid is not None:
        valid = spec.valid.astype(jnp.int32)
        ids = lib.SegmentIds(jnp.ones((len(q), T), jnp.int32), valid)
    mask = lib.FullMask((T, S))
    if causal or spec.window:
        side = spec.window - 1 if spec.window else None
        mask = lib.LocalMask((T, S), (side, 0 if causal else side), 0)
    t, s = (next(n for n in (512, 256, 128) if size % n == 0) for size in (T, S))
    blocks = lib.BlockSizes(block_q=t, block_kv=s, block_q_dkv=t, block_kv_dkv=s, block_q_dq=t, block_kv_dq=s)

    def local(q, k, v, ids) -> Any:
        kernel = lib.make_splash_mha(
            lib.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, ids)

    q = q * (K**-0.5 if scale is None else scale)
    return parallel.map_shards(local, (q, k, v), ids)


BACKENDS = {"cudnn": Backend("gpu", _cudnn_refusals, cudnn), "splash": Backend("tpu", _splash_refusals, splash)}


def attend_by(name: str, q: Queries, k: Keys, v: Keys, causal: bool, spec: Any, *options: Any) -> Queries:
    """`attention.heads_first` by the backend that `choose` named. options: scale, softcap."""
    if name == "cudnn" and jax.default_backend() != "gpu":
        return _planned(q, k, v)
    return BACKENDS[name].attend(q, k, v, causal, spec, *options)
