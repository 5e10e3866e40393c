"""The families of Hugging Face Transformers, and which of them has a configuration. CONTRIBUTING.md: how to add one."""

import contextlib
import dataclasses
import functools
from typing import Any

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.decoders import DECODERS
from nanoflax.hf.encoder_decoders import ENCODER_DECODERS
from nanoflax.hf.encoders import ENCODERS
from nanoflax.hf.family import FIELD_TYPES, Family, Json, differences
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
    missing = {}
    same_type = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    for name in FAMILIES if model_type is None else same_type or [model_type]:
        family = family_of_type(name)
        missing[name] = _missing(name, config)
        if not missing[name] or missing[name] == ["embed_scale"] and not config.tied:
            return family
    if ["token_types"] in missing.values():
        with contextlib.suppress(UserError):
            return family_of_config(dataclasses.replace(config, token_types=1), model_type)
    nearest = min(missing, key=lambda name: (missing[name][0] in ("architecture", "head"), len(missing[name])))
    fields = ", ".join(
        f"model.{name}={getattr(config, name)!r}" if name in FIELD_TYPES else name for name in missing[nearest]
    )
    raise UserError(
        f"no family of Transformers ({', '.join(missing)}) has such models; the nearest is {nearest}, except {fields}"
    )


def families_of_config(config: ModelConfig) -> list[Family]:
    """All families that can express a configuration."""
    return [family for name, family in FAMILIES.items() if not _missing(name, config)]


@functools.lru_cache(256)  # of a few configurations: a model with many adapters has one
def _missing(name, config):
    """The fields that a family cannot express, or why it refuses the configuration."""
    try:
        return differences(FAMILIES[name], config)
    except UserError as error:  # a value that the family refuses
        return [str(error)]


def family_of_json(hf: Json) -> Family:
    """The family of a parsed config.json. Raises: UserError for an unknown model_type."""
    model_type = hf.get("model_type")
    variants = [f for f in FAMILIES.values() if f.model_type == model_type and f.variant and hf.get(f.variant)]
    return variants[0] if variants else family_of_type(model_type)


def family_of_type(model_type: Any) -> Family:
    """The family of a model_type. Raises: UserError naming all of them."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} is not supported; supported are " + ", ".join(FAMILIES))
    return FAMILIES[model_type]
