"""Adapters in the format of the `peft` library: LoRA, DoRA, AdaLoRA, and modules that were trained in full."""

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax import report
from nanoflax.config import PEFT_KINDS, AdaLoRA, LoRA, LowRank, ModelConfig, validate
from nanoflax.errors import UserError, listed
from nanoflax.hf import families, safetensors_io
from nanoflax.hf.layouts import tensor_mapping
from nanoflax.nn import without_padding
from nanoflax.peft import trainable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KNOWN = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision
    inference_mode r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias
    use_rslora use_dora init_lora_weights layers_to_transform layers_pattern rank_pattern
    modules_to_save megatron_core qalora_group_size ensure_weight_tying target_r init_r tinit tfinal
    deltaT beta1 beta2 orth_reg_weight total_step""".split()
_SCHEDULE = {"target_rank": "target_r", "warmup_steps": "tinit", "final_steps": "tfinal", "beta1": "beta1",
             "beta2": "beta2", "orthogonality": "orth_reg_weight"}  # fmt: skip
_TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


def save_adapter(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: dict[str, Any],
    peft_config: Any,
    base: str = "",
    model_type: str | None = None,
) -> None:
    """Write the low-rank adapters in params for the `peft` library, which adds them to the model of `hf.save`.

    Other modules that peft_config.trained names, such as a head, become modules_to_save of `peft`, without rows of
    config.vocab_padding.

    Args:
      base: the name or directory of the model, for peft's Auto classes.
      model_type: the family of the model, as in `hf.save`.
    Raises:
      UserError: other kinds of adapters, adapters of Linears that are one tensor in Transformers (GPT-2's c_attn), a
        module trained in part, or what `hf.save` refuses.
    """
    config, params = without_padding(config, params)
    c = peft_config
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    modules = _linears(_modules(config, model_type))
    linears = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not isinstance(c, LowRank) or not linears:
        raise UserError(f"peft.kind={c.kind!r} cannot be written for the peft library; lora, dora and adalora can")
    safetensors_io.raise_problems(
        directory,
        [
            f"{path} is a part of {modules[path][0]}, which peft adapts as one; leave it out of peft.targets"
            for path in linears
            if modules[path][1] not in ("transposed", "same")
        ],
    )
    tensors, rank_pattern = {}, {}
    for path in linears:
        name = modules[path][0]
        leaf = lambda end, path=path: np.asarray(flat[f"{path}/lora_{end}"], np.float32)
        a, b = leaf("a").T, leaf("b").T
        if isinstance(c, AdaLoRA):
            kept = leaf("mask") > 0
            rank_pattern[f"{name}.lora_E"] = kept.tolist()
            parts = {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": leaf("e")[kept, None]}
        else:
            parts = {"lora_A.weight": a, "lora_B.weight": b}
        if c.kind == "dora":
            parts["lora_magnitude_vector"] = leaf("magnitude")
        tensors |= {f"{_BASE}{name}.{part}": x for part, x in parts.items()}
    complete = _complete_modules(config, model_type, flat, flatten_dict(trainable(params, c), sep="/"))
    tensors |= {f"{_BASE}{name}": x for name, x in complete.items()}
    theirs = {
        "peft_type": "ADALORA" if isinstance(c, AdaLoRA) else "LORA",
        "task_type": _TASKS.get(config.architecture) if config.head == "lm" else None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in complete}) or None,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "target_modules": [modules[path][0] for path in linears],
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(modules[path][1] == "same" for path in linears),
        "use_rslora": isinstance(c, LoRA) and c.rank_stabilized,
        "use_dora": c.kind == "dora",
    }
    if not isinstance(c, AdaLoRA):
        theirs["r"] = c.rank
    else:
        # peft needs the full schedule, even if training has ended.
        theirs |= {name: getattr(c, ours) for ours, name in _SCHEDULE.items()} | {
            "init_r": c.rank,
            "total_step": c.warmup_steps + c.final_steps + 1,
            "rank_pattern": rank_pattern,
        }
    safetensors_io.save_safetensors(
        directory, [(name, x.shape, x.dtype, x) for name, x in tensors.items()], single=WEIGHTS
    )
    try:
        pathlib.Path(directory, CONFIG).write_text(report.to_json(theirs, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def _complete_modules(config, model_type, flat, trained):
    """Name in Transformers -> array, for the modules that are trained completely."""
    problems, tensors = [], {}
    for name, rows in _modules(config, model_type).items():
        paths = [path for row in rows for path in row.paths]
        frozen = [path for path in paths if not trained[path]]
        if len(frozen) == len(paths):
            continue
        if frozen or any(row.layout not in ("transposed", "same") for row in rows):
            problems.append(f"peft saves complete modules, but peft.trained names only a part of {name}")
        if any(f"{path.removesuffix('kernel')}lora_a" in flat for path in paths):
            problems.append(f"peft cannot both adapt {name} and save it as a complete module")
        tensors |= {
            row.name: np.asarray(flat[path].T if row.layout == "transposed" else flat[path])
            for row in rows
            for path in row.paths
        }
    if problems:
        raise UserError(listed(problems, 4))
    return tensors


def base_of_adapter(directory: str | pathlib.Path) -> str | None:
    """The base model that is named in a directory of adapters; None if the directory has no adapters.

    Raises: UserError if the adapters name no base model.
    """
    path = pathlib.Path(directory) / CONFIG
    if not path.exists():
        return None
    base = safetensors_io.read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path={base!r} must name the model that the adapters belong to")
    return base


def load_adapter(
    directory: str | pathlib.Path, config: ModelConfig, params: dict[str, Any], model_type: str | None = None
) -> tuple[dict[str, Any], Any]:
    """Add LoRA, DoRA or AdaLoRA of the `peft` library to params, and replace the modules in its modules_to_save.

    config, model_type: as in `save_adapter`; params: without adapters.
    Returns: (params, the config of the adapters, whose `trained` names the replaced modules).
    Raises: UserError with every unsupported setting, or with every tensor that is unexpected, missing or misshapen.
    """
    path = safetensors_io.locate(directory, CONFIG)
    theirs = safetensors_io.read_json(path)
    c, patterns = _from_theirs(theirs, path)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    problems, parts, new = [], {}, {}
    modules = _modules(config, model_type)
    ours = {name: place for place, (name, layout) in _linears(modules).items() if layout in ("transposed", "same")}
    ends = "|".join(map(re.escape, theirs.get("modules_to_save") or ()))
    complete = {
        row.name: row
        for name, rows in modules.items()
        for row in rows
        if ends and re.search(rf"({ends})(\.|$)", name) and row.layout in ("transposed", "same")
    }
    for name, tensor in safetensors_io.open_safetensors(directory, single=WEIGHTS).items():
        m = _TENSOR.fullmatch(name)
        row = complete.pop(name.removeprefix(_BASE), None)
        if row is not None and tensor.shape == row.shape:
            x, path = tensor.read(), row.paths[0]
            new[path] = jnp.asarray(x.T if row.layout == "transposed" else x, jnp.float32)
        elif row is not None:
            problems.append(f"{name} has shape {list(tensor.shape)}, not {list(row.shape)}")
        elif m and m[1] in ours:
            parts.setdefault(m[1], {})[m[2]] = tensor
        else:
            problems.append(f"{name} has no place in this model")
    problems += [f"{_BASE}{name} is missing, but modules_to_save names it" for name in complete]
    if not parts:
        problems.append("the file has no adapter")
    saved = sorted({path.rpartition("/")[0] or path for path in new})
    c = dataclasses.replace(c, trained=",".join(["adapters", *saved]) if saved else "")
    for name, tensors in parts.items():
        place = ours[name]
        wrong = _problems(c, name, tensors, flat[f"{place}/kernel"].shape, patterns)
        problems += wrong
        if not wrong:
            arrays = {part: tensor.read() for part, tensor in tensors.items()}
            leaves = _leaves(c, arrays, patterns.get(f"{name}.lora_E"))
            new |= {f"{place}/{leaf}": jnp.asarray(x, jnp.float32) for leaf, x in leaves.items()}
    safetensors_io.raise_problems(pathlib.Path(directory, WEIGHTS), problems)
    return unflatten_dict(flat | new, sep="/"), c


_BASE = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_[ABE]|lora_magnitude_vector)(\.weight)?")


def _modules(config, model_type):
    """The tensors of each module in Transformers, by its name."""
    family, modules = families.family_of_config(config, model_type), {}
    for row in tensor_mapping(family, config):
        name = row.name.removeprefix(family.base) if config.head == "none" else row.name
        modules.setdefault(name.rpartition(".")[0], []).append(dataclasses.replace(row, name=name))
    return modules


def _linears(modules):
    """Path of our Linear -> (name in Transformers, layout of the kernel there)."""
    return {
        path.removesuffix("/kernel"): (name, row.layout)
        for name, rows in modules.items()
        for row in rows
        for path in row.paths
        if path.endswith("/kernel")
    }


def _from_theirs(theirs, path):
    """(our LoRA, DoRA or AdaLoRA config, rank_pattern) of peft's adapter_config.json."""
    patterns, complete = theirs.get("rank_pattern") or {}, theirs.get("modules_to_save") or []
    adalora, init = theirs.get("peft_type") == "ADALORA", theirs.get("init_lora_weights")
    wrong = {name for name, value in theirs.items() if value and name not in _KNOWN}
    wrong |= {
        name
        for name, fine in [
            ("peft_type", adalora or theirs.get("peft_type") == "LORA"),
            ("bias", theirs.get("bias", "none") == "none"),
            ("modules_to_save", isinstance(complete, list) and all(isinstance(x, str) for x in complete)),
            ("use_rslora", not (adalora and theirs.get("use_rslora"))),
            ("init_lora_weights", init in (None, True, False, "gaussian")),  # other values change the kernels
            (
                "rank_pattern",
                isinstance(patterns, dict)
                and all(
                    isinstance(x, list) and all(type(keep) is bool for keep in x) if adalora else type(x) is int
                    for x in patterns.values()
                ),
            ),
        ]
        if not fine
    }
    safetensors_io.raise_problems(
        path, [f"{name}={str(theirs.get(name))[:200]} is not supported" for name in sorted(wrong)]
    )
    kind = "adalora" if adalora else "dora" if theirs.get("use_dora") else "lora"
    own = _SCHEDULE if adalora else {"rank_stabilized": "use_rslora"}
    rank = theirs.get("init_r", 12) if adalora else theirs.get("r", 8)
    c = PEFT_KINDS[kind](
        rank=rank,
        alpha=theirs.get("lora_alpha", 8),
        **{ours: theirs[name] for ours, name in own.items() if name in theirs},
    )
    validate(c)
    return c, patterns


def _problems(c, name, tensors, kernel, patterns):
    """The problems of the tensors {part: Tensor} of a module whose kernel has this shape."""
    wanted = {"lora_A", "lora_B", *{"dora": ["lora_magnitude_vector"], "adalora": ["lora_E"]}.get(c.kind, [])}
    if tensors.keys() != wanted:
        return [f"{name} has {', '.join(sorted(tensors))} and needs {', '.join(sorted(wanted))}"]
    r, (D_in, D_out) = next(iter(tensors["lora_A"].shape), 0), kernel
    shapes = {"lora_A": (r, D_in), "lora_B": (D_out, r), "lora_E": (r, 1), "lora_magnitude_vector": (D_out,)}
    problems = [
        f"{x.name} has shape {list(x.shape)}, not {list(shapes[part])}"
        for part, x in tensors.items()
        if x.shape != shapes[part]
    ]
    kept = patterns.get(f"{name}.lora_E", [True] * c.rank)
    if isinstance(c, AdaLoRA) and (len(kept), sum(kept)) != (c.rank, r):
        problems.append(
            f"{name}: rank_pattern keeps {sum(kept)} of {len(kept)} ranks, but the tensors have {r} of init_r={c.rank}"
        )
    return problems


def _leaves(c, arrays, kept):
    """The leaves of our Linear from the arrays in the file. kept: list of bool, the ranks of AdaLoRA in the arrays."""
    a, b = arrays["lora_A"].T, arrays["lora_B"].T
    if isinstance(c, AdaLoRA):
        mask = np.ones(c.rank, bool) if kept is None else np.array(kept)
        place = np.eye(c.rank)[mask]  # [kept, rank]
        return {
            "lora_scale": c.alpha / c.rank,
            "lora_a": a @ place,
            "lora_b": place.T @ b,
            "lora_e": arrays["lora_E"][:, 0] @ place,
            "lora_mask": mask,
        }
    scale = dataclasses.replace(c, rank=len(b)).scale  # rank_pattern may give each Linear its own
    magnitude = {"lora_magnitude": arrays["lora_magnitude_vector"]} if c.kind == "dora" else {}
    return {"lora_scale": scale, "lora_a": a, "lora_b": b} | magnitude
