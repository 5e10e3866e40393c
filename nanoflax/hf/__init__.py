"""Models of the Hugging Face world, in and out: safetensors, GGUF, and adapters of the peft library."""

from nanoflax.hf.adapters import base_of, load, save
from nanoflax.hf.families import of_config
from nanoflax.hf.gguf import open_gguf
from nanoflax.hf.models import find, plan

__all__ = [
    "base_of", "find", "load", "of_config", "open_gguf", "plan", "save"]  # fmt: skip
