"""Sampling: prefill and a scanned decode loop.

The state of the loop is one value, `Generation`. The prompts of a batch are padded on the left to a
bucket of lengths, so all rows write the same cache slot, and one compilation serves the bucket.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.generate.processors import (
    Filters,
    Written,
    choose,
    filtered,
    is_key_of_rows,
    make_filters,
    mask,
    next_logits,
    only_below,
)
from nanoflax.nn import Array, LanguageModel
from nanoflax.tokenizers import request_of

# Token ids: lists of any lengths, one list, or an array [B, T] or [T]; for a model with a source, the sources.
Prompts = Any


class Generation(NamedTuple):
    """The state between two tokens."""

    cache: dict
    token: Int[Array, " B"]  # not yet in the cache
    done: Bool[Array, " B"]  # the row has reached its end of sequence
    written: Written
    rng: jax.Array


def start(
    model: LanguageModel,
    params: dict,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    new_tokens: int,
    rng: jax.Array,
    limit: Int[Array, ""] | int | None = None,
) -> Generation:
    """Read prompts that are padded on the left. The cache has room for new_tokens; `limit` of them, by default all,
    will be used."""
    B, P = tokens.shape
    token, cache = model.prefill(params, tokens, lengths, new_tokens)
    prompt = written_prompt(model.config, tokens, lengths, token)
    history = jnp.pad(prompt, [(0, 0), (0, new_tokens)], constant_values=-1)
    limit = jnp.asarray(new_tokens if limit is None else limit, jnp.int32)
    written = Written(history, jnp.int32(prompt.shape[1]), jnp.int32(0), limit)
    return Generation(cache, token, jnp.zeros(B, bool), written, rng)


def written_prompt(config: ModelConfig, tokens: Array, lengths: Array, token: Array) -> Int[Array, "B P"]:
    """The beginning of `Written.history`: prompts with -1 for padding; for a model with a source, its start token."""
    if config.reads_source:
        return token[:, None]
    P = tokens.shape[1]
    return jnp.where(jnp.arange(P) >= P - lengths[:, None], tokens, -1)


def advance(
    model: LanguageModel,
    params: dict,
    state: Generation,
    filters: Filters,
    steps: int,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
    record: Callable | None = None,
) -> tuple[Generation, Any]:
    """Generate `steps` tokens by a scan. A finished row repeats eos_ids[0]. Ids from vocab_size on, the
    padding of a vocabulary, are never drawn. Returns (the new state, the tokens [B, steps]).

    record: (the logits [B, V] that a token is drawn from, after rules and filters, the token [B]) -> a tree of
    arrays [B, ...]; then the result is (the new state, (the tokens, this tree with arrays [B, steps, ...]))."""

    def step(state, _):
        logits, cache = model.decode(params, state.token[:, None], state.cache)
        logits, w = only_below(vocab_size, logits[:, -1]), state.written
        logits = next_logits(logits, model.config.generation, eos_ids, filters, w)
        rows = is_key_of_rows(state.rng)
        rng, key = jnp.unstack(jax.vmap(jax.random.split)(state.rng), axis=1) if rows else jax.random.split(state.rng)
        token, done = choose(logits, key, filters), state.done
        if eos_ids:
            token = jnp.where(done, eos_ids[0], token)
            done |= jnp.array(mask(eos_ids, logits.shape[-1]))[token]
        found = (token, record(filtered(logits, filters), token)) if record else token  # XLA filters once
        return Generation(cache, token, done, w.add(token), rng), found

    state, found = jax.lax.scan(step, state, length=steps)
    return state, jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def decoding_model(model: LanguageModel, rows: int) -> LanguageModel:
    """The model for the parameters that `decoding_params` returns: with a separate head for several rows, and the
    start token of its generation settings."""
    c = model.config
    start = c.start_id if c.generation.decoder_start_token_id is None else c.generation.decoder_start_token_id
    return model.clone(config=dataclasses.replace(c, tied=c.tied and rows == 1, start_id=start))


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
    static = {"model", "rows", "beams", "steps", "new_tokens", "early_stopping", "eos_ids", "vocab_size", "record"}
    return jax.jit(
        parallel.with_mesh(mesh, function),
        donate_argnames=donate,
        static_argnames=static & inspect.signature(function).parameters.keys(),
        compiler_options=parallel.compiler_options(jax.default_backend()),
    )


def _sample(model, params, tokens, lengths, rng, filters, steps, eos_ids, vocab_size):
    rows = tokens.shape[0]
    model, params = decoding_model(model, rows), decoding_params(model, params, rows)
    state = start(model, params, tokens, lengths, steps, rng)
    return advance(model, params, state, filters, steps, eos_ids, vocab_size)[1]


def sample(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    rng: jax.Array | None = None,
    eos_id: int | Sequence[int] | np.ndarray | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
) -> list[list[int]]:
    """Continue each prompt.

    prompts: see `Prompts`; with a tokenizer also a text or a list of texts. temperature: 0 is greedy. rng: default
    key 0. eos_id: one or several ids that end a row. vocab_size: ids from there on are never drawn.
    None takes the value of model.config.generation, else temperature 1 and no filter; top_k=0, top_p=1, min_p=0 and
    repetition_penalty=1 turn a filter off, eos_id=() the end. The other rules of model.config.generation (bad words,
    forced tokens, least lengths) always hold, as in Transformers' `generate`.
    Compiled once for a bucket of prompt lengths, a batch size and max_new_tokens.
    Returns the new tokens of each prompt, cut before its eos_id.
    Raises: UserError for an empty prompt, an id out of range, a prompt that with its new tokens exceeds the model's
    context, a filter out of its range, or a setting in model.config.generation that is not computed.
    """
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size, tokenizer)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty, model.config.generation)
    run, rope, rng = compiled(_sample, mesh=parallel.mesh_of(params)), model.config.rope, _key(rng)
    # Longer texts than rope.context have other angles: there the text is read again from its beginning.
    short = rope.context + 1 - int(max(lengths))
    parts = [short, max_new_tokens - short] if rope.scaling == "longrope" and 0 < short < max_new_tokens else []
    new = [[] for _ in lengths]
    for steps in parts or [max_new_tokens]:
        texts = [[*row[len(row) - n :], *more] for row, n, more in zip(tokens.tolist(), lengths, new, strict=True)]
        if any(new):
            tokens, lengths, _ = request_of(model.config, texts, steps, eos_id, vocab_size)
            rng = jax.random.fold_in(rng, 1)
        found = parallel.fetch(run(model, params, tokens, lengths, rng, filters, steps, *ends)).tolist()
        new = [a + b for a, b in zip(new, found, strict=True)]
    return [cut(row, ends[0]) for row in new]


def stream(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int = 64,
    rng: jax.Array | None = None,
    eos_id: int | Sequence[int] | np.ndarray | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    chunk: int = 8,
    **filters: Any,
) -> Iterator[list[list[int]]]:
    """`sample` as a stream: yields up to `chunk` new tokens of each prompt at a time.

    filters: temperature to repetition_penalty of `sample`. The tokens are the same as from `sample` with the same
    key. Ends when every row has its eos_id.
    """
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size, tokenizer)
    made = make_filters(**filters, defaults=model.config.generation)
    pieces = sample_in_chunks(model, params, tokens, lengths, max_new_tokens, made, _key(rng), *ends, chunk)
    ended = np.zeros(len(tokens), bool)
    for i, (_, new) in enumerate(pieces):
        found = np.asarray(new)[:, : max_new_tokens - i * chunk].tolist()
        yield [cut(row, ends[0]) for row in found]  # [] for a finished row, which repeats its end
        ended |= np.array([not {*ends[0]}.isdisjoint(row) for row in found])
        if ended.all():
            return


def sample_in_chunks(
    model: LanguageModel,
    params: dict,
    tokens: Int[np.ndarray, "B P"],
    lengths: Int[np.ndarray, " B"],
    max_new_tokens: int,
    filters: Filters,
    rng: jax.Array,
    eos_ids: tuple[int, ...],
    vocab_size: int | None,
    chunk: int,
    record: Callable | None = None,
) -> Iterator[tuple[Bool[Array, " B"], Any]]:
    """Yields (whether a row has ended, the result of `advance`) for each `chunk` of tokens, until there are at least
    max_new_tokens. tokens: prompts padded on the left. Compiled functions do the work; call this without jit."""
    chunks, rows = -(-max_new_tokens // chunk), len(tokens)
    on = functools.partial(compiled, mesh=parallel.mesh_of(params))
    params, model = on(decoding_params)(model, params, rows), decoding_model(model, rows)
    state = on(start)(model, params, tokens, lengths, chunks * chunk, rng, np.int32(max_new_tokens))
    for _ in range(chunks):
        state, found = on(advance, "state")(model, params, state, filters, chunk, eos_ids, vocab_size, record)
        yield state.done, found


def cut(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens of a list before the first that is one of eos_ids."""
    return list(itertools.takewhile(lambda token: token not in eos_ids, row))


def _key(rng):
    return jax.random.PRNGKey(0) if rng is None else rng
