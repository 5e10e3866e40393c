"""A run on disk: its directory, checkpoints and lock, and opening any trained model."""

from nanoflax.runs.checkpoint import Checkpoints, check_same_shapes, restore_params
from nanoflax.runs.directory import (
    archive_run,
    check_same_data,
    check_workdir,
    exclusive,
    get_tokenizer,
    is_run,
    model_directory,
    read_config,
    read_labels,
    read_run,
    with_vocabulary,
    write_jsonl,
    write_labels,
    write_run,
)
from nanoflax.runs.lock import WorkdirLock
from nanoflax.runs.opening import initialize_with_adapters, open_model, restore_model
from nanoflax.runs.trainer import check_metric, check_wandb, displays, setup_jax

__all__ = [
    "Checkpoints", "WorkdirLock", "archive_run", "check_metric", "check_same_data", "check_same_shapes",
    "check_wandb", "check_workdir", "displays", "exclusive", "get_tokenizer", "initialize_with_adapters", "is_run",
    "model_directory", "open_model", "read_config", "read_labels", "read_run", "restore_model", "restore_params",
    "setup_jax", "with_vocabulary", "write_jsonl", "write_labels", "write_run"]  # fmt: skip
