"""How the families of Hugging Face Transformers write rotary positions and the kinds of layers in config.json."""

from collections.abc import Callable, Sequence
from typing import Any

from nanoflax.config import ROPE_SCALINGS, ModelConfig
from nanoflax.errors import UserError

# Name in rope_parameters -> name in RopeConfig.
_NAMES = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "context",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
_OPTIONAL = {"beta_fast", "beta_slow", "truncate", "attention_factor"}
_LAYERS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "delta",
}
_THEIR_LAYERS = {ours: theirs for theirs, ours in _LAYERS.items()}


def read_rope(hf: dict[str, Any], kinds: tuple[str, ...] = ("default", "linear", "llama3")) -> dict[str, Any]:
    """Rotary positions, from rope_parameters (Transformers 5) or from rope_theta and rope_scaling (before).

    kinds: the family's values of rope_type. If hf has rotary_pct, the family can rotate a part of each head.
    Raises: UserError for a value that is not computed.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    local_kind = local.get("rope_type", "default")
    if kind not in kinds:
        raise UserError(f"rope_type={kind!r} is not supported; it must be {' or '.join(kinds)}")
    if local_kind != "default":
        raise UserError(f"rope_type={local_kind!r} in layers with a window is not supported; it must be default")
    scaling = "none" if kind == "default" else kind
    ours: dict[str, Any] = {"rope.theta": rope.get("rope_theta", hf["rope_theta"]), "rope.scaling": scaling}
    if "rope_local_base_freq" in hf:
        ours["rope.local_theta"] = local.get("rope_theta", hf["rope_local_base_freq"])
    if "rotary_pct" in hf:
        ours["rope.fraction"] = rope.get("partial_rotary_factor", hf["rotary_pct"])
    elif (part := rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))) != 1:
        raise UserError(f"partial_rotary_factor={part!r} must be 1")
    for theirs, name in _NAMES.items():
        if name not in ROPE_SCALINGS[scaling]:
            continue
        if name not in _OPTIONAL or rope.get(theirs) is not None:
            ours[f"rope.{name}"] = tuple(rope[theirs]) if isinstance(rope[theirs], list) else rope[theirs]
    return ours


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """Rotary positions as rope_theta and rope_scaling, which every version of Transformers reads."""
    used = ROPE_SCALINGS[c.rope.scaling]
    scaling = {theirs: getattr(c.rope, name) for theirs, name in _NAMES.items() if name in used}
    scaling = {"rope_type": c.rope.scaling} | {name: value for name, value in scaling.items() if value is not None}
    return {"rope_theta": c.rope.theta, "rope_scaling": None if c.rope.scaling == "none" else scaling}


def read_layers(
    hf: dict[str, Any], default: Callable[[int], str], kinds: Sequence[str] = ("full_attention", "sliding_attention")
) -> dict[str, Any]:
    """The kinds of layers and their window.

    default(i): the name of layer i if config.json has no layer_types. kinds: the family's names.
    Raises: UserError for another name.
    """
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window") or 0
    types = hf.get("layer_types") or [default(i) for i in range(layers)]
    if len(types) != layers or set(types) - {*kinds}:
        raise UserError(f"layer_types must be {layers} times {' or '.join(kinds)}, not {types!r}")
    ours = [_LAYERS[name] for name in types]
    if not window:
        ours = ["full" if name in ("sliding", "chunked") else name for name in ours]
    return {"window": window if {"sliding", "chunked"} & set(ours) else 0, "layer_types": tuple(ours)}


def write_layers(c: ModelConfig) -> dict[str, Any]:
    """The kinds of layers and their window, as `read_layers` reads them."""
    types = [_THEIR_LAYERS[c.layer_type(i)] for i in range(c.layers)]
    return {"sliding_window": c.window or None, "layer_types": types}
