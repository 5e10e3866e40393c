"""generation_config.json of Transformers, to and from GenerationDefaults."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from nanoflax import untrusted
from nanoflax.config import GenerationDefaults, fields, from_dict
from nanoflax.errors import UserError
from nanoflax.report import to_json

NAME = "generation_config.json"
_KNOWN = fields.field_types(GenerationDefaults)
# Settings that nanoflax does not compute -> their values without effect, besides None. Other settings in a file, such
# as those of caches and outputs, do not change the generated tokens.
_UNSUPPORTED = {
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "num_beam_groups": (1,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "max_time": (),
}
# The values of numbers that Transformers' `generate` takes for no setting, although nanoflax refuses them.
_IGNORED: dict[str, Callable[[float], bool]] = {
    **dict.fromkeys(("top_p", "typical_p"), lambda x: x > 1),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), lambda x: not 0 <= x < 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), lambda x: x < 0),
    **dict.fromkeys(("min_length", "min_new_tokens"), lambda x: x < 0),
}


def read_generation(directory: pathlib.Path, config: dict[str, Any], start_id: int) -> GenerationDefaults:
    """The settings of generation_config.json; without this file those in config.json, as in Transformers.

    config: the parsed config.json. start_id: decoder_start_token_id of the model's training.
    Raises: UserError for a file that cannot be read, or a wrong value.
    """
    path = directory / NAME
    found, where = config, directory / "config.json"
    if path.exists():
        where, found = path, untrusted.json_object(untrusted.read_bytes(directory, NAME), path)
    if config is found and found.get("force_bos_token_to_be_generated"):  # BART's files of 2020
        found = found | {"forced_bos_token_id": found.get("bos_token_id")}
    try:
        return _settings(found, start_id)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _settings(found: dict[str, Any], start_id: Any) -> GenerationDefaults:
    """The settings of a parsed file; what is wrong or not computed is in `unsupported`."""
    given = {name: value for name, value in found.items() if value is not None}
    ours = {name: value for name, value in given.items() if name in _KNOWN and name != "unsupported"}
    for name in ("eos_token_id", "forced_eos_token_id", "stop_strings"):
        if isinstance(ours.get(name), int | str):
            ours[name] = [ours[name]]
    for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if isinstance(ids := ours.get(name), list):  # -1 means that there is none
            ours[name] = [i for i in ids if not isinstance(i, int) or i < -1 or i >= 0]
    for name, is_ignored in _IGNORED.items():
        if isinstance(x := ours.get(name), int | float) and is_ignored(x):
            del ours[name]
    if ours.get("decoder_start_token_id") == start_id:
        ours.pop("decoder_start_token_id", None)
    refused = {name: given[name] for name, off in _UNSUPPORTED.items() if name in given and given[name] not in off}
    for name in [name for name, value in ours.items() if _is_wrong(name, value)]:
        del ours[name]
        refused[name] = given[name]
    return from_dict(GenerationDefaults, ours | {"unsupported": to_json(refused) if refused else ""}, "generation")


def _is_wrong(name: str, value: Any) -> bool:
    try:
        return bool(fields.value_problems(from_dict(GenerationDefaults, {name: value}, "generation"), ""))
    except UserError:
        return True


def write_generation(directory: pathlib.Path, generation: GenerationDefaults, ids: dict[str, Any]) -> None:
    """Write generation_config.json. ids: of special tokens. A file that is there already, a copy of the source's, stays
    if it means the same; else the settings that we do not read remain from it. Raises: OSError."""
    path = directory / NAME
    old = untrusted.json_object(untrusted.read_bytes(directory, NAME), path) if path.exists() else {}
    if old and _means(old, generation, ids):
        return
    found = {name: x for name, x in old.items() if name not in _KNOWN and name not in _UNSUPPORTED} | ids
    for name in _KNOWN:
        value = getattr(generation, name)
        if value != getattr(GenerationDefaults(), name) and name != "unsupported":
            found[name] = value[0] if name.endswith("eos_token_id") and len(value) == 1 else value
    path.write_text(to_json(found | generation.not_computed(), indent=2) + "\n")


def _means(old: dict[str, Any], generation: GenerationDefaults, ids: dict[str, Any]) -> bool:
    """Whether a parsed file gives these settings and special tokens; it may leave out those that end nothing."""
    found = _settings(old, start := ids.get("decoder_start_token_id"))
    own = ids.get("eos_token_id")
    ends = {*generation.eos_token_id} | ({*own} if isinstance(own, list) else {own} - {None})
    return (
        dataclasses.replace(found, eos_token_id=()) == dataclasses.replace(generation, eos_token_id=())
        and {*found.eos_token_id} == ends
        and old.get("decoder_start_token_id") in (start, generation.decoder_start_token_id)
        and all(old.get(name) in (None, ids.get(name)) for name in ("bos_token_id", "pad_token_id"))
    )
