"""The tokenizer of a run, and the size of its vocabulary."""

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from nanoflax import parallel
from nanoflax.config import Config, DataConfig, ModelConfig
from nanoflax.errors import UserError
from nanoflax.runs import remote


def get_tokenizer(config: DataConfig, directory: str, texts: Callable[[], Iterable[str]], given: Any = None) -> Any:
    """The tokenizer of the run in directory; without a run, data.tokenizer, trained on texts() if necessary.

    given: a tokenizer instead of one that would be trained.
    """
    from nanoflax import tokenizers

    found = existing_tokenizer(config, directory, given)
    if found is not None:
        return found
    kind, size = tokenizers.parse(config.tokenizer)
    return train_on_first_process(lambda: tokenizers.train_sentencepiece(texts(), size, kind), directory)


def existing_tokenizer(config: DataConfig, directory: str, given: Any = None) -> Any:
    """`get_tokenizer`, or None if the tokenizer must be trained."""
    from nanoflax import tokenizers

    kind, _ = tokenizers.parse(config.tokenizer)
    if os.path.exists(os.path.join(directory, "config.json")):
        return tokenizers.load(os.path.join(directory, "tokenizer"))
    return tokenizers.load(config.tokenizer) if kind in ("bytes", "path") else given


def with_own_template(tokenizer: Any, workdir: str) -> Any:
    """The tokenizer with the chat template of the run in workdir. In a new run, a template that reads the date keeps
    the date of the run's start."""
    from nanoflax import tokenizers

    if os.path.exists(os.path.join(workdir, "config.json")):
        saved = tokenizers.load(os.path.join(workdir, "tokenizer"))
        return saved if saved.fingerprint == tokenizer.fingerprint else tokenizer  # another one is refused later
    now = datetime.datetime.fromisoformat(parallel.gather_from_processes(datetime.datetime.now().isoformat())[0])
    dated = tokenizers.with_date(tokenizer, now)
    if dated is not tokenizer:
        print(f"the chat template reads the date; this run always writes {now:%Y-%m-%d}, the date of its start")
    return dated


def train_on_first_process(train: Callable[[], Any], directory: str) -> Any:
    """The tokenizer of train(), for the run in directory. Process 0 trains it; the other processes read its files. In
    a remote run, each trains the same one."""
    import jax

    from nanoflax import tokenizers

    part = os.path.join(directory, "tokenizer.part")
    if jax.process_count() == 1 or remote.is_copy(part):  # the hosts of a remote run share no directory
        return train()
    parallel.run_on_main_process(lambda: train().save(part))
    tokenizer = tokenizers.load(part)
    parallel.gather_from_processes("read")
    if parallel.is_main_process():
        shutil.rmtree(part)
    return tokenizer


def with_saved_vocabulary(model: ModelConfig, saved: Config) -> ModelConfig:
    """The ModelConfig with the vocabulary size and padding of a saved Config, if `model` has no padding, and no
    vocabulary size or the same one."""
    old = saved.model
    if model.vocab_padding or model.vocab_size not in (0, old.vocab_size - old.vocab_padding):
        return model
    return dataclasses.replace(model, vocab_size=old.vocab_size, vocab_padding=old.vocab_padding)


def with_vocabulary(model: ModelConfig, tokens: int, mesh: Any, saved: Config | None = None) -> ModelConfig:
    """The ModelConfig with its vocabulary size V: from a saved Config, or the tokenizer's (if V is 0), padded if
    the mesh needs it. tokens: the vocabulary size of the tokenizer.

    Raises: UserError if V is less than the tokenizer's.
    """
    model = with_saved_vocabulary(model, saved) if saved else model
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokens)
    if (size := model.vocab_size - model.vocab_padding) < tokens:
        raise UserError(f"model.vocab_size={size} is less than the tokenizer's {tokens}; set it to 0 or at least that")
    return model if saved else parallel.pad_vocabulary(model, mesh)
