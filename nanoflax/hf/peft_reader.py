"""Reads a directory of adapters of the `peft` library. `adapters.load_adapter` is its face."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import PEFT_KINDS, AdaLoRA, ModelConfig, validate
from nanoflax.hf import families, safetensors_io
from nanoflax.hf.layouts import TensorMapping, parameter_shapes
from nanoflax.hf.peft_experts import ExpertFile
from nanoflax.hf.peft_names import BASE, CONFIG, SCHEDULE, WEIGHTS, PeftNames, read_settings, split_outputs

# Fields that are read below, or that decide nothing more once the tensors are there.
_KNOWN = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora use_dora init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern modules_to_save megatron_core qalora_group_size
    ensure_weight_tying lora_bias trainable_token_indices eva_config target_r init_r tinit tfinal deltaT beta1 beta2
    orth_reg_weight total_step modules_to_tie target_modules_to_tie target_parameters""".split()
_UNCHANGED_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights; others change kernels
_HEADS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag"}
_TOKENS = "token_adapter.trainable_tokens_delta"
_PART = re.compile(
    rf"(.+)\.(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|{re.escape(_TOKENS)})(\.weight|\.bias)?"
)


class AdapterFile:
    """A directory of adapters; all but embeddings is read by `load`.

    config: of the model with the adapters. peft: our config of the adapters. names: the names of `config`.
    parts: name of a tensor -> {name of a part of its adapter: Tensor}. complete: name of a tensor -> the Tensor that
    replaces it. tokens: name of a tensor -> (the ids of its trained rows, the Tensor of these rows).
    """

    def __init__(self, directory: str | pathlib.Path, config: ModelConfig, model_type: str | None):
        self.path, self.directory = pathlib.Path(directory, CONFIG), directory
        self.theirs = read_settings(directory)
        self.peft = _from_theirs(self.theirs, self.path)
        found = safetensors_io.open_safetensors(directory, single=WEIGHTS)
        # With bias="all", peft also writes the frozen biases inside its wrappers.
        tensors = {
            name.removeprefix(BASE): x
            for name, x in found.items()
            if not re.search(r"\.(original_module|modules_to_save)\.", name)
        }
        self.experts = ExpertFile(tensors, self.theirs.get("target_parameters") or [], config, self.peft.kind)
        safetensors_io.raise_problems(self.path, self.experts.problems)
        tensors = {re.sub(r"(\.token_adapter)?\.base_layer\.", ".", name): x for name, x in self.experts.rest.items()}
        head = _HEADS.get(self.theirs.get("task_type") or "", config.head)
        if head != config.head:
            config = dataclasses.replace(config, head=head, pooler=False)
        self.names = _names_of(config, model_type, tensors)
        self._sort(tensors, config.tied)
        self.config = self._with_sizes(config)
        self.names = PeftNames(self.names.family, self.config)
        self._sort(tensors, config.tied)

    def _sort(self, tensors: Mapping[str, Any], tied: bool) -> None:
        """Sort the tensors into `parts`, `complete`, `tokens` and `unknown`. tied: whether the base is."""
        self.parts, self.complete, self.tokens, self.unknown = {}, {}, {}, []
        ids = self.theirs.get("trainable_token_indices") or []
        for name, tensor in tensors.items():
            m = _PART.fullmatch(name)
            full = self.names.find(f"{m[1]}.weight" if m else name)
            if full is None:
                self.unknown.append(tensor)
            elif not m:
                self.complete[full] = tensor
            elif m[2] == _TOKENS:
                rows = ids if isinstance(ids, list) else next((x for key, x in ids.items() if m[1].endswith(key)), [])
                self.tokens[full] = rows, tensor
            else:
                self.parts.setdefault(full, {})[m[2] + (m[3] or "").replace(".weight", "")] = tensor
        embedding = self.names.embedding
        if tied and self.tokens.keys() == {embedding}:  # peft then trains these tokens in all tied copies
            copies = [name for name, other in self.names.copies.items() if other == embedding]
            self.tokens |= dict.fromkeys([*copies, self.names.output], self.tokens[embedding])

    def _with_sizes(self, config: ModelConfig) -> ModelConfig:
        """The config with the classes, the vocabulary and the tie of the adapters' own tensors."""
        sizes: dict[str, Any] = {}
        by_path = {path: row for row in self.names.rows.values() for path in row.paths}
        for field, path in [("labels", "labels/kernel"), ("vocab_size", "embed/embedding")]:
            for name in self.names.read_by_model(by_path[path]) if path in by_path else ():
                if name in self.complete and self.complete[name].shape[1:] == (config.dim,):
                    sizes[field] = self.complete[name].shape[0]
        sizes["vocab_size"] = max(config.vocab_size, sizes.get("vocab_size", 0))  # the tokens of the base stay
        if sizes.get("labels", config.labels) != config.labels:
            sizes["class_names"] = ()  # those of the base
        tied = config.tied
        if tied and config.head in ("lm", "mlm"):
            first, *_, output = self.names.read_by_model(by_path["embed/embedding"])
            tied = self._change_of(first) == self._change_of(output)
        return dataclasses.replace(config, **sizes, tied=tied)

    def _change_of(self, name: str) -> Any:
        """A value that is equal for two tensors if the adapters change them equally."""
        hashed = lambda x: hashlib.sha1(x.tobytes(), usedforsecurity=False).digest()
        parts = {part: tensor.read() for part, tensor in self.parts.get(name, {}).items()}
        if "lora_embedding_A" in parts:  # an adapter of the transposed table
            parts["lora_A"], parts["lora_B"] = parts.pop("lora_embedding_B").T, parts.pop("lora_embedding_A").T
        rows, tokens = self.tokens.get(name, ((), None))
        return (
            {part: hashed(x) for part, x in parts.items()},
            (list(rows), tokens and hashed(tokens.read())),
            name in self.complete and hashed(self.complete[name].read()),
        )

    def load(self, params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """See `adapters.load_adapter`."""
        shapes, given = parameter_shapes(self.config), dict[str, Any](flatten_dict(params, sep="/"))
        self.flat = {path: given[path] for path in shapes if path in given}
        self.new: dict[str, Any] = {}
        if "unembed/kernel" in shapes and "unembed/kernel" not in given:  # the base is tied
            self.new["unembed/kernel"] = jnp.asarray(given["embed/embedding"].T, jnp.float32)
        if self.names.has_bias_buffer and "logit_bias" in self.flat:  # Transformers gives new tokens a bias of 0
            bias = self.flat["logit_bias"]
            self.flat["logit_bias"] = jnp.pad(bias, (0, self.config.vocab_size - len(bias)))
        self.problems = [f"{tensor.name} has no place in this model" for tensor in self.unknown]
        self.problems += self._missing()
        self.new |= {path: jnp.asarray(x) for path, x in self.experts.leaves(self._scale).items()}
        self.problems += self.experts.problems
        self.problems += [] if self.parts or self.experts.adapters else ["the file has no adapter"]
        if self.names.output in self.tokens and self.config.head == "mlm" and self.config.head_bias:
            self.problems.append(
                "trainable_token_indices of a tied head with a bias: peft computes it without its bias"
            )
        for row in self.names.rows.values():
            self._read_row(row)
        safetensors_io.raise_problems(pathlib.Path(self.directory, WEIGHTS), self.problems)
        flat = self.flat | self.new
        missing = [f"{path} {list(x)}" for path, x in shapes.items() if getattr(flat.get(path), "shape", ()) != x]
        safetensors_io.raise_problems(
            pathlib.Path(self.directory), [f"neither the base nor the adapters have {x}" for x in missing]
        )
        return unflatten_dict(flat, sep="/"), self._with_trained(shapes)

    def _with_trained(self, shapes):
        """Our config of the adapters, whose `trained` names the replaced modules and parameters."""
        replaced, modules = self.new.keys() & shapes.keys(), set()
        for path in replaced:
            module = path.rpartition("/")[0]
            complete = module and {p for p in shapes if p.startswith(f"{module}/")} <= replaced
            modules.add(module if complete else path)
        return dataclasses.replace(self.peft, trained=",".join(["adapters", *sorted(modules)]) if modules else "")

    def _missing(self):
        """The problems of modules_to_save whose tensors are not in the file."""
        names = [name for row in self.names.rows.values() for name in self.names.read_by_model(row)]
        missing = [name for name in names if self._is_named(name) and name not in self.complete]
        return [f"{BASE}{name} is missing, but modules_to_save names it" for name in missing]

    def _is_named(self, name: str) -> bool:
        """Whether modules_to_save names the module of a tensor."""
        ends = "|".join(map(re.escape, self.theirs.get("modules_to_save") or ()))
        return bool(ends and re.search(rf"({ends})(\.|$)", self.names.written(name).rpartition(".")[0]))

    def _read_row(self, row: TensorMapping) -> None:
        """Read the changes of one tensor, which the model may read under several names."""
        first, *others = self.names.read_by_model(row)
        if any(self._change_of(name) != self._change_of(first) for name in others):
            both = " and ".join([first, *others])
            self.problems.append(f"{both} are one tensor in this model, but the adapters change them differently")
            return
        tensor, parts, module = self.complete.get(first), self.parts.get(first, {}), first.removesuffix(".weight")
        if tensor is not None and tensor.shape != row.shape:
            wrong = f"has shape {list(tensor.shape)}, not {list(row.shape)}"
            self.problems.append(f"{tensor.name} {wrong if self._is_named(first) else 'has no place in this model'}")
            return
        if tensor is not None:
            for i, (path, shape) in row.parts.items():
                x = row.read(tensor, i, (slice(None),) * len(shape), self.config.K)
                self.new[path] = jnp.asarray(x, jnp.float32)
        if wrong := _problems(self.peft, module, parts, row, self._kept(module)):
            self.problems += wrong
        elif self.names.is_table(row):
            self._merge(first, row.paths[0], parts)
        elif parts:
            self._add_leaves(module, row, parts)

    def _kept(self, module: str) -> list[bool] | None:
        """Which ranks of AdaLoRA a module keeps; None: all."""
        return (self.theirs.get("rank_pattern") or {}).get(f"{self.names.written(module)}.lora_E")

    def _scale(self, module: str, rank: int) -> float:
        """The scale of a module's adapter. A key of alpha_pattern is a pattern of the end of a module's name."""
        patterns, name = self.theirs.get("alpha_pattern") or {}, self.names.written(module)
        alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), self.peft.alpha)
        return dataclasses.replace(self.peft, rank=rank, alpha=alpha).scale

    def _merge(self, name: str, path: str, parts: Mapping[str, Any]) -> None:
        """Merge what the adapters hold of a table: an embedding [V, D], or the output head, here [D, V]."""
        if not parts and name not in self.tokens:
            return
        table = np.array(self.new.get(path, self.flat.get(path)), np.float32)
        table = table.T if path == "unembed/kernel" else table
        x = {part: tensor.read().astype(np.float32) for part, tensor in parts.items()}
        a, b = x.get("lora_A"), x.get("lora_B")
        if of_embedding := "lora_embedding_A" in x:
            a, b = x["lora_embedding_B"].T, x["lora_embedding_A"].T
        if a is not None and b is not None:
            if isinstance(self.peft, AdaLoRA):
                a = a * x["lora_E"] * np.float32(self.peft.scale)
            else:
                a = a * np.float32(self._scale(name.removesuffix(".weight"), len(a)))
            table = table + b @ a
        if "lora_magnitude_vector" in x:  # of the columns of an embedding, of the rows of a Linear
            factor = x["lora_magnitude_vector"] / np.linalg.norm(table, axis=0 if of_embedding else 1)
            table = table * (factor if of_embedding else factor[:, None])
        if name in self.tokens:
            rows, tensor = self.tokens[name]
            if tensor.shape != (len(rows), table.shape[1]) or not all(0 <= i < len(table) for i in rows):
                self.problems.append(f"{tensor.name} {list(tensor.shape)} does not fit trainable_token_indices={rows}")
                return
            table[np.array(rows, int)] = tensor.read()
        self.new[path] = jnp.asarray(table.T if path == "unembed/kernel" else table)

    def _add_leaves(self, module: str, row: TensorMapping, parts: Mapping[str, Any]) -> None:
        """Add the adapter of a Linear, or of several Linears that are one tensor in the file."""
        c, K, a = self.peft, self.config.K, parts["lora_A"].read().T
        for i, (path, _) in row.parts.items():
            start, b = path.removesuffix("kernel"), split_outputs(row, parts["lora_B"], i, K)
            if isinstance(c, AdaLoRA):
                kept = self._kept(module)
                mask = np.ones(c.rank, bool) if kept is None else np.array(kept)
                place = np.zeros((mask.sum(), c.rank))  # [kept, rank]
                place[np.arange(len(place)), np.flatnonzero(mask)] = 1
                e = parts["lora_E"].read()[:, 0] @ place
                leaves = {"scale": c.scale, "a": a @ place, "b": place.T @ b, "e": e, "mask": mask}
            else:
                leaves = {"scale": self._scale(module, len(b)), "a": a, "b": b}
            if "lora_magnitude_vector" in parts:
                leaves["magnitude"] = split_outputs(row, parts["lora_magnitude_vector"], i, K)
            self.new |= {f"{start}lora_{end}": jnp.asarray(x, jnp.float32) for end, x in leaves.items()}
            if "lora_B.bias" not in parts:
                continue
            old = self.new.get(f"{start}bias", self.flat.get(f"{start}bias"))
            if old is None:
                self.problems.append(f"{module} has no bias here, so the bias of its lora_B has no place")
                return
            more = split_outputs(row, parts["lora_B.bias"], i, K) * np.float32(leaves["scale"])
            self.new[f"{start}bias"] = jnp.asarray(old, jnp.float32) + more


def _names_of(config: ModelConfig, model_type: str | None, tensors: Mapping[str, Any]) -> PeftNames:
    """The names of the family that knows the most tensors of a file, among the families of this configuration."""
    first = families.family_of_config(config, model_type)
    others = families.families_of_config(config) if model_type is None else []
    found = [PeftNames(family, config) for family in [first, *(family for family in others if family is not first)]]
    modules = [m[1] + ".weight" if (m := _PART.fullmatch(name)) else name for name in tensors]
    return max(found, key=lambda names: sum(names.find(name) is not None for name in modules))


def _from_theirs(theirs, path):
    """Our LoRA, DoRA or AdaLoRA config of peft's adapter_config.json."""
    ranks, alphas, complete = (
        theirs.get(f"{name}") or {} for name in ("rank_pattern", "alpha_pattern", "modules_to_save")
    )
    adalora = theirs.get("peft_type") == "ADALORA"
    number = lambda x: type(x) in (int, float)
    wrong = {name for name, value in theirs.items() if value and name not in _KNOWN}
    wrong |= {
        name
        for name, fine in [
            ("peft_type", adalora or theirs.get("peft_type") == "LORA"),
            ("bias", theirs.get("bias", "none") in (("none",) if adalora else ("none", "all", "lora_only"))),
            (
                "modules_to_save",
                not complete or isinstance(complete, list) and all(isinstance(x, str) for x in complete),
            ),
            ("use_rslora", not (adalora and theirs.get("use_rslora"))),
            ("init_lora_weights", theirs.get("init_lora_weights") in _UNCHANGED_BASE),
            ("alpha_pattern", isinstance(alphas, dict) and all(map(number, alphas.values()))),
            (
                "rank_pattern",
                isinstance(ranks, dict)
                and all(
                    isinstance(x, list) and all(type(keep) is bool for keep in x) if adalora else type(x) is int
                    for x in ranks.values()
                ),
            ),
        ]
        if not fine
    }
    safetensors_io.raise_problems(
        path, [f"{name}={str(theirs.get(name))[:200]} is not supported" for name in sorted(wrong)]
    )
    kind = "adalora" if adalora else "dora" if theirs.get("use_dora") else "lora"
    own = SCHEDULE if adalora else {"rank_stabilized": "use_rslora"}
    c = PEFT_KINDS[kind](
        rank=theirs.get("init_r", 12) if adalora else theirs.get("r", 8),
        alpha=theirs.get("lora_alpha", 8),
        **{ours: theirs[name] for ours, name in own.items() if name in theirs},
    )
    validate(c)
    return c


def _problems(c: Any, name: str, tensors: Mapping[str, Any], row: TensorMapping, kept: list[bool] | None) -> list[str]:
    """The problems of the adapter {part: Tensor} of a module. kept: the ranks of AdaLoRA."""
    if not tensors:
        return []
    leaf = row.paths[0].rpartition("/")[2]
    a, b = ("lora_A", "lora_B") if leaf == "kernel" else ("lora_embedding_A", "lora_embedding_B")
    wanted = {a, b, *{"dora": ["lora_magnitude_vector"], "adalora": ["lora_E"]}.get(c.kind, [])}
    if tensors.keys() - {"lora_B.bias"} != wanted or leaf not in ("kernel", "embedding"):
        return [f"{name} has {', '.join(sorted(tensors))} and needs {', '.join(sorted(wanted))}"]
    r, (D_out, D_in) = next(iter(tensors[a].shape), 0), row.shape
    if leaf == "embedding" or row.layout in ("same", "fused_columns"):  # [V, D], or a kernel [in, out]
        D_in, D_out = D_out, D_in
    outputs = dict.fromkeys(("lora_magnitude_vector", "lora_B.bias"), (D_out,))
    shapes = {a: (r, D_in), b: (D_out, r), "lora_E": (r, 1)} | outputs
    problems = [
        f"{x.name} has shape {list(x.shape)}, not {list(shapes[part])}"
        for part, x in tensors.items()
        if x.shape != shapes[part]
    ]
    total, number = (c.rank, c.rank) if kept is None else (len(kept), sum(kept))
    if isinstance(c, AdaLoRA) and (total, number) != (c.rank, r):
        kept_of = f"rank_pattern keeps {number} of {total} ranks"
        problems.append(f"{name}: {kept_of}, but the tensors have {r} of init_r={c.rank}")
    return problems
