"""Fine-tuning tasks: examples, their rows and batches, objectives, metrics."""

from nanoflax.tasks.batches import POOL, ExampleBatches, PromptBatches, training_batches
from nanoflax.tasks.encoding import encode, show_row, weigh_classes
from nanoflax.tasks.evaluator import Evaluator, encode_for_task, encode_texts, prediction_records
from nanoflax.tasks.examples import TaskData, load, occurring_labels, read
from nanoflax.tasks.kinds import Chat, Classification, Pair, Preference, Problem, Tagging, Text
from nanoflax.tasks.metrics import metrics_table
from nanoflax.tasks.packing import PackedBatches
from nanoflax.tasks.pairs import SIDES, PairRows, with_reference
from nanoflax.tasks.rows import SHORTEST
from nanoflax.tasks.shown import show_batch_row
from nanoflax.tasks.sources import TaskSource, examples_of
from nanoflax.tasks.table import (
    TASKS,
    config_of,
    exported_tokenizer,
    in_form_of,
    length_limits,
    objective_of,
    prompt_of,
    with_sentinels,
)

__all__ = [
    "Chat", "Classification", "Evaluator", "ExampleBatches", "POOL", "PackedBatches", "Pair", "PairRows",
    "Preference", "Problem", "PromptBatches", "SHORTEST", "SIDES", "TASKS", "Tagging", "TaskData", "TaskSource", "Text",
    "config_of", "encode", "encode_for_task", "encode_texts", "examples_of", "exported_tokenizer", "in_form_of",
    "length_limits", "load", "metrics_table", "objective_of", "occurring_labels", "prediction_records", "prompt_of",
    "read", "show_batch_row", "show_row", "training_batches", "weigh_classes", "with_reference",
    "with_sentinels"]  # fmt: skip
