"""nanoflax: language models from scratch in JAX, from the first embedding to generated text.

Names and rooms are imported on first use: `import nanoflax` starts no JAX, so that worker processes
and `--help` stay quick. Type checkers read the same names below TYPE_CHECKING.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoflax import (
        config,
        data,
        generate,
        hf,
        nn,
        parallel,
        peft,
        planning,
        report,
        runs,
        tasks,
        tokenizers,
        train,
    )
    from nanoflax.config import ModelConfig
    from nanoflax.generate import beam_search, sample
    from nanoflax.nn import build
    from nanoflax.parallel import init
    from nanoflax.runs import finetune, pretrain

__version__ = "0.1.0"

_ROOM_OF = {
    "ModelConfig": "config",
    "beam_search": "generate",
    "sample": "generate",
    "build": "nn",
    "init": "parallel",
    "finetune": "runs",
    "pretrain": "runs",
}
_ROOMS = (
    "config",
    "data",
    "generate",
    "hf",
    "nn",
    "parallel",
    "peft",
    "planning",
    "report",
    "runs",
    "tasks",
    "tokenizers",
    "train",
)
__all__ = [
    "ModelConfig",
    "beam_search",
    "build",
    "config",
    "data",
    "finetune",
    "generate",
    "hf",
    "init",
    "nn",
    "parallel",
    "peft",
    "planning",
    "pretrain",
    "report",
    "runs",
    "sample",
    "tasks",
    "tokenizers",
    "train",
]


def __getattr__(name):
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"nanoflax.{_ROOM_OF[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"nanoflax.{name}")
    raise AttributeError(f"module 'nanoflax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
