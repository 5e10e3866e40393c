"""A run on disk: its directory, checkpoints and lock, and opening any trained model."""

from nanoflax.runs.checkpoint import Checkpoints, check_same_shapes, restore_params
from nanoflax.runs.console import answer_typed_prompts, chat, print_answers
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
from nanoflax.runs.finetune import finetune
from nanoflax.runs.generation import GenerationSettings
from nanoflax.runs.lock import WorkdirLock
from nanoflax.runs.opening import ModelSource, initial_parameters, open_model, open_source, restore_model
from nanoflax.runs.pretrain import pretrain
from nanoflax.runs.ranking import read_questions
from nanoflax.runs.run import Run, open_run
from nanoflax.runs.trainer import check_metric, check_wandb, displays, setup_jax

__all__ = [
    "Checkpoints", "GenerationSettings", "ModelSource", "Run", "WorkdirLock", "answer_typed_prompts", "archive_run",
    "chat", "check_metric", "check_same_data", "check_same_shapes", "check_wandb", "check_workdir", "displays",
    "exclusive", "finetune", "get_tokenizer", "initial_parameters", "is_run", "model_directory", "open_model",
    "open_run", "open_source", "pretrain", "print_answers", "read_config", "read_labels", "read_questions",
    "read_run", "restore_model", "restore_params", "setup_jax", "with_vocabulary", "write_jsonl", "write_labels",
    "write_run"]  # fmt: skip
