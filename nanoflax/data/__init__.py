"""Text from files and data sets; its tokens on disk; windows and batches of tokens with random access."""

from nanoflax.data.batches import Batches, evaluation_batches, prefetch
from nanoflax.data.beam import beam_engine
from nanoflax.data.building import build_store, check_segmentations
from nanoflax.data.cache import cached, default_cache_dir, prepare
from nanoflax.data.cleaning import UNICODE, WHITESPACE, clean, cleaning_steps
from nanoflax.data.files import MALFORMED, decode, json_lines, open_text, text_lines
from nanoflax.data.folders import Folder, locked
from nanoflax.data.hub import hub_splits
from nanoflax.data.made import load_tokenizer, made_tokenizer, save_tokenizer
from nanoflax.data.mixture import Mixture, mixed_documents
from nanoflax.data.parquet import parquet_rows
from nanoflax.data.parts import documents
from nanoflax.data.processes import tokenize_parts
from nanoflax.data.pydocs import standard_modules
from nanoflax.data.report import DataReport, field_flag, is_held_out
from nanoflax.data.source import Source, settings_of, source_of, source_version
from nanoflax.data.stages import (
    Stage,
    field_of_source,
    is_mixture,
    sources_of,
    stages_of,
    validation_of,
    with_mixture_file,
)
from nanoflax.data.store import TokenStore, damaged
from nanoflax.data.tables import table_rows
from nanoflax.data.tfds import dataset_examples, dataset_splits, open_dataset
from nanoflax.data.windows import Windows

__all__ = [
    "MALFORMED", "UNICODE", "WHITESPACE", "Batches", "DataReport", "Folder", "Mixture", "Source", "Stage",
    "TokenStore", "Windows", "beam_engine", "build_store", "cached", "check_segmentations", "clean",
    "cleaning_steps", "damaged", "dataset_examples", "dataset_splits", "decode", "default_cache_dir", "documents",
    "evaluation_batches", "field_flag", "field_of_source", "hub_splits", "is_held_out", "is_mixture", "json_lines",
    "load_tokenizer", "locked", "made_tokenizer", "mixed_documents", "open_dataset", "open_text", "parquet_rows",
    "prefetch", "prepare", "save_tokenizer", "settings_of", "source_of", "source_version", "sources_of",
    "stages_of", "standard_modules", "table_rows", "text_lines", "tokenize_parts", "validation_of",
    "with_mixture_file",
]  # fmt: skip
