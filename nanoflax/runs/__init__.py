"""A run on disk: its directory, checkpoints and lock, and opening any trained model."""

from nanoflax.runs.checkpoint import Checkpoints, compare, restore_params
from nanoflax.runs.directory import (
    get_tokenizer,
    is_run,
    read_config,
    read_labels,
    read_run,
    refuse_other_data,
    resumable,
    set_aside,
    whole,
    with_vocabulary,
    write_jsonl,
    write_labels,
    write_run,
)
from nanoflax.runs.lock import WorkdirLock
from nanoflax.runs.opening import initialize_with_adapters, open_model, restore_model
from nanoflax.runs.trainer import check_metric, check_wandb, displays, setup_jax

__all__ = [
    "Checkpoints", "WorkdirLock", "check_metric", "check_wandb", "compare", "displays", "get_tokenizer",
    "initialize_with_adapters", "is_run", "open_model", "read_config", "read_labels", "read_run",
    "refuse_other_data", "restore_model", "restore_params", "resumable", "set_aside", "setup_jax", "whole",
    "with_vocabulary", "write_jsonl", "write_labels", "write_run"]  # fmt: skip
