"""Fused kernels that may stand for plain attention: what each can compute, and how it is called.

One is taken only where it computes exactly what is asked: the mask in words (`Facts`), the bias,
the scale, the cap. Otherwise attention is plain.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanoflax import parallel
from nanoflax.errors import UserError


@partial(jax.tree_util.register_dataclass, data_fields=("segments", "valid"), meta_fields=("window",))
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """All that a mask says besides causality, in words that a kernel understands."""

    segments: Any = None  # [B, T] int32: a query sees the keys of its own segment
    valid: Any = None  # [B, S] bool: a query sees the keys that are real
    window: int = 0  # a query sees no key that is so many positions before it, or more; 0: all


class Call(NamedTuple):
    """What a kernel is asked for, as far as it is known when a step is traced."""

    platform: str
    q: tuple  # the shape [B, H, T, K]
    k: tuple  # the shape [B, G, S, K]
    dtype: Any
    causal: bool
    facts: MaskSpec | None  # None: the mask is known as an array alone
    bias: bool
    softcap: float


class Backend(NamedTuple):
    """A row of BACKENDS."""

    platform: str
    refusals: Callable  # Call -> {reason not to take it: whether it holds}
    attend: Callable  # (q, k, v, causal, facts, scale, softcap) -> [B, H, T, K]


def choose(wanted, call):
    """(the name of the backend that serves a call, why no kernel does or ""). wanted: a name or auto.

    Raises: UserError if a kernel is wanted by name and cannot serve.
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
        "prompt and prefix tuning mask by an array": call.facts is None,
    }
    if call.facts is not None:
        refusals |= row.refusals(call)
    why = ", ".join(reason for reason, holds in refusals.items() if holds)
    if why and wanted != "auto":
        raise UserError(f"model.attention_backend={wanted!r} cannot serve: {why}; auto takes it wherever it can")
    return ("plain", f"not {name}: {why}") if why else (name, "")


# cuDNN's FlashAttention, on NVIDIA GPUs.


def _cudnn_refusals(call):
    facts, K, capability = call.facts, call.q[-1], _compute_capability()
    most = 256 if capability >= 9 else 128
    return {
        f"it takes bfloat16 and float16, not {jnp.dtype(call.dtype).name}": jnp.dtype(call.dtype).name
        not in ("bfloat16", "float16"),
        f"heads of {K} are not a multiple of 8 up to {most}": K % 8 > 0 or K > most,
        "the GPU is older than Ampere": capability < 8,
        "scores have a softcap": call.softcap > 0,
        "packed documents need a mask of segments": facts.segments is not None,
        "a window without causality": facts.window > 0 and not call.causal,
        "padding beside causality": facts.valid is not None and call.causal,
        "causality between sequences of two lengths": call.causal and call.q[2] != call.k[2],
    }


@functools.cache
def _compute_capability():
    """Of the first GPU; of one that is only compiled for, that of the newest."""
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    return float(gpus[0].compute_capability) if gpus else 9.0


def cudnn(q, k, v, causal, facts, scale=None, softcap=0.0):
    """`attention.heads_first` by cuDNN. A row without one real key is finite, but not the mean."""
    lengths, seq = None, lambda x: x.swapaxes(1, 2)  # time before heads
    q, k, v = seq(q), seq(k), seq(v)
    if facts.valid is not None:
        # Padding is a length to it, and may lie anywhere here: real keys go first, since without
        # causality their order is nothing to attention.
        order = jnp.argsort(~facts.valid, axis=1, stable=True)[:, :, None, None]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
        lengths = jnp.maximum(facts.valid.sum(1), 1).astype(jnp.int32)
    return seq(
        jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            local_window_size=(facts.window - 1, 0) if facts.window else None,
            implementation="cudnn",
        )
    )


# Splash, JAX's attention kernel for TPUs.


def _splash_refusals(call):
    (B, _, T, _), S, rows = call.q, call.k[2], parallel.axis_size("data", "fsdp")
    return {
        f"lengths of {T} and {S} are not multiples of 128": T % 128 > 0 or S % 128 > 0,
        f"{B} rows are not divisible by data x fsdp = {rows}": B % rows > 0,
        "causality between sequences of two lengths": call.causal and T != S,
    }


def splash(q, k, v, causal, facts, scale=None, softcap=0.0, interpret=False):
    """`attention.heads_first` by the Splash kernel, each device its own rows and heads.

    interpret: compute what the kernel says on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    (T, K), S, ids = q.shape[2:], k.shape[2], None
    if facts.segments is not None:
        ids = lib.SegmentIds(facts.segments, facts.segments)
    elif facts.valid is not None:
        valid = facts.valid.astype(jnp.int32)
        ids = lib.SegmentIds(jnp.ones((len(q), T), jnp.int32), valid)
    see = (
        lib.LocalMask((T, S), (facts.window - 1 if facts.window else None, 0 if causal else None), 0)
        if causal or facts.window
        else lib.FullMask((T, S))
    )
    t, s = (next(n for n in (512, 256, 128) if size % n == 0) for size in (T, S))
    blocks = lib.BlockSizes(block_q=t, block_kv=s, block_q_dkv=t, block_kv_dkv=s, block_q_dq=t, block_kv_dq=s)

    def local(q, k, v, ids):
        kernel = lib.make_splash_mha(
            lib.MultiHeadMask([see] * q.shape[1]),
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
