"""LoRA on experts in the format of the `peft` library: its target_parameters.

Transformers stacks the experts of a layer: gate_up_proj [E, 2F, D] and down_proj [E, D, F]. peft stores lora_A
[E r, D], the experts one after another, and lora_B [2F, r E], where the expert changes fastest. A module with
adapters on both parameters is wrapped twice, and the first parameter's adapter is inside (`base_layer`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.family import Family

# A parameter of Transformers, in the order of its module -> our Linears, in the order of its rows.
PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_NAME = re.compile(
    r"(?:model\.)?(layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts)(\.base_layer)?\.lora_([AB])\.weight"
)
_DOWN = "decoder/block_{i}/mlp/experts/down/kernel"


def write_experts(
    flat: Mapping[str, Any], config: ModelConfig, family: Family, named: Callable[[str], str]
) -> dict[str, tuple[dict[str, np.ndarray], int, float]]:
    """{name of a parameter: ({name of a tensor: array}, rank, scale)} of the adapters of experts. named: makes a
    name that peft writes from one of the family, such as "model.layers.0.mlp.experts".

    Gate and up share lora_A in peft: if they differ, each has its own ranks, and zeros in the other's rows.
    Raises: UserError for a family whose experts Transformers stacks otherwise.
    """
    found = {}
    if _DOWN not in family.stacked and any("/experts/" in path and path.endswith("/lora_a") for path in flat):
        raise UserError(
            f"adapters of the experts of {family.model_type} cannot be written for the peft library: leave experts out "
            "of peft.targets"
        )
    for i in range(config.layers if _DOWN in family.stacked else 0):
        start = f"decoder/block_{i}/mlp/experts/"
        module = named(family.stacked[_DOWN][0].removesuffix(".down_proj").format(i=i))
        adapted = {name: [x for x in linears if f"{start}{x}/lora_a" in flat] for name, linears in PARAMETERS.items()}
        present = [name for name, linears in adapted.items() if linears]
        for name in present:
            a, b = ({x: np.asarray(flat[f"{start}{x}/lora_{end}"], np.float32) for x in adapted[name]} for end in "ab")
            first = a[adapted[name][0]]
            shared = len(a) == len(PARAMETERS[name]) and all(np.array_equal(first, x) for x in a.values())
            joined = first if shared else np.concatenate([*a.values()], -1)  # [E, in, r]
            columns, used = [], 0
            for linear in PARAMETERS[name]:
                wide = np.zeros((*joined.shape[::2], flat[f"{start}{linear}/kernel"].shape[-1]), np.float32)
                if linear in b:
                    ranks = slice(None) if shared else slice(used, used + b[linear].shape[1])
                    wide[:, ranks] = b[linear]
                    used += b[linear].shape[1]
                columns.append(wide)
            scale, rank = float(flat[f"{start}{adapted[name][0]}/lora_scale"]), joined.shape[-1]
            both = joined.transpose(0, 2, 1), np.concatenate(columns, -1).transpose(2, 1, 0)
            inner = ".base_layer" if name != present[-1] else ""
            tensors = {
                f"{module}{inner}.lora_A.weight": both[0].reshape(-1, joined.shape[1]),
                f"{module}{inner}.lora_B.weight": both[1].reshape(len(both[1]), -1),
            }
            found[f"{module}.{name}"] = tensors, rank, scale
    return found


class ExpertFile:
    """The adapters of experts in the tensors of a file. rest: the other tensors. problems: what does not fit."""

    def __init__(self, tensors: Mapping[str, Any], targets: list[str], config: ModelConfig, kind: str):
        self.config, self.problems, self.adapters = config, [], {}
        names = [name for name in PARAMETERS if any(x.rpartition(".")[2] == name for x in targets)]
        self.problems += [
            f"target_parameters has {x[:200]!r}, and only {' and '.join(PARAMETERS)} of experts have adapters here"
            for x in targets
            if x.rpartition(".")[2] not in PARAMETERS or not config.moe.experts
        ]
        if targets and kind != "lora":
            self.problems.append(f"target_parameters works only with LoRA, in peft too, not with {kind}")
        bias = config.has_bias("mlp") if config.moe.expert_bias is None else config.moe.expert_bias
        if targets and (bias or config.moe.weigh_inputs or not config.gated):
            self.problems.append("target_parameters: experts of gpt-oss and Llama 4 have another order of their rows")
        self.rest = dict(tensors)
        for name in tensors if names and not self.problems else ():
            if (m := _NAME.fullmatch(name)) and config.is_sparse(int(m[2])):
                parameter = f"{m[1]}.{names[0 if m[3] else -1]}"
                self.adapters.setdefault((int(m[2]), parameter), {})[m[4]] = self.rest.pop(name)

    def leaves(self, scale_of: Callable[[str, int], float]) -> dict[str, np.ndarray]:
        """{path: array} of our adapters; adds to `problems`. scale_of: the scale of a module with a rank."""
        c, found = self.config, {}
        E, F = c.moe.experts, c.moe.expert_dim or c.F
        for (i, module), parts in self.adapters.items():
            name = module.rpartition(".")[2]
            n_in, n_out = (F, c.dim) if name == "down_proj" else (c.dim, 2 * F)
            r = parts["A"].shape[0] // E if "A" in parts else 0
            shapes = {part: tuple(x.shape) for part, x in parts.items()}
            if shapes != {"A": (r * E, n_in), "B": (n_out, r * E)}:
                self.problems.append(f"adapter of {module}: shapes {shapes}, not [{E} r, {n_in}], [{n_out}, r {E}]")
                continue
            a = parts["A"].read().reshape(E, r, n_in).transpose(0, 2, 1)
            b = parts["B"].read().reshape(n_out, r, E).transpose(2, 1, 0)
            linears = PARAMETERS[name]
            for linear, part in zip(linears, np.split(b, len(linears), -1), strict=True):
                leaves = {"a": a, "b": part, "scale": np.float32(scale_of(f"model.{module}", r))}
                found |= {f"decoder/block_{i}/mlp/experts/{linear}/lora_{end}": x for end, x in leaves.items()}
        return found
