"""Text from files and data sets, as tokens on disk, as windows, as batches at random access."""

from nanoflax.data.batches import Batches, evaluation_batches, prefetch
from nanoflax.data.files import (
    DataReport,
    dataset_examples,
    dataset_splits,
    is_held_out,
    json_lines,
    open_dataset,
    read_binary,
    standard_modules,
    text_lines,
)
from nanoflax.data.text import Source, documents, source_of, source_version
from nanoflax.data.token_store import default_cache_dir, prepare
from nanoflax.data.windows import Windows

__all__ = [
    "Batches", "DataReport", "Source", "Windows", "is_held_out", "dataset_examples", "dataset_splits", "default_cache_dir",
    "documents", "evaluation_batches", "source_version", "json_lines", "open_dataset", "prefetch", "prepare",
    "read_binary", "source_of", "standard_modules", "text_lines"]  # fmt: skip
