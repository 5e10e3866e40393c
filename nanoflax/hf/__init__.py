"""Read and write models in Hugging Face formats: safetensors, GGUF, and adapters of the peft library."""

from nanoflax.hf.adapters import adapted_config, base_of_adapter, load_adapter, problem_of_base, save_adapter
from nanoflax.hf.families import family_of_config
from nanoflax.hf.gguf import open_gguf
from nanoflax.hf.gguf_writer import GGUF_TYPES, GGUFSummary, save_gguf
from nanoflax.hf.layouts import tensor_mapping
from nanoflax.hf.models import find_source, load, load_config, save

__all__ = [
    "GGUF_TYPES", "GGUFSummary", "adapted_config", "base_of_adapter", "family_of_config", "find_source", "load",
    "load_adapter", "load_config", "open_gguf", "problem_of_base", "save", "save_adapter", "save_gguf",
    "tensor_mapping"]  # fmt: skip
