"""generation_config.json of Transformers, to and from GenerationDefaults."""

import pathlib
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


def read_generation(directory: pathlib.Path, config: dict[str, Any], start_id: int) -> GenerationDefaults:
    """The settings of generation_config.json; without this file those in config.json, as in Transformers.

    config: the parsed config.json. start_id: decoder_start_token_id of the model's training.
    Raises: UserError for a file that cannot be read, or a wrong value.
    """
    path = directory / NAME
    found, where = config, directory / "config.json"
    if path.exists():
        where, found = path, untrusted.json_object(untrusted.read_bytes(directory, NAME), path)
    given = {name: value for name, value in found.items() if value is not None}
    if config is found and given.get("force_bos_token_to_be_generated"):  # BART's files of 2020
        given["forced_bos_token_id"] = given.get("bos_token_id")
    ours = {name: value for name, value in given.items() if name in _KNOWN and name != "unsupported"}
    for name in ("eos_token_id", "forced_eos_token_id", "stop_strings"):
        if isinstance(ours.get(name), int | str):
            ours[name] = [ours[name]]
    if isinstance(ends := ours.get("eos_token_id"), list):
        ours["eos_token_id"] = [i for i in ends if i != -1]  # -1 means that there is none
    if ours.get("decoder_start_token_id") == start_id:
        del ours["decoder_start_token_id"]
    if refused := {name: given[name] for name, off in _UNSUPPORTED.items() if name in given and given[name] not in off}:
        ours["unsupported"] = to_json(refused)
    try:
        generation = from_dict(GenerationDefaults, ours, "generation")
        if problems := fields.value_problems(generation, ""):
            raise UserError("; ".join(problems))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return generation


def write_generation(directory: pathlib.Path, generation: GenerationDefaults, ids: dict[str, Any]) -> None:
    """Write generation_config.json. ids: of special tokens. Settings that we do not read remain from a file that is
    there already, a copy of the source's. Raises: OSError."""
    path = directory / NAME
    old = untrusted.json_object(untrusted.read_bytes(directory, NAME), path) if path.exists() else {}
    found = {name: x for name, x in old.items() if name not in _KNOWN and name not in _UNSUPPORTED} | ids
    for name in _KNOWN:
        value = getattr(generation, name)
        if value != getattr(GenerationDefaults(), name) and name != "unsupported":
            found[name] = value[0] if name.endswith("eos_token_id") and len(value) == 1 else value
    unsupported = untrusted.json_object((generation.unsupported or "{}").encode(), "model.generation.unsupported")
    path.write_text(to_json(found | unsupported, indent=2) + "\n")
