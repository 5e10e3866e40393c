"""How the families of Hugging Face Transformers write rotary positions and the kinds of layers in config.json."""

import math
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
_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor"}
# The values of rope_type that Transformers computes.
ROPE_KINDS = ("default", *[kind for kind in ROPE_SCALINGS if kind != "none"])
_LAYERS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "delta",
}
_THEIR_LAYERS = {ours: theirs for theirs, ours in _LAYERS.items()}


def read_rope(hf: dict[str, Any], kinds: Sequence[str] = ROPE_KINDS) -> dict[str, Any]:
    """Rotary positions, from rope_parameters (Transformers 5) or from rope_theta and rope_scaling (before).

    kinds: the family's values of rope_type. If hf has rotary_pct, the family can rotate a part of each head.
    Raises: UserError for a value that is not computed.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    by_layer = "full_attention" in rope or "sliding_attention" in rope
    local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or ({} if by_layer else rope)
    kind, local_kind = (part.get("rope_type", part.get("type", "default")) for part in (rope, local))
    if kind not in kinds:
        raise UserError(f"rope_type={kind!r} is not supported; it must be {' or '.join(kinds)}")
    if local_kind != "default":
        raise UserError(f"rope_type={local_kind!r} in layers with a window is not supported; it must be default")
    scaling = "none" if kind == "default" else kind
    ours: dict[str, Any] = {"rope.theta": rope.get("rope_theta", hf["rope_theta"]), "rope.scaling": scaling}
    if "rope_local_base_freq" in hf:
        ours["rope.local_theta"] = local.get("rope_theta", hf["rope_local_base_freq"])
    part = rope.get("partial_rotary_factor", hf.get("rotary_pct", hf.get("partial_rotary_factor", 1)))
    if "rotary_pct" in hf or kind == "proportional":
        ours["rope.fraction"] = part
    elif part != 1:
        raise UserError(f"partial_rotary_factor={part!r} must be 1")
    values = _scaling(hf, rope, kind, by_layer)
    used = {theirs: name for theirs, name in _NAMES.items() if name in ROPE_SCALINGS[scaling]}
    if missing := [name for name, own in used.items() if values[own] is None and own not in _OPTIONAL]:
        raise UserError(f"rope_type={kind!r} needs {', '.join(missing)}")
    return ours | {f"rope.{name}": values[name] for name in used.values() if values[name] is not None}


def _scaling(hf, rope, kind, by_layer):
    """The values of RopeConfig for a scaling, None for those that are absent, with the defaults of Transformers."""
    values = {name: rope.get(theirs) for theirs, name in _NAMES.items()}
    if kind == "dynamic":
        values["context"] = hf.get("max_position_embeddings")
    else:  # the value outside has precedence
        outside = None if by_layer else hf.get("original_max_position_embeddings")
        values["context"] = outside or values["context"] or hf.get("max_position_embeddings")
    for name in ("beta_fast", "beta_slow"):
        values[name] = values[name] or None
    for name in ("short_factors", "long_factors"):
        if not isinstance(values[name] or (), list | tuple):
            raise UserError(f"{name.removesuffix('s')}={values[name]!r} must be a list of numbers")
        values[name] = tuple(map(float, values[name])) if values[name] else None
    truncate = rope.get("truncate", True)
    values["truncate"] = by_layer or (False if truncate is None else truncate)  # read outside of the layers only
    if values["factor"] is None and kind in ("yarn", "longrope", "proportional"):
        values["factor"] = 1.0 if kind == "proportional" else hf["max_position_embeddings"] / values["context"]
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if values["attention_factor"] is None and kind == "yarn" and all(scales):
        over, under = (yarn_scale(float(values["factor"] or 1), scale) for scale in scales)
        values["attention_factor"] = over / under
    return values


def yarn_scale(factor: float, strength: float) -> float:
    """1 + 0.1 m ln(factor), with which a long context changes the scores (DeepSeek-V2, section 3.1.4)."""
    return 1 + 0.1 * strength * math.log(max(factor, 1))


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """Rotary positions as rope_theta and rope_scaling, which every version of Transformers reads."""
    used = ROPE_SCALINGS[c.rope.scaling]
    scaling = {theirs: getattr(c.rope, name) for theirs, name in _NAMES.items() if name in used}
    if c.rope.scaling == "proportional":
        scaling["partial_rotary_factor"] = c.rope.fraction
    if c.rope.scaling == "dynamic":
        del scaling["original_max_position_embeddings"]
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
    if not window and hf.get("layer_types") and {"sliding", "chunked"} & {*ours}:
        raise UserError(
            f"sliding_window={window or None!r} must be positive, and use_sliding_window true if there is one, for "
            f"layer_types={types!r}"
        )
    if not window:
        ours = ["full" if name in ("sliding", "chunked") else name for name in ours]
    return {"window": window if {"sliding", "chunked"} & set(ours) else 0, "layer_types": tuple(ours)}


def write_layers(c: ModelConfig) -> dict[str, Any]:
    """The kinds of layers and their window, as `read_layers` reads them; it refuses a kind that no file has."""
    kinds = map(c.layer_type, range(c.layers))
    types = [_THEIR_LAYERS.get(kind, kind) for kind in kinds]
    return {"sliding_window": c.window or None, "layer_types": types}
