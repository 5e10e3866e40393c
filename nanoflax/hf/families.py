"""The families of Hugging Face Transformers, and which of them has a configuration. CONTRIBUTING.md: how to add one."""

import contextlib
import dataclasses
import functools
from typing import Any, NoReturn

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.decoders import DECODERS
from nanoflax.hf.encoder_decoders import ENCODER_DECODERS
from nanoflax.hf.encoders import ENCODERS
from nanoflax.hf.family import FIELD_TYPES, Family, Json, differences, with_values
from nanoflax.hf.hybrid import HYBRID
from nanoflax.hf.latent_families import LATENT
from nanoflax.hf.more_decoders import MORE_DECODERS
from nanoflax.hf.sparse import SPARSE

_ALL = (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *MORE_DECODERS, *HYBRID, *SPARSE, *LATENT)
FAMILIES = {family.name: family for family in _ALL}


def family_of_config(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that a configuration is exported as: model_type, or the first that can express it.

    An untied table takes the scale of embeddings that a family does not have. If no family has models without token
    types, the first that can express it with one; see `save`.
    Raises: UserError naming the fields that the nearest family cannot express.
    """
    missing, refused = {}, {}
    same_type = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    for name in FAMILIES if model_type is None else same_type or [model_type]:
        family = family_of_type(name)
        missing[name], refused[name] = _missing(name, config)
        if not missing[name] or missing[name] == ["embed_scale"] and not config.tied:
            return family
    if not config.token_types and ["token_types"] in missing.values():
        with contextlib.suppress(UserError):
            return family_of_config(dataclasses.replace(config, token_types=1), model_type)
    nearest = min(missing, key=lambda name: (missing[name][0] in ("architecture", "head"), len(missing[name])))
    raise UserError(
        f"no family of Transformers ({', '.join(missing)}) has such models; the nearest is {nearest}, "
        f"except {refused[nearest] or ', '.join(with_values(config, missing[nearest]))}"
    )


def families_of_config(config: ModelConfig) -> list[Family]:
    """All families that can express a configuration."""
    return [family for name, family in FAMILIES.items() if not _missing(name, config)[0]]


@functools.lru_cache(256)  # of a few configurations: a model with many adapters has one
def _missing(name, config):
    """(The fields that a family cannot express, why it refuses one of their values)."""
    try:
        return differences(FAMILIES[name], config), ""
    except UserError as error:
        return [*FIELD_TYPES], str(error)


def family_of_json(hf: Json) -> Family:
    """The family of a parsed config.json. Raises: UserError for an unknown model_type."""
    same_type = [f for f in FAMILIES.values() if f.model_type == hf.get("model_type")]
    chosen = [f for f in same_type if f.variant and hf.get(f.variant)] + [f for f in same_type if not f.variant]
    return chosen[0] if chosen else _unsupported(hf.get("model_type"))


def family_of_type(name: Any) -> Family:
    """The family with this name: its model_type and variant. Raises: UserError naming all families."""
    return FAMILIES[name] if isinstance(name, str) and name in FAMILIES else _unsupported(name)


def _unsupported(model_type: Any) -> NoReturn:
    raise UserError(f"model_type={model_type!r} is not supported; supported are " + ", ".join(FAMILIES))
