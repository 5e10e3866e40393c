"""Requests to a generating model: the forms, checks and padding of prompts, and the ids that end a text."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.tokenizers.chat import stop_ids
from nanoflax.tokenizers.framing import prompt_ids


def request_of(
    config: ModelConfig, prompts: Any, new: int, eos_id: Any, vocab_size: int | None, tokenizer: Any = None
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], int]]:
    """(prompts padded on the left [B, P], their lengths [B], (eos_ids, vocab_size)) of the arguments of
    `nanoflax.sample`; new: max_new_tokens.

    Raises: UserError for a prompt or a setting of config.generation that the model cannot follow.
    """
    if tokenizer is not None:
        texts = [prompts] if isinstance(prompts, str) else prompts
        prompts = [prompt_ids(tokenizer, p, config.reads_source) if isinstance(p, str) else p for p in texts]
        eos_id = stop_ids(tokenizer) if eos_id is None else eos_id
        vocab_size = vocab_size or tokenizer.vocab_size
    prompts = token_lists(prompts)
    check_prompts(config, prompts, new)
    eos_id = config.generation.eos_token_id if eos_id is None else eos_id
    eos_ids = tuple(map(int, np.ravel(eos_id)))
    return *pad_left(prompts, config.max_length), (eos_ids, vocab_size or config.vocab_size - config.vocab_padding)


def token_lists(prompts: Any) -> list[list[int]]:
    """Prompts of token ids (an array [B, T] or [T], one list, or lists of any lengths) as lists of integers.

    Raises: UserError for a text, and for what is no token id.
    """
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    given = [p.tolist() if hasattr(p, "tolist") else p for p in given] if isinstance(given, list | tuple) else given
    if isinstance(given, list) and given and all(type(p) is int for p in given):
        given = [given]
    words = "token ids: an array [B, T] or [T] of integers, a list of them or a list of lists"
    if isinstance(given, str) or isinstance(given, list) and any(isinstance(p, str) for p in given):
        raise UserError(f"prompts={str(prompts)[:60]!r} is a text; give a tokenizer, or {words}")
    if not isinstance(given, list) or not all(isinstance(p, list | tuple) for p in given):
        raise UserError(f"prompts={str(prompts)[:60]} must be {words}")
    for i, prompt in enumerate(given):
        if wrong := [t for t in prompt if not isinstance(t, numbers.Integral) or isinstance(t, bool)]:
            raise UserError(f"prompt {i} has {wrong[0]!r:.60}, which is no token id; prompts must be {words}")
    return [[int(t) for t in prompt] for prompt in given]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises: UserError if the model cannot continue the prompts by max_new_tokens."""
    if config.head != "lm":
        raise UserError(
            f"model.architecture={config.architecture!r} with model.head={config.head!r} generates no text; "
            "use a decoder or an encoder-decoder"
        )
    if config.generation.unsupported:
        raise UserError(
            f"model.generation has {config.generation.unsupported}, from generation_config.json, which nanoflax does "
            "not compute; remove it there, or from the model's configuration"
        )
    if not prompts:
        raise UserError("prompts is empty; give at least one prompt")
    if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1, and an integer")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty; give at least one token, such as the tokenizer's bos_id")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise UserError(f"prompt {i} has token id {bad}, outside the model's vocabulary of {config.vocab_size}")
        if not config.reads_source and len(prompt) + max_new_tokens > config.max_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} this "
                f"exceeds the model's context of {config.context}; shorten the prompt or lower max_new_tokens"
            )
        if max(len(prompt), max_new_tokens) > config.max_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, max_new_tokens={max_new_tokens}: neither "
                f"may exceed the model's context of {config.context}"
            )


def bucket(n: int, least: int = 16) -> int:
    """The padded length of a prompt of n tokens: the next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def pad_left(prompts: Sequence[Sequence[int]], most: int | None = None, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompts padded on the left to a bucket of lengths, of at most `most` [B, P], their lengths [B]), int32."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    P = bucket(int(lengths.max()))
    tokens = np.full((len(prompts), min(P, most or P)), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return tokens, lengths
