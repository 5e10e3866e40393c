"""nanoflax: language models from scratch in JAX, from the first embedding to generated text.

Names are imported on first use, so `import nanoflax` costs nothing: the tokenizing worker
processes import it without JAX.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "beam_search": "beams",
    "ModelConfig": "config",
    "build": "models",
    "init": "sharding",
    "sample": "sampling",
}
_MODULES = (
    "attention", "backends", "batching", "beams", "blocks", "builtin", "chat", "checkpoint",
    "config", "data", "denoising", "distributed", "encoding", "examples", "families", "gguf",
    "hardware", "hf", "hf_tokenizers", "hf_vocabularies", "layers", "liveness", "losses", "lstm", "manifest",
    "masking", "metrics", "models", "objectives", "optim", "peft", "peft_format", "placement",
    "plan", "plots", "positions", "report", "safetensors_io", "sampling", "scoring", "sharding",
    "sources", "stacking", "task_sources", "tasks", "tokenizers", "train", "windows",
    "workdir",
)
__all__ = [*_HOME, *_MODULES]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"nanoflax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"nanoflax.{name}")
    raise AttributeError(f"module 'nanoflax' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
