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
        evals,
        generate,
        hf,
        nn,
        parallel,
        peft,
        planning,
        report,
        runs,
        serve,
        tasks,
        tokenizers,
        train,
        untrusted,
    )
    from nanoflax.config import ModelConfig
    from nanoflax.generate import beam_search, sample
    from nanoflax.nn import build
    from nanoflax.parallel import init
    from nanoflax.runs import Run, finetune, pretrain
    from nanoflax.runs import open_run as open

__version__ = "0.1.0"

_HOMES = {  # name here: (room, name there)
    "ModelConfig": ("config", "ModelConfig"),
    "Run": ("runs", "Run"),
    "beam_search": ("generate", "beam_search"),
    "build": ("nn", "build"),
    "finetune": ("runs", "finetune"),
    "init": ("parallel", "init"),
    "open": ("runs", "open_run"),
    "pretrain": ("runs", "pretrain"),
    "sample": ("generate", "sample"),
}
_ROOMS = (
    "config",
    "data",
    "evals",
    "generate",
    "hf",
    "nn",
    "parallel",
    "peft",
    "planning",
    "report",
    "runs",
    "serve",
    "tasks",
    "tokenizers",
    "train",
    "untrusted",
)
__all__ = [
    "ModelConfig",
    "Run",
    "beam_search",
    "build",
    "config",
    "data",
    "evals",
    "finetune",
    "generate",
    "hf",
    "init",
    "nn",
    "open",
    "parallel",
    "peft",
    "planning",
    "pretrain",
    "report",
    "runs",
    "sample",
    "serve",
    "tasks",
    "tokenizers",
    "train",
    "untrusted",
]


def __getattr__(name):
    if name in _HOMES:
        room, there = _HOMES[name]
        return getattr(importlib.import_module(f"nanoflax.{room}"), there)
    if name in _ROOMS:
        return importlib.import_module(f"nanoflax.{name}")
    raise AttributeError(f"module 'nanoflax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
