"""Models of the Hugging Face world, in and out: safetensors, GGUF, and adapters of the peft library."""

from nanoflax.hf.adapters import base_of, load_adapter, save_adapter
from nanoflax.hf.families import of_config
from nanoflax.hf.gguf import open_gguf
from nanoflax.hf.models import find, load, plan, save

__all__ = [
    "base_of", "find", "load", "load_adapter", "of_config", "open_gguf", "plan", "save", "save_adapter"]  # fmt: skip
