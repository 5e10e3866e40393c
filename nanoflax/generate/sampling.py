"""Sampling: prefill, a scanned decode loop, and the filters that choose a token.

The state of the loop is one value, `Generation`. The prompts of a batch are padded on the left to a
bucket of lengths, so all rows write the same cache slot, and one compilation serves the bucket.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.nn import Array, LanguageModel

Prompts = Sequence[Sequence[int]]  # token ids, of any lengths; for a model with a source, the sources


class Filters(NamedTuple):
    """How the next token is drawn: numbers or traced scalars; None turns a filter off."""

    temperature: Any = 1.0  # None: greedy
    top_k: Any = None  # Fan et al. 2018
    top_p: Any = None  # Holtzman et al. 2020
    min_p: Any = None  # Nguyen et al. 2024
    repetition_penalty: Any = None  # Keskar et al. 2019


class Generation(NamedTuple):
    """The state between two tokens."""

    cache: dict
    token: Int[Array, " B"]  # not yet in the cache
    done: Bool[Array, " B"]  # the row has reached its end of sequence
    used: Bool[Array, "B V"] | None  # the tokens with a repetition penalty, if there is one
    rng: jax.Array


def bucket(n: int, least: int = 16) -> int:
    """The padded length of a prompt of n tokens: the next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def choose(
    logits: Float[Array, "B V"], rng: jax.Array, filters: Filters, used: Bool[Array, "B V"] | None = None
) -> Int[Array, " B"]:
    """The next token of each row, with filters in the order of Transformers: repetition penalty,
    temperature, top-k, top-p, min-p."""
    f = filters
    if f.repetition_penalty is not None:
        penalised = jnp.where(logits > 0, logits / f.repetition_penalty, logits * f.repetition_penalty)
        logits = jnp.where(used, penalised, logits)  # type: ignore  # the penalty comes with `used`
    if f.temperature is None:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(rng, filtered(logits, f)).astype(jnp.int32)


def filtered(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits over temperature, with -inf for the tokens that top-k, top-p and min-p exclude."""
    f, out = filters, -jnp.inf
    logits = logits / f.temperature
    if f.top_k is not None or f.top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        if f.top_k is not None:
            kth = ordered[:, jnp.minimum(f.top_k, logits.shape[-1]) - 1, None]
            logits = jnp.where(logits < kth, out, logits)
            ordered = jnp.where(ordered < kth, out, ordered)
        if f.top_p is not None:
            p = jax.nn.softmax(ordered, axis=-1)
            kept = jnp.cumsum(p, axis=-1) - p < f.top_p  # includes the first token whose sum reaches top_p
            least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, out, logits)
    if f.min_p is not None:
        least = logits.max(-1, keepdims=True) + jnp.log(f.min_p)
        logits = jnp.where(logits < least, out, logits)
    return logits


def only_below(vocab_size: int | None, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits with -inf from id vocab_size on, the padding of a vocabulary; None means V."""
    if vocab_size is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def start(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    new_tokens: int,
    rng: jax.Array,
    filters: Filters,
) -> Generation:
    """Read prompts that are padded on the left. The cache has room for new_tokens."""
    B, P = tokens.shape
    token, cache = model.prefill(params, tokens, lengths, new_tokens)
    used = None
    if filters.repetition_penalty is not None:
        used = jnp.zeros((B, model.config.vocab_size), bool)
        if model.config.reads_source:  # the prompt may be copied without a penalty
            used = used.at[jnp.arange(B), token].set(True)
        else:
            real = jnp.arange(P)[None] >= P - lengths[:, None]
            used = used.at[jnp.arange(B)[:, None], tokens].max(real)
    return Generation(cache, token, jnp.zeros(B, bool), used, rng)


def advance(
    model: LanguageModel,
    params: dict,
    state: Generation,
    filters: Filters,
    steps: int,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Generation, Int[Array, "B steps"]]:
    """Generate `steps` tokens by a scan. A finished row repeats eos_id. Ids from vocab_size on, the
    padding of a vocabulary, are never drawn. Returns (the new state, the tokens)."""

    def step(state, _):
        logits, cache = model.decode(params, state.token[:, None], state.cache)
        logits = only_below(vocab_size, logits[:, -1])
        rng, key = jax.random.split(state.rng)
        token, done, used = choose(logits, key, filters, state.used), state.done, state.used
        if eos_id is not None:
            token = jnp.where(done, eos_id, token)
            done |= token == eos_id
        if used is not None:
            used = used.at[jnp.arange(token.shape[0]), token].set(True)
        return Generation(cache, token, done, used, rng), token

    state, tokens = jax.lax.scan(step, state, length=steps)
    return state, tokens.T


def untied(model: LanguageModel, rows: int) -> LanguageModel:
    """The model for the parameters that `decoding_params` returns: with a separate head for several rows."""
    if rows == 1 or not model.config.tied:
        return model
    return model.clone(config=dataclasses.replace(model.config, tied=False))


def decoding_params(model: LanguageModel, params: dict, rows: int) -> dict:
    """The parameters for the decode loop: matrices in the compute dtype, and for several rows a copy
    of a tied head as [D, V], whose product is twice as fast on CPU."""
    dtype = model.compute_dtype
    params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
    if not model.config.tied or rows == 1:
        return params
    return params | {"unembed": {"kernel": params["embed"]["embedding"].T}}


@functools.cache
def compiled(function: Callable, donate: str | tuple = (), mesh: Any = None) -> Any:
    """jax.jit of a sampling function for parameters on a mesh, with the options of the platform."""
    static = {"model", "rows", "beams", "steps", "new_tokens", "early_stopping", "eos_id", "vocab_size"}
    return jax.jit(
        parallel.with_mesh(mesh, function),
        donate_argnames=donate,
        static_argnames=static & inspect.signature(function).parameters.keys(),
        compiler_options=parallel.compiler_options(jax.default_backend()),
    )


def _sample(model, params, tokens, lengths, rng, filters, steps, eos_id, vocab_size):
    rows = tokens.shape[0]
    model, params = untied(model, rows), decoding_params(model, params, rows)
    state = start(model, params, tokens, lengths, steps, rng, filters)
    return advance(model, params, state, filters, steps, eos_id, vocab_size)[1]


def sample(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    rng: jax.Array | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    temperature: 0 is greedy; rng: default key 0; eos_id: ends a row; vocab_size: ids from there on
    are never drawn. Compiled once for a bucket of prompt lengths, a batch size and max_new_tokens.
    Returns the new tokens of each prompt, cut before its eos_id.
    Raises: UserError for an empty prompt, an id out of range, a prompt that with its new tokens
    exceeds the model's context, or a filter out of its range.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    tokens, lengths = pad_left(prompts, model.config.context)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty)
    new = compiled(_sample, mesh=parallel.mesh_of(params))(
        model, params, tokens, lengths, _key(rng), filters, max_new_tokens, eos_id, vocab_size
    )
    return [cut(row, eos_id) for row in parallel.fetch(new).tolist()]


def stream(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    rng: jax.Array | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    chunk: int = 8,
) -> Iterator[list[list[int]]]:
    """`sample` as a stream: yields up to `chunk` new tokens of each prompt at a time.

    The tokens are the same as from `sample` with the same key. Ends when every row has its eos_id.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    tokens, lengths = pad_left(prompts, model.config.context)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty)
    chunks = -(-max_new_tokens // chunk)
    rows, on = len(prompts), functools.partial(compiled, mesh=parallel.mesh_of(params))
    params, model = on(decoding_params)(model, params, rows), untied(model, rows)
    state = on(start)(model, params, tokens, lengths, chunks * chunk, _key(rng), filters)
    ended = np.zeros(len(prompts), bool)
    for i in range(chunks):
        state, new = on(advance, "state")(model, params, state, filters, chunk, eos_id, vocab_size)
        rows = np.asarray(new)[:, : max_new_tokens - i * chunk].tolist()
        yield [cut(row, eos_id) for row in rows]  # [] for a finished row, which repeats eos_id
        ended |= np.array([eos_id is not None and eos_id in row for row in rows])
        if ended.all():
            return


def check_prompts(config: ModelConfig, prompts: Prompts, max_new_tokens: int) -> None:
    """Raises: UserError if the model cannot continue the prompts by max_new_tokens."""
    if config.head != "lm":
        raise UserError(
            f"model.architecture={config.architecture!r} with model.head={config.head!r} generates no text; "
            "use a decoder or an encoder-decoder"
        )
    if not prompts:
        raise UserError("prompts is empty; give at least one prompt")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty; give at least one token, such as the tokenizer's bos_id")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise UserError(f"prompt {i} has token id {bad}, outside the model's vocabulary of {config.vocab_size}")
        if not config.reads_source and len(prompt) + max_new_tokens > config.context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} this "
                f"exceeds the model's context of {config.context}; shorten the prompt or lower max_new_tokens"
            )
        if max(len(prompt), max_new_tokens) > config.context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, max_new_tokens={max_new_tokens}: neither "
                f"may exceed the model's context of {config.context}"
            )


def make_filters(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Filters:
    """Filters as float32 and int32 scalars, so that a new value needs no new compilation.

    Raises: UserError for a value out of its range.
    """
    for name, value, good, right in [
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", repetition_penalty, repetition_penalty is None or repetition_penalty > 0, "positive"),
    ]:
        if not good:
            raise UserError(f"{name}={value} must be {right}")
    real = lambda x: None if x is None else jnp.float32(x)
    return Filters(
        None if temperature == 0 else jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        real(top_p),
        real(min_p or None),
        real(repetition_penalty),
    )


def pad_left(prompts: Prompts, most: int | None = None, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompts padded on the left to a bucket of lengths, of at most `most` [B, P], their lengths [B]), int32."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    P = bucket(int(lengths.max()))
    tokens = np.full((len(prompts), min(P, most or P)), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return tokens, lengths


def cut(row: list[int], eos_id: int | None) -> list[int]:
    """The tokens of a list before its first eos_id."""
    return row[: row.index(eos_id)] if eos_id is not None and eos_id in row else row


def _key(rng):
    return jax.random.PRNGKey(0) if rng is None else rng
