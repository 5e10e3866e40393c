"""The loop of speculative decoding: guess, check, keep.

    result = speculate(model, params, prompts, Lookup(), temperature=0)      # prompts: lists of ids

The prompts are continued one after another, as each of them keeps another number of guesses.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import generate
from nanoflax.errors import UserError
from nanoflax.kernels import is_key_of_rows
from nanoflax.nn import LanguageModel
from nanoflax.speculation.acceptance import accept
from nanoflax.speculation.caches import Decoding, donated
from nanoflax.speculation.proposals import Proposer
from nanoflax.tokenizers import cut, pad_left, request_of


class Round(NamedTuple):
    """One pass of the model."""

    row: int  # the number of the prompt
    tokens: list[int]  # new ones, before the id that ends the text
    guessed: int
    kept: int  # guesses


class Speculated(NamedTuple):
    """A continuation. passes: of the model, after the prompt's."""

    tokens: list[int]
    passes: int
    guessed: int
    kept: int


def speculate(
    model: LanguageModel, params: dict, prompts: Any, proposer: Proposer, *args, **options
) -> list[Speculated]:
    """The continuation of each prompt, and what the guesses were worth. Arguments as in `stream`."""
    rounds = list(stream(model, params, prompts, proposer, *args, **options))
    rows = [[r for r in rounds if r.row == i] for i in range(1 + max(r.row for r in rounds))]
    return [
        Speculated(sum((r.tokens for r in row), []), len(row), sum(r.guessed for r in row), sum(r.kept for r in row))
        for row in rows
    ]


def stream(
    model: LanguageModel,
    params: dict,
    prompts: Any,
    proposer: Proposer,
    max_new_tokens: int = 64,
    rng: jax.Array | None = None,
    eos_id: Any = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    **filters: Any,
) -> Iterator[Round]:
    """Continue each prompt, and yield the tokens of each pass of the model.

    The arguments are those of `nanoflax.sample` without logit_bias and log_probabilities, with one value for all
    prompts. Greedily (temperature=0) the tokens are those of `sample`; else they follow the same distribution, and are
    others for the same key.
    Raises: UserError as `sample` does, and for a proposer that cannot guess for the model.
    """
    made = generate.make_filters(**filters, defaults=model.config.generation)
    one_key = rng is None or isinstance(rng, jax.Array) and not is_key_of_rows(rng)
    if any(np.ndim(x) for x in (max_new_tokens, *made)) or not one_key:
        raise UserError("speculation takes one value of each setting and one key for all prompts, not lists")
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size, tokenizer)
    if problems := proposer.problems(model.config, int(lengths.max()), max_new_tokens):
        raise UserError("; ".join(problems))
    _check_angles(model.config, lengths, max_new_tokens, proposer.tokens)
    rng = None if made.temperature is None else jax.random.PRNGKey(0) if rng is None else rng
    decoding = Decoding.of(model, params)
    for row, (padded, n) in enumerate(zip(tokens.tolist(), lengths, strict=True)):
        key = None if rng is None else jax.random.fold_in(rng, row)
        for new, guessed, kept in _text(
            decoding, proposer, padded[len(padded) - n :], max_new_tokens, made, key, *ends
        ):
            yield Round(row, new, guessed, kept)


def _check_angles(config, lengths, new, guesses):
    """Raises: UserError if room for the guesses would change the rotary angles of a text; see `nn.angles_of`."""
    rope, begin = config.rope, 1 if config.reads_source else lengths
    other = begin + new + guesses - 1 > rope.context
    if rope.scaling == "longrope":
        other &= begin <= rope.context  # else all angles are those of long texts
    if rope.scaling in ("longrope", "dynamic") and np.any(other):
        raise UserError(
            f"max_new_tokens={new}: with {guesses} guesses the text may pass model.rope.context={rope.context}, where "
            f"{rope.scaling} has other angles, which speculation does not compute; give fewer tokens, or no speculation"
        )


def _text(decoding, proposer, prompt, limit, filters, rng, eos_ids, vocab_size):
    """Yields (new tokens, guesses, kept guesses) of one prompt."""
    tokens, lengths = pad_left([prompt], decoding.one[0].config.max_length)
    room, reads_source = limit + proposer.tokens, decoding.one[0].config.reads_source
    last, cache = decoding.prefill(tokens, lengths, room)
    guesser = proposer.start(tokens, lengths, room, filters)
    text, made = ([last] if reads_source else [*prompt]), 0  # a text begins with the source's start token
    history = np.full((1 if reads_source else tokens.shape[1]) + room, -1, np.int32)
    begin = len(history) - room - len(text)  # of the text in the history, after padding
    source = pad_left([prompt], decoding.one[0].config.max_length, -1)[0][0] if reads_source else None
    check = generate.compiled(_check, *donated(cache), mesh=decoding.mesh)
    seen = [*prompt, *text] if reads_source else text  # what a lookup reads
    while made < limit:
        rng, for_guess, for_check = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        guesses, guess_logits = guesser.guess(seen, for_guess)
        end = begin + len(text)
        history[begin:end] = text
        k = len(guesses)
        model, params = decoding.several if k else decoding.one
        written = history, np.int32(end), np.int32(made), np.int32(limit), source
        after, row, kept = check(
            model, params, np.int32(text[-1]), guesses, guess_logits, cache, written, filters, for_check,
            eos_ids=eos_ids, vocab_size=vocab_size,
        )  # fmt: skip
        row, kept = np.asarray(row), int(kept)
        cache = decoding.rewind(cache, after, np.concatenate([[text[-1]], row[:k]]).astype(np.int32), kept + 1)
        guesser.keep(kept)
        new = row[: kept + 1].tolist()[: limit - made]
        text, seen, made = text + new, seen + new, made + len(new)
        before_end = cut(new, eos_ids)
        yield before_end, k, kept
        if len(before_end) < len(new):
            return


def _check(model, params, token, guesses, guess_logits, cache, written, filters, rng, eos_ids, vocab_size):
    """(the cache with the token and all guesses, the kept guesses and the token after them [k + 1], kept)."""
    k, w = len(guesses), generate.Written(*written)
    logits, cache = model.decode(params, jnp.concatenate([token[None], guesses])[None], cache)
    logits = generate.only_below(vocab_size, logits[0])
    # Row i has the first i guesses in its history.
    i, at = jnp.arange(k + 1), jnp.arange(len(w.history)) - w.end
    guessed = (at >= 0) & (at < i[:, None])
    history = jnp.where(guessed, jnp.take(jnp.append(guesses, -1), jnp.clip(at, 0, k)), w.history)
    source = None if w.source is None else jnp.broadcast_to(w.source, (k + 1, len(w.source)))
    rows = generate.Written(history, w.end + i, w.step + i, w.limit, source)
    logits = generate.next_logits(logits, model.config.generation, eos_ids, filters, rows)
    logits = generate.only_below(vocab_size, logits)
    if rng is not None:
        logits = generate.filtered(logits, filters)
        if guess_logits is not None:
            missing = logits.shape[-1] - guess_logits.shape[-1]
            guess_logits = jnp.pad(guess_logits, [(0, 0), (0, missing)], constant_values=-jnp.inf)
    kept, token = accept(logits, guesses, guess_logits, rng)
    return cache, jnp.append(guesses, -1).at[kept].set(token), kept
