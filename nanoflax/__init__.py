"""nanoflax: language models from scratch in JAX, from the first embedding to generated text.

Names are imported on first use, so `import nanoflax` costs nothing: the tokenizing worker
processes import it without JAX.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "build": "models",
    "init": "sharding",
    "sample": "sampling",
}
_MODULES = (
    "attention", "batching", "blocks", "builtin", "chat", "checkpoint", "config", "data",
    "examples", "gguf", "hardware", "hf_tokenizers", "hf_vocabularies", "layers", "losses",
    "manifest", "masking", "metrics", "models", "objectives", "optim", "plots", "positions",
    "report", "safetensors_io", "sampling", "sharding", "sources", "task_sources", "tokenizers",
    "train",
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
