"""Adapters in the format of the `peft` library: LoRA, DoRA, AdaLoRA, modules trained in full, and virtual tokens."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nanoflax import report, storage, tokenizers, untrusted
from nanoflax.config import AdaLoRA, LoRA, LowRank, ModelConfig, PrefixTuning, PromptTuning
from nanoflax.errors import UserError, listed
from nanoflax.hf import families, models, safetensors_io
from nanoflax.hf.layouts import parameter_shapes
from nanoflax.hf.peft_experts import write_experts
from nanoflax.hf.peft_names import BASE, CONFIG, SCHEDULE, WEIGHTS, PeftNames, inside, join_outputs, read_settings
from nanoflax.hf.peft_prompts import PROMPTS, check_prompt, read_prompt, write_prompt
from nanoflax.hf.peft_reader import AdapterFile
from nanoflax.nn import column_lengths, without_padding
from nanoflax.peft import trainable

# Writing.


def save_adapter(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: dict[str, Any],
    peft_config: Any,
    base: str | pathlib.Path = "",
    model_type: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Write the adapters in params for the `peft` library, which adds them to the model of `hf.save`.

    Other modules that peft_config.trained names, such as a head, become modules_to_save of `peft`, without rows of
    config.vocab_padding. A trained tied embedding becomes two of them, because `peft` would train only one. Adapters
    of several Linears that are one in Transformers (GPT-2's c_attn) become one adapter with the sum of their ranks.

    Args:
      base: the directory or hub name of the model, for peft's Auto classes.
      model_type: the family of the model, as in `hf.save`; by default that of the base.
      tokenizer: written too if the base has no rows for its last tokens: peft's Auto classes then add the rows.
    Raises:
      UserError: adapters that peft does not have, a base that Transformers cannot open, a parameter that is neither in
        the base nor in the adapters, a module trained in part, or what `hf.save` refuses.
    """
    config, params = without_padding(config, params)
    c = peft_config
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    found_base = _open_base(base) if base else None
    given = parameter_shapes(found_base.config) if found_base else None
    model_type = model_type or (found_base.model_type if found_base else None)
    names = PeftNames(families.family_of_config(config, model_type), config)
    trained = {path for path, x in flatten_dict(trainable(params, c), sep="/").items() if x}
    if isinstance(c, (PromptTuning, PrefixTuning)):
        tensors, settings = write_prompt(config, flat, c, trained)
    elif isinstance(c, LowRank):
        tensors, settings = _low_rank_and_complete(names, c, flat, trained, given, str(directory))
    else:
        raise UserError(f"peft.kind={c.kind!r} cannot be written for the peft library")
    settings |= _task(names) | {
        "base_model_name_or_path": found_base.name if found_base else "",
        "inference_mode": True,
    }
    if given and tokenizer is not None and config.vocab_size > given["embed/embedding"][0]:
        tokenizers.to_huggingface(tokenizer, config.head == "lm").save(directory)
    safetensors_io.save_safetensors(
        directory, [(name, x.shape, x.dtype, x) for name, x in tensors.items()], single=WEIGHTS
    )
    try:
        pathlib.Path(directory, CONFIG).write_text(report.to_json(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def _low_rank_and_complete(
    names: PeftNames, c: LowRank, flat: Mapping[str, Any], trained: set[str], given: dict | None, directory: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({name of a tensor: array}, the settings of peft) of low-rank adapters and of what else is trained."""
    if not any(path.endswith("/lora_a") for path in flat):
        raise UserError("no Linear has an adapter, and peft writes nothing without one")
    found, settings = _low_rank_tensors(names, c, flat, directory)
    if given and names.has_bias_buffer and np.any(flat["logit_bias"][given["logit_bias"][0] :]):
        raise UserError("logit_bias of new tokens is not 0, and peft cannot save it")
    modules = _modules_to_save(names, trained, set(settings["target_modules"]), given)
    K = names.config.K
    found |= {names.written(name): names.row(name).join(flat, K) for root in modules for name in names.under(root)}
    saved = [names.written(module) for module in modules] or None
    settings |= {"modules_to_save": saved, "lora_dropout": 0.0, "bias": "none"}
    return {BASE + name: x for name, x in found.items()}, settings


class _Base(NamedTuple):
    """A model of Transformers that adapters belong to."""

    name: str  # the hub name, or the absolute directory
    model_type: str
    config: ModelConfig


def _open_base(base: str | pathlib.Path) -> _Base:
    """Raises: UserError for a base that Transformers cannot open, or that has adapters itself."""
    path = models.find_source(base)
    if path.is_file():
        raise UserError(f"{base} is a .gguf file, which peft cannot open")
    if (path / CONFIG).exists():
        raise UserError(f"{base} has adapters itself, and peft would not add them")
    config = path / "config.json"
    described = untrusted.json_object(untrusted.read_bytes(path, config.name), config) if config.exists() else {}
    if not isinstance(described.get("model_type"), str):
        raise UserError(f"{base} is not a model of Transformers, so peft cannot open it")
    name = str(path.absolute()) if pathlib.Path(base).expanduser().is_dir() else str(base)
    return _Base(name, described["model_type"], models.load_config(path))


def problem_of_base(base: str | pathlib.Path, config: ModelConfig) -> str:
    """Why peft's Auto classes cannot open adapters of a model with this configuration over a base; "" if they can."""
    if not base:
        return "the model began with random weights"
    if storage.is_remote(base):
        return f"peft does not read {base}, which is in object storage"
    try:
        own = _open_base(base).config
    except UserError as error:
        return str(error)
    classes = (own.labels, own.class_names) if own.head == config.head else ()
    if config.head in ("classify", "tag") and classes != (config.labels, config.class_names):
        return f"{base} has no head with these classes"
    return ""


def _task(names: PeftNames) -> dict[str, Any]:
    """The fields that tell peft's Auto classes the class of the model."""
    c = names.config
    kinds = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "none": "FEATURE_EXTRACTION"}
    if c.head == "mlm":  # peft has no name for this task
        family = names.family.model_type
        library = f"transformers.models.{family}.modeling_{family}"
        return {"auto_mapping": {"base_model_class": names.family.classes["mlm"][0], "parent_library": library}}
    return {"task_type": kinds.get(c.head) or ("SEQ_2_SEQ_LM" if c.reads_source else "CAUSAL_LM")}


def _low_rank_tensors(names: PeftNames, c: Any, flat: Mapping[str, Any], directory: str) -> tuple[dict, dict]:
    """(name of a tensor -> array, the settings of peft) of all low-rank adapters."""
    rows = [
        row
        for row in names.rows.values()
        if any(f"{path.removesuffix('/kernel')}/lora_a" in flat for path in row.paths if path.endswith("/kernel"))
        and "/experts/" not in row.paths[0]
    ]
    fused = {path.removesuffix("/kernel"): row.name for row in rows if len(row.parts) > 1 for path in row.paths}
    if isinstance(c, AdaLoRA):
        safetensors_io.raise_problems(
            directory,
            [
                f"{path} is a part of {names.written(name).removesuffix('.weight')}, which peft adapts as one; leave "
                "it out of peft.targets"
                for path, name in fused.items()
                if f"{path}/lora_a" in flat
            ],
        )
    tensors, ranks, alphas = {}, {}, {}
    for row in rows:
        module = names.written(row.name).removesuffix(".weight")
        parts, scale, rank = (
            _adalora_parts(row, flat, c) if isinstance(c, AdaLoRA) else _lora_parts(row, flat, names.config)
        )
        tensors |= {f"{module}.{part}": x for part, x in parts.items()}
        if isinstance(c, AdaLoRA):
            ranks[f"{module}.lora_E"] = rank
        else:
            alpha = scale * rank ** (0.5 if c.rank_stabilized else 1)
            ranks |= {module: rank} if rank != c.rank else {}
            alphas |= {module: alpha} if abs(alpha - c.alpha) > 1e-5 * c.alpha else {}
    experts = write_experts(flat, names.config, names.family, names.written)
    for parameter, (parts, rank, scale) in experts.items():
        tensors |= parts
        ranks |= {parameter: rank} if rank != c.rank else {}
        alpha = scale * rank ** (0.5 if isinstance(c, LoRA) and c.rank_stabilized else 1)
        alphas |= {parameter: alpha} if abs(alpha - c.alpha) > 1e-5 * c.alpha else {}
    settings = {
        "peft_type": "ADALORA" if isinstance(c, AdaLoRA) else "LORA",
        "target_modules": [names.written(row.name).removesuffix(".weight") for row in rows],
        "target_parameters": [*experts] or None,
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha,
        "fan_in_fan_out": any(row.layout in ("same", "fused_columns") for row in rows),
        "use_rslora": isinstance(c, LoRA) and c.rank_stabilized,
        "use_dora": c.kind == "dora",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    if not isinstance(c, AdaLoRA):
        return tensors, settings | {"r": c.rank}
    # peft needs the full schedule, even if training has ended.
    c = c.for_steps(1000)
    schedule = {name: getattr(c, ours) for ours, name in SCHEDULE.items()}
    return tensors, settings | schedule | {"init_r": c.rank, "total_step": c.warmup_steps + c.final_steps + 1}


def _adalora_parts(row, flat, c):
    """(name of a part -> array, scale, the ranks that are kept) of an adapter of AdaLoRA."""
    start = row.paths[0].removesuffix("kernel")
    leaf = lambda end: np.asarray(flat[f"{start}lora_{end}"], np.float32)
    kept = leaf("mask") > 0
    parts = {"lora_A": leaf("a").T[kept], "lora_B": leaf("b").T[:, kept], "lora_E": leaf("e")[kept, None]}
    return parts, c.scale, kept.tolist()


def _lora_parts(row, flat, config):
    """(name of a part -> array, scale, rank) of an adapter of LoRA or DoRA on the Linears in one tensor.

    Linears with the same lora_a share it. Otherwise each has its own ranks: lora_A is [a_0; a_1; ...], and lora_B is
    zero outside the blocks of a Linear's outputs and its own ranks.
    """
    starts = [path.removesuffix("kernel") for path in row.paths]
    adapted = [start for start in starts if f"{start}lora_a" in flat]
    a, b = ([np.asarray(flat[f"{start}lora_{end}"], np.float32) for start in adapted] for end in "ab")
    scales = [float(flat[f"{start}lora_scale"]) for start in adapted]
    shared = adapted == starts and all(np.array_equal(a[0], x) for x in a) and len({*scales}) == 1
    stacked = a[0] if shared else np.concatenate(a, 1)
    ends = np.cumsum([x.shape[1] for x in a])
    wide = {}
    for start, path in zip(starts, row.paths, strict=True):
        wide[path] = np.zeros((stacked.shape[1], flat[path].shape[1]), np.float32)
        if start in adapted:
            i = adapted.index(start)
            ranks = slice(None) if shared else slice(ends[i] - len(b[i]), ends[i])
            wide[path][ranks] = b[i] * np.float32(scales[i] / scales[0])
    parts = {"lora_A.weight": stacked.T, "lora_B.weight": join_outputs(row, wide, config.K)}
    if f"{adapted[0]}lora_magnitude" in flat:
        lengths = {
            path: np.asarray(
                flat.get(f"{start}lora_magnitude", column_lengths(jnp.asarray(flat[path], jnp.float32))), np.float32
            )
            for start, path in zip(starts, row.paths, strict=True)
        }
        parts["lora_magnitude_vector"] = join_outputs(row, lengths, config.K)
    return parts, scales[0], stacked.shape[1]


def _modules_to_save(names: PeftNames, trained: set[str], adapted: set[str], given: dict | None) -> list[str]:
    """The modules that are trained completely, and the head of a classifier, which peft always saves.

    Raises: UserError for a module that is trained in part, or that is new and not trained, or also adapted.
    """
    problems, roots, by_module = [], set(), {}
    shapes = parameter_shapes(names.config)
    for row in names.rows.values():
        by_module.setdefault(row.name.rpartition(".")[0], []).append(row)
    for module, rows in by_module.items():
        paths = [path for row in rows for path in row.paths]
        chosen = [path for path in paths if path in trained]
        new = [path for path in paths if given is not None and given.get(path) != shapes[path] and path not in trained]
        if new and module:
            problems.append(f"{new[0]} is not in the base, or has another shape there, and is not trained")
        if chosen and len(chosen) < len(paths):
            problems.append(f"peft saves complete modules, but peft.trained names only a part of {module}")
        if chosen and not module:
            problems.append(f"{paths[0]} is {rows[0].name}, which is in no module that peft could save")
        if chosen:
            roots |= {name.rpartition(".")[0] for row in rows for name in names.read_by_model(row)}
    if names.config.head in ("classify", "tag"):
        roots |= {"classifier", "score"}
    # peft saves every module whose name ends with a name in modules_to_save.
    roots = {module for module in names.modules if any(module.endswith(root) for root in roots)}
    roots = {module for module in roots if not inside(module.rpartition(".")[0], roots)}
    problems += [
        f"peft cannot both adapt {module} and save it as a complete module"
        for module in sorted(adapted)
        if inside(module, map(names.written, roots))
    ]
    if problems:
        raise UserError(listed(problems, 4))
    return sorted(roots)


# Reading.


def base_of_adapter(directory: str | pathlib.Path) -> str | None:
    """The base model that is named in a directory of adapters; None if the directory has no adapters.

    Raises: UserError if the adapters name no base model, or a revision of one on the hub.
    """
    path = pathlib.Path(directory) / CONFIG
    if not path.exists():
        return None
    theirs = read_settings(directory)
    base, revision = theirs.get("base_model_name_or_path"), theirs.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path={base!r} must name the model that the adapters belong to")
    if revision not in (None, "", "main") and not pathlib.Path(base).is_dir():
        raise UserError(
            f"{path}: revision={revision!r} of {base} is not supported; name a directory with that revision"
        )
    beside = path.parent / "base"  # of finetune, when the directory was moved
    return str(beside) if beside.is_dir() and not pathlib.Path(base).is_dir() else base


def adapted_config(directory: str | pathlib.Path, config: ModelConfig, model_type: str | None = None) -> ModelConfig:
    """The configuration of a base model with the adapters in a directory, as `peft` computes it: they may bring a new
    head, more tokens, or an output head that is no longer tied to the embedding.

    Raises: UserError as `load_adapter`.
    """
    theirs = read_settings(directory)
    if (kind := PROMPTS.get(theirs.get("peft_type", ""))) is not None:
        check_prompt(config, kind.kind)
        return config
    return AdapterFile(directory, config, model_type).config


def load_adapter(
    directory: str | pathlib.Path, config: ModelConfig, params: dict[str, Any], model_type: str | None = None
) -> tuple[dict[str, Any], Any]:
    """Add adapters of the `peft` library to params (LoRA, DoRA, AdaLoRA, a prompt or prefixes), and replace what else
    it trained.

    An adapter of several of our Linears (GPT-2's c_attn) is split exactly: they share lora_a. Adapters of an embedding
    or of the output head are merged, because losses read only their tables.

    config: `adapted_config` of the directory; params: of the base model, without adapters; model_type: as in
    `save_adapter`, by default the family whose names the file has.
    Returns: (params, the config of the adapters, whose `trained` names what is replaced).
    Raises: UserError with every unsupported setting, or with every tensor that is unexpected, missing or misshapen.
    """
    theirs = read_settings(directory)
    if theirs.get("peft_type") in PROMPTS:
        return read_prompt(directory, theirs, config, params)
    file = AdapterFile(directory, config, model_type)
    old, new = dataclasses.asdict(config), dataclasses.asdict(file.config)
    if changed := [f"model.{name}={value!r}" for name, value in new.items() if value != old[name]]:
        raise UserError(
            f"{file.path}: with these adapters, peft computes a model of {', '.join(changed)}; open the directory, or "
            "pass the config of hf.adapted_config"
        )
    return file.load(params)
