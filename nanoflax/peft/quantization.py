"""Quantised weights in a tree of parameters: the matrices that layers apply in packed form."""

import re
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import PeftConfig
from nanoflax.errors import UserError
from nanoflax.kernels import GROUP, WEIGHT_KINDS, Quantized, is_quantized, quantize
from nanoflax.peft.adapters import trainable

# Not the adapters; not the routers of experts, which are small and decide for all weights; not the matrices that an
# LSTM reads inside a scan.
_KEPT = (
    r"(.*/)?(adapter_\w+/.+|router/kernel|labels/kernel)"
    r"|(query|combine|decoder_\d+|encoder_\d+/(forward|backward))/kernel"
)
_MIN_ROWS = 16  # of outputs: below, the product has no part that is worth dequantising


def is_quantizable(path: str, shape: tuple[int, ...]) -> bool:
    """Whether `quantize_params` packs the parameter: a kernel or a table of tokens whose number of inputs is divisible
    by the size of a group."""
    if path == "embed/embedding":
        inputs, outputs = shape[1], shape[0]
    elif path.endswith("/kernel") and len(shape) > 1 and not re.fullmatch(_KEPT, path):
        inputs, outputs = shape[-2:]
    else:
        return False
    return inputs % GROUP == 0 and outputs >= _MIN_ROWS


def quantize_frozen(params: dict, peft_config: PeftConfig) -> dict:
    """`quantize_params` of the parameters that are not trained, if peft_config.quantize names a kind (QLoRA)."""
    kind = quantization_of(peft_config)
    if not kind:
        return params
    mask: Any = flatten_dict(trainable(params, peft_config), sep="/")
    return quantize_params(params, kind, {path for path, trained in mask.items() if not trained})


def quantization_of(peft_config: PeftConfig) -> str:
    """The kind of the frozen matrices of a fine-tuning; "" for floats."""
    kind = getattr(peft_config, "quantize", "none")
    return "" if kind == "none" else kind


def quantize_params(params: dict, kind: str, paths: Set[str] | None = None) -> dict:
    """Parameters whose matrices are Quantized: int8, or int4. The table of tokens and the output head are always
    int8, because errors of single tokens would be largest there. `jax.eval_shape` works. paths: only these matrices.

    Raises: UserError for another kind, or if no matrix can be quantised.
    """
    if kind not in WEIGHT_KINDS:
        raise UserError(f"quantize={kind!r} is not one of {', '.join(WEIGHT_KINDS)}")
    flat: Any = flatten_dict(params, sep="/")
    chosen = flat.keys() if paths is None else flat.keys() & paths
    found = {path: flat[path] for path in chosen if is_quantizable(path, flat[path].shape)}
    if not found:
        raise UserError(
            f"quantize={kind!r} fits no matrix of this model: none has a number of inputs that {GROUP} divides"
        )
    for path, x in found.items():
        if not isinstance(x, Quantized):
            flat[path] = quantize_array(path, x, kind)
    return unflatten_dict(flat, sep="/")


def quantize_array(path: str, x: Any, kind: str) -> Quantized:
    """The Quantized of one parameter; see `quantize_params`."""
    is_table = path == "embed/embedding"
    return quantize(x, "int8" if is_table or path == "unembed/kernel" else kind, transposed=not is_table)


def dequantize_params(params: dict) -> dict:
    """Parameters with float32 arrays in place of Quantized ones."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_quantized(x) else x, params, is_leaf=is_quantized)
