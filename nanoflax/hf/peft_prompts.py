"""Prompt tuning and prefix tuning in the format of the `peft` library, for decoders with rotary or no positions."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import ModelConfig, PrefixTuning, PromptTuning, validate
from nanoflax.errors import UserError
from nanoflax.hf import safetensors_io
from nanoflax.hf.peft_names import CONFIG, WEIGHTS
from nanoflax.nn import angles_of, rotate

PROMPTS = {"PROMPT_TUNING": PromptTuning, "PREFIX_TUNING": PrefixTuning}
_TENSOR = "prompt_embeddings"
_KNOWN = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers prompt_tuning_init
    prompt_tuning_init_text tokenizer_name_or_path encoder_hidden_size init_weights""".split()


def check_prompt(config: ModelConfig, kind: str) -> None:
    """Raises: UserError if peft computes such a model with virtual tokens otherwise than we do.

    peft counts the positions of a text from after the virtual tokens, and we from 0.
    """
    c = config
    if (c.architecture, c.head) != ("decoder", "lm"):
        reason = f"a model with architecture={c.architecture!r} and head={c.head!r}"
    elif c.positions not in ("rotary", "none"):
        reason = f"positions={c.positions!r}: peft counts those of the text from after the virtual tokens"
    elif any(c.is_local(i) for i in range(c.layers)):
        reason = f"window={c.window}: in peft the virtual tokens leave the window"
    elif kind == "prompt" and c.embed_scale != 1:
        reason = f"embed_scale={c.embed_scale}: peft does not scale the prompt"
    else:
        return
    raise UserError(f"peft.kind={kind!r} cannot be exchanged with the peft library for {reason}")


def write_prompt(
    config: ModelConfig, flat: Mapping[str, Any], peft_config: Any, trained: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({name of the tensor: array}, the settings of peft) of the virtual tokens in the flat parameters."""
    check_prompt(config, peft_config.kind)
    if others := sorted(path for path in trained if "prompt" not in path and "prefix_" not in path):
        raise UserError(f"{others[0]} is trained too, and peft saves nothing besides virtual tokens")
    P, L = peft_config.virtual_tokens, config.layers
    if isinstance(peft_config, PromptTuning):
        array, dim, heads = np.asarray(flat["decoder/prompt"], np.float32), config.dim, config.heads
    else:
        dim, heads = config.G * config.K, config.G
        pairs = [
            flat[f"decoder/block_{i}/attention/prefix_{name}"] for i in range(L) for name in ("key", "value")
        ]  # [P, G K] each
        pairs[::2] = [_turned(config, x, P) for x in pairs[::2]]
        array = np.stack([np.asarray(x, np.float32) for x in pairs], 1).reshape(P, -1)
    kind = next(name for name, cls in PROMPTS.items() if isinstance(peft_config, cls))
    sizes = {"num_virtual_tokens": P, "token_dim": dim, "num_attention_heads": heads, "num_layers": L}
    more = {"prefix_projection": False} if kind == "PREFIX_TUNING" else {"prompt_tuning_init": "RANDOM"}
    return {_TENSOR: array}, {"peft_type": kind, "num_transformer_submodules": 1} | sizes | more


def read_prompt(
    directory: str | pathlib.Path, theirs: Mapping[str, Any], config: ModelConfig, params: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """`adapters.load_adapter` for virtual tokens. theirs: the parsed adapter_config.json."""
    wrong = sorted(name for name, value in theirs.items() if value and name not in _KNOWN)
    path = pathlib.Path(directory, CONFIG)
    safetensors_io.raise_problems(path, [f"{name}={str(theirs[name])[:200]} is not supported" for name in wrong])
    c = PROMPTS[theirs["peft_type"]](virtual_tokens=theirs.get("num_virtual_tokens"))
    validate(c)
    check_prompt(config, c.kind)
    P, L, GK = c.virtual_tokens, config.layers, config.G * config.K
    shape = (P, config.dim if c.kind == "prompt" else L * 2 * GK)
    tensors = safetensors_io.open_safetensors(directory, single=WEIGHTS)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != {_TENSOR: shape}:
        sizes = ", ".join(f"{name} {list(size)}" for name, size in found.items())
        raise UserError(f"{pathlib.Path(directory, WEIGHTS)} must hold {_TENSOR} {list(shape)} alone, not {sizes}")
    array = jnp.asarray(tensors[_TENSOR].read(), jnp.float32)
    if c.kind == "prompt":
        new = {"decoder/prompt": array}
    else:
        pairs = array.reshape(P, L, 2, GK)
        new = {}
        for i in range(L):
            start = f"decoder/block_{i}/attention/prefix_"
            new |= {f"{start}key": _turned(config, pairs[:, i, 0], -P), f"{start}value": pairs[:, i, 1]}
    return unflatten_dict(flatten_dict(params, sep="/") | new, sep="/"), c


def _turned(config: ModelConfig, keys: Any, positions: int) -> Any:
    """Keys [P, G K], turned by a number of rotary positions: a text that begins that much later sees them as before."""
    if config.positions != "rotary":
        return keys
    x = jnp.asarray(keys, jnp.float32).reshape(1, len(keys), config.G, config.K)
    angles = angles_of(config, jnp.full((1, len(keys)), positions))
    return rotate(x, angles).reshape(len(keys), -1)
