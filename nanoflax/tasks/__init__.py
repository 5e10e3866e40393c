"""Fine-tuning tasks: examples, their rows and batches, objectives, metrics."""

from nanoflax.tasks.batches import ExampleBatches, training_batches
from nanoflax.tasks.encoding import encode, show_row, weigh_classes
from nanoflax.tasks.evaluator import Evaluator, encode_for_task, encode_texts, prediction_records
from nanoflax.tasks.examples import load, occurring_labels, read
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text
from nanoflax.tasks.metrics import metrics_table
from nanoflax.tasks.packing import PackedBatches
from nanoflax.tasks.rows import SHORTEST
from nanoflax.tasks.sources import TaskSource, examples_of
from nanoflax.tasks.table import TASKS, config_of, exported_tokenizer, length_limits, objective_of, with_sentinels

__all__ = [
    "Chat", "Classification", "Evaluator", "ExampleBatches", "PackedBatches", "Pair", "SHORTEST", "TASKS", "Tagging",
    "TaskSource", "Text", "config_of", "encode", "encode_for_task", "encode_texts", "examples_of", "exported_tokenizer",
    "length_limits", "load", "metrics_table", "objective_of", "occurring_labels", "prediction_records", "read",
    "show_row", "training_batches", "weigh_classes", "with_sentinels"]  # fmt: skip
