"""The names that the peft library gives to the modules and tensors of a model of Transformers."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nanoflax import untrusted
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError, listed
from nanoflax.hf.family import Family
from nanoflax.hf.layouts import TensorMapping, tensor_mapping

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model."  # prefix of the names in a file
SCHEDULE = {"target_rank": "target_r", "warmup_steps": "tinit", "final_steps": "tfinal", "beta1": "beta1",
            "beta2": "beta2", "orthogonality": "orth_reg_weight"}  # fmt: skip
# Tensors that a module owns but does not read: its forward pass reads tied copies of them.
_UNREAD = re.compile(r"(model\.)?shared\.weight|cls\.predictions\.bias|lm_head\.bias")
_RENAMED = {"embed_out": "lm_head"}  # GPT-NeoX's name in its files -> the module in Transformers 5
# lora_B is [out, rank] in every file, also for a kernel that is not transposed.
_LAYOUT_OF_B = {"same": "transposed", "fused_columns": "fused"}


# Of adapter_config.json; other fields have any type.
_TYPES = {"peft_type": str, "task_type": str, "modules_to_save": list, "target_parameters": list,
          "rank_pattern": dict, "alpha_pattern": dict,
          "trainable_token_indices": list | dict}  # fmt: skip
# A key of alpha_pattern is a regular expression. One without groups and with few repetitions cannot take long.
_SIMPLE_PATTERN = re.compile(r"[\w.\-\\^$|]*([*+][\w.\-\\^$|]*){0,3}")


def read_settings(directory: str | pathlib.Path) -> dict[str, Any]:
    """The parsed adapter_config.json of a directory. Raises: UserError for a field of a wrong type."""
    path = pathlib.Path(directory, CONFIG)
    theirs = untrusted.json_object(untrusted.read_bytes(directory, CONFIG), path)
    wrong = [
        name for name, kind in _TYPES.items() if theirs.get(name) is not None and not isinstance(theirs[name], kind)
    ]
    names = theirs.get("target_parameters") or []
    wrong += ["target_parameters"] * (isinstance(names, list) and not all(isinstance(x, str) for x in names))
    problems = [f"{name}={str(theirs[name])[:200]} has a wrong type" for name in wrong]
    patterns = theirs.get("alpha_pattern") or {}
    problems += [
        f"alpha_pattern has {key[:200]!r}, which is not a simple pattern of names"
        for key in (patterns if isinstance(patterns, dict) else ())
        if not _SIMPLE_PATTERN.fullmatch(key) or not _is_pattern(key)
    ]
    if problems:
        raise UserError(f"{path}: {listed(problems)}")
    return theirs


def _is_pattern(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


class PeftNames:
    """The tensors of a model by the names that peft sees. peft changes modules, so copies of a tied tensor can differ.

    rows: name -> TensorMapping of every tensor. copies: name of a tied copy -> name of its tensor.
    """

    def __init__(self, family: Family, config: ModelConfig):
        self.family, self.config = family, config
        self.rows = {row.name: row for row in tensor_mapping(family, config)}
        heads = config.head in ("lm", "mlm")
        self.copies = {a: b for a, b in family.copies(config).items() if b in self.rows and (heads or a != self.output)}

    def find(self, name: str) -> str | None:
        """The name of a tensor of the model, from its name in a file; a bare model's has no prefix. None: no tensor."""
        known = self.rows.keys() | self.copies.keys()
        renamed = {new: old for old, new in _RENAMED.items()}
        module, _, leaf = name.rpartition(".")
        spellings = (name, self.family.base + name, f"{renamed.get(module)}.{leaf}")
        return next((full for full in spellings if full in known), None)

    def row(self, name: str) -> TensorMapping:
        """The TensorMapping of a tensor or of a tied copy."""
        return self.rows[self.copies.get(name, name)]

    def written(self, name: str) -> str:
        """The name of a module or tensor in the model of Transformers."""
        if self.config.head == "none":
            return name.removeprefix(self.family.base)
        module = name.split(".")[0]
        return name.replace(module, _RENAMED.get(module, module), 1)

    def read_by_model(self, row: TensorMapping) -> list[str]:
        """The names under which the model reads a tensor: itself or tied copies, the one of the output layer last."""
        names = [row.name, *(copy for copy, name in self.copies.items() if name == row.name)]
        read = [name for name in names if not _UNREAD.fullmatch(name)] or names
        return sorted(read, key=lambda name: name == self.output)

    def is_table(self, row: TensorMapping) -> bool:
        """Whether a tensor is an embedding or the output head, which have no adapters here: losses read the table."""
        return row.paths[0].endswith("embedding") or row.paths == ["unembed/kernel"]

    @property
    def has_bias_buffer(self) -> bool:
        """Whether the bias of the logits is in no module (BART), so that peft can neither train nor save it."""
        return any("." not in row.name and row.paths == ["logit_bias"] for row in self.rows.values())

    @property
    def embedding(self) -> str:
        """The name of the weight of the embedding."""
        return f"{self.family.keys['embed']}.weight"

    @property
    def output(self) -> str:
        """The name of the weight of the output layer."""
        return self.family.unembed(self.config)

    @property
    def modules(self) -> set[str]:
        """The names of the modules with tensors, and of the modules around them."""
        parts = [name.split(".")[:-1] for name in (*self.rows, *self.copies)]
        return {".".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}

    def under(self, module: str) -> list[str]:
        """The names of the tensors in a module."""
        return [name for name in (*self.rows, *self.copies) if name.startswith(f"{module}.")]


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules` or in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def split_outputs(row: TensorMapping, tensor: Any, part: int, K: int) -> np.ndarray:
    """The part of lora_B [out, rank] or of a vector [out] that belongs to one of the Linears in a tensor: [rank, out]
    or [out]."""
    rest = tensor.shape[1:]
    shapes = {i: (path, (*rest, shape[-1])) for i, (path, shape) in row.parts.items()}
    outputs = dataclasses.replace(row, layout=_LAYOUT_OF_B.get(row.layout, row.layout), parts=shapes)
    return outputs.read(tensor, part, (slice(None),) * (len(rest) + 1), K)


def join_outputs(row: TensorMapping, parts: Mapping[str, np.ndarray], K: int) -> np.ndarray:
    """The inverse of `split_outputs`, for parts by the path of our kernel."""
    return dataclasses.replace(row, layout=_LAYOUT_OF_B.get(row.layout, row.layout)).join(parts, K)
