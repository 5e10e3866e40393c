"""Text from files and data sets, as tokens on disk, as windows, as batches at random access."""

from nanoflax.data.batches import Batches, evaluation_batches, prefetch
from nanoflax.data.files import (
    Report,
    chosen,
    dataset_examples,
    dataset_splits,
    json_lines,
    open_dataset,
    read_binary,
    standard_modules,
    text_lines,
)
from nanoflax.data.text import Source, documents, identity, source_of
from nanoflax.data.token_store import default_cache_dir, prepare
from nanoflax.data.windows import Windows

__all__ = [
    "Batches", "Report", "Source", "Windows", "chosen", "dataset_examples", "dataset_splits", "default_cache_dir",
    "documents", "evaluation_batches", "identity", "json_lines", "open_dataset", "prefetch", "prepare",
    "read_binary", "source_of", "standard_modules", "text_lines"]  # fmt: skip
