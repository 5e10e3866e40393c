"""Runs: pretraining and fine-tuning in a directory, checkpoints, locks, and opening trained models."""

from nanoflax.runs.checkpoint import Checkpoints, restore_params
from nanoflax.runs.console import answer_typed_prompts, chat, print_answers
from nanoflax.runs.directory import filled_directory, is_run, read_run, write_jsonl
from nanoflax.runs.finetune import finetune
from nanoflax.runs.generation import GenerationSettings, model_settings, used_of_model
from nanoflax.runs.inspection import Inspection, RowFacts, inspect_data
from nanoflax.runs.lock import locked
from nanoflax.runs.opening import open_model
from nanoflax.runs.pretrain import pretrain
from nanoflax.runs.ranking import read_questions
from nanoflax.runs.run import Run, open_run
from nanoflax.runs.sweep import Sweep, draw_settings, parse_setting, suggest_settings
from nanoflax.runs.text_loss import open_text, text_metrics
from nanoflax.runs.tokenization import check_stores, tokenize
from nanoflax.runs.trainer import setup_jax

__all__ = [
    "Checkpoints", "GenerationSettings", "Inspection", "RowFacts", "Run", "Sweep", "answer_typed_prompts", "chat",
    "check_stores", "draw_settings", "filled_directory", "finetune", "inspect_data", "is_run", "locked",
    "model_settings", "open_model", "open_run", "open_text", "parse_setting", "pretrain", "print_answers",
    "read_questions", "read_run", "restore_params", "setup_jax", "suggest_settings", "text_metrics", "tokenize",
    "used_of_model", "write_jsonl",
]  # fmt: skip
