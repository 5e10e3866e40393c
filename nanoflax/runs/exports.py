"""Writes the model of a Run in the formats of other programs, or as a new run; quantised matrices as float32."""

import os
import tempfile
from typing import Any

from nanoflax import hf, peft, storage, tasks
from nanoflax.errors import UserError
from nanoflax.runs import directory
from nanoflax.runs.checkpoint import Checkpoints


def save_pretrained(run: Any, path: str | os.PathLike) -> None:
    """Write a directory for Transformers' AutoModel.

    Raises: UserError if no family of Transformers has such a model.
    """
    if storage.is_remote(path):
        with directory.filled_directory(str(path)) as part:
            return save_pretrained(run, part)
    hf.save(str(path), run.model.config, run.params, _tokenizer_of(run))


def save_gguf(run: Any, path: str | os.PathLike, kind: str = "F16") -> hf.GGUFSummary:
    """Write a .gguf file for llama.cpp, with the tokenizer and its chat template. Low-rank adapters are merged.

    kind: F32, F16 or Q8_0; see hf.save_gguf.
    Raises: UserError if GGUF cannot express the model, its adapters or its tokenizer.
    """
    if storage.is_remote(path):
        if storage.exists(str(path)):
            raise UserError(f"{path} exists; choose another name or remove it")
        with tempfile.TemporaryDirectory() as folder:
            summary = save_gguf(run, part := os.path.join(folder, "model.gguf"), kind)
            storage.upload(part, str(path))
        return summary
    return hf.save_gguf(
        path, run.model.config, peft.dequantize_params(peft.merge(run.params)), _tokenizer_of(run), kind
    )


def save_run(run: Any, workdir: str) -> None:
    """Write the model as a run with 0 steps, for sample, evaluate and finetune.

    Raises: UserError if the model has no tokenizer.
    """
    if storage.is_remote(workdir):
        with directory.filled_directory(workdir) as part:
            return save_run(run, part)
    if run.tokenizer is None:
        raise UserError(f"{run.source} has no tokenizer that nanoflax can read")
    os.makedirs(workdir, exist_ok=True)
    meta = {"tokenizer": run.tokenizer.fingerprint, "step": 0}
    with Checkpoints(os.path.join(workdir, "checkpoints")) as checkpoints:
        checkpoints.save(0, {"params": peft.dequantize_params(run.params)}, meta)
    directory.write_run(workdir, tasks.config_of(run.model.config), run.tokenizer)


def _tokenizer_of(run: Any) -> Any:
    return tasks.exported_tokenizer(run.config.task, run.tokenizer) if run.task else run.tokenizer
