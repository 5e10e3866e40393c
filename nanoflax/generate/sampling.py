"""Sampling: prefill and a scanned decode loop.

The state of the loop is one value, `Generation`. The prompts of a batch are padded on the left to a
bucket of lengths, so all rows write the same cache slot, and one compilation serves the bucket.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.generate.processors import Filters, Written, choose, filtered, make_filters, next_logits, only_below
from nanoflax.kernels import for_rows, is_key_of_rows, is_quantized, most_probable
from nanoflax.nn import Array, LanguageModel
from nanoflax.tokenizers import answers, request_of, row_settings

# Token ids: lists of any lengths, one list, or an array [B, T] or [T]; for a model with a source, the sources.
Prompts = Any
Setting = float | Sequence[float | None] | None  # for all prompts, or for each
Bias = Mapping[int, float] | Sequence[Mapping[int, float] | None] | None


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
    limit: Int[Array, "*B"] | int,
) -> Generation:
    """Read prompts that are padded on the left. The cache has room for new_tokens; `limit` of them will be used."""
    token, cache = model.prefill(params, tokens, lengths, new_tokens)
    written = first_written(model.config, tokens, lengths, token, new_tokens, limit)
    return Generation(cache, token, jnp.zeros(len(token), bool), written, rng)


def first_written(config: ModelConfig, tokens: Array, lengths: Array, token: Array, room: int, limit: Any) -> Written:
    """What is written after the prompts, with room for new tokens; for a model with a source, its start token."""
    B, P = tokens.shape
    prompt, source = jnp.where(jnp.arange(P) >= P - lengths[:, None], tokens, -1), None
    if config.reads_source:
        prompt, source = token[:, None], prompt
    history = jnp.pad(prompt, [(0, 0), (0, room)], constant_values=-1)
    return Written(history, jnp.int32(prompt.shape[1]), jnp.int32(0), jnp.asarray(limit, jnp.int32), source)


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

    record: (the model's logits [B, V], those that a token is drawn from, after rules and filters, the token [B]) ->
    a tree of arrays [B, ...]; then the result is (the new state, (the tokens, this tree with arrays [B, steps, ...])).
    """

    def step(state, _):
        logits, cache = model.decode(params, state.token[:, None], state.cache)
        own, w = only_below(vocab_size, logits[:, -1]), state.written
        logits = only_below(vocab_size, next_logits(own, model.config.generation, eos_ids, filters, w))
        rows = is_key_of_rows(state.rng)
        rng, key = jnp.unstack(jax.vmap(jax.random.split)(state.rng), axis=1) if rows else jax.random.split(state.rng)
        token, done = choose(logits, key, filters), state.done
        if eos_ids:
            token = jnp.where(done, eos_ids[0], token)
            done |= jnp.isin(token, jnp.array(eos_ids))
        found = (token, record(own, filtered(logits, filters), token)) if record else token  # XLA filters once
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
    """The parameters for the decode loop: matrices in the compute dtype, quantised ones in the order for so many rows,
    and for several rows a copy of a tied head as [D, V], whose product is twice as fast on CPU."""
    dtype = model.compute_dtype
    if model.config.tied and rows > 1:
        params = params | {"unembed": {"kernel": params["embed"]["embedding"].T}}

    def prepare(p):
        if is_quantized(p):
            return for_rows(p, rows)
        return p.astype(dtype) if p.ndim >= 2 else p

    return jax.tree.map(prepare, params, is_leaf=is_quantized)


_STATIC = ("model", "rows", "beams", "steps", "new_tokens", "early_stopping", "eos_ids", "vocab_size", "record")
compiled = functools.partial(parallel.compiled, static=_STATIC)


@functools.cache  # for jax.jit, which compiles again for another function
def _recorder(n):
    return None if n is None else lambda logits, _, token: most_probable(logits, token, n)


def _sample(model, params, tokens, lengths, rng, limit, filters, before, steps, eos_ids, vocab_size, record):
    rows = tokens.shape[0]
    model, params = decoding_model(model, rows), decoding_params(model, params, rows)
    state = start(model, params, tokens, lengths, steps, rng, limit)
    state = state._replace(written=state.written._replace(step=before))  # new tokens at the end of the prompts
    return advance(model, params, state, filters, steps, eos_ids, vocab_size, record)[1]


def sample(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: Setting = None,
    top_k: Setting = None,
    top_p: Setting = None,
    min_p: Setting = None,
    repetition_penalty: Setting = None,
    rng: jax.Array | Sequence[int] | None = None,
    eos_id: int | Sequence[int] | np.ndarray | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    logit_bias: Bias = None,
    log_probabilities: int | None = None,
    **more: Setting,
) -> list[Any]:
    """Continue each prompt.

    prompts: see `Prompts`; with a tokenizer also a text or a list of texts. temperature: 0 is greedy. rng: default
    key 0. eos_id: one or several ids that end a row. vocab_size: ids from there on are never drawn.
    logit_bias: numbers to add to the logits of ids. max_new_tokens, the filters and logit_bias may be lists with an
    item for each prompt, and rng keys or seeds for each; then a row is drawn as if it were alone. more: top_h,
    typical_p, epsilon_cutoff, eta_cutoff, encoder_repetition_penalty; all filters have their meaning in Transformers.
    None takes the value of model.config.generation, else temperature 1 and no filter; top_k=0, top_p=1, min_p=0 and
    repetition_penalty=1 turn a filter off, eos_id=() the end. The other rules of model.config.generation (bad words,
    forced tokens, least lengths) always hold, as in Transformers' `generate`.
    Compiled once for a bucket of prompt lengths, a batch size and max_new_tokens.
    Returns the new tokens of each prompt, cut before its eos_id; with log_probabilities=n a `Scored` for each prompt,
    with the log-probabilities of its tokens and n alternatives from the same pass.
    Raises: UserError for an empty prompt, an id out of range, a prompt that with its new tokens exceeds the model's
    context, a filter out of its range, or a setting in model.config.generation that is not computed.
    """
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size, tokenizer)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty, model.config.generation, **more)
    filters, rng, limits, record = _by_row(model, tokens, filters, rng, max_new_tokens, logit_bias, log_probabilities)
    run, most = compiled(_sample, mesh=parallel.mesh_of(params)), int(limits.max())
    # Longer texts than rope.context have other angles: there the text is read again from its beginning.
    turns = model.config.rope.scaling == "longrope" and not model.config.reads_source
    short = model.config.rope.context + 1 - int(max(lengths)) if turns else 0
    parts = [short, most - short] if 0 < short < most else [most]
    found = run(model, params, tokens, lengths, rng, limits, filters, np.int32(0), parts[0], *ends, record)
    pieces = [jax.tree.map(parallel.fetch, found)]
    for steps in parts[1:]:
        new = jax.tree.leaves(pieces[0])[0].tolist()
        texts = [[*row[len(row) - n :], *more] for row, n, more in zip(tokens.tolist(), lengths, new, strict=True)]
        tokens, lengths, _ = request_of(model.config, texts, steps, eos_id, vocab_size)
        rng = jax.vmap(jax.random.fold_in, (0, None))(rng, 1) if is_key_of_rows(rng) else jax.random.fold_in(rng, 1)
        found = run(model, params, tokens, lengths, rng, limits, filters, np.int32(short), steps, *ends, record)
        pieces.append(jax.tree.map(parallel.fetch, found))
    return answers(jax.tree.map(lambda *x: np.concatenate(x, 1), *pieces), ends[0], limits)


def _by_row(model, tokens, filters, rng, max_new_tokens, logit_bias, log_probabilities):
    """(Filters, key or keys, the number of new tokens [B], the `record` of `advance`) of arguments of `sample`."""
    rng = jax.random.PRNGKey(0) if rng is None else rng
    rng = rng if isinstance(rng, jax.Array) else jnp.stack([jax.random.PRNGKey(seed) for seed in rng])
    lists = {"rng": rng if is_key_of_rows(rng) else None, "filters": filters.temperature}
    bias = row_settings(len(tokens), model.config.vocab_size, lists, logit_bias, log_probabilities)
    if bias is not None:
        filters = filters._replace(logit_bias=jnp.asarray(bias))
    return filters, rng, np.broadcast_to(np.int32(max_new_tokens), len(tokens)), _recorder(log_probabilities)


def stream(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int] = 64,
    rng: jax.Array | Sequence[int] | None = None,
    eos_id: int | Sequence[int] | np.ndarray | None = None,
    vocab_size: int | None = None,
    tokenizer: Any = None,
    chunk: int = 8,
    logit_bias: Bias = None,
    log_probabilities: int | None = None,
    **filters: Any,
) -> Iterator[list[Any]]:
    """`sample` as a stream: yields up to `chunk` new tokens of each prompt at a time, or a Scored of them.

    filters: those of `sample`. The tokens are the same as from `sample` with the same key. Ends when every row has its
    eos_id or its largest length.
    """
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size, tokenizer)
    made = make_filters(**filters, defaults=model.config.generation)
    made, rng, limits, record = _by_row(model, tokens, made, rng, max_new_tokens, logit_bias, log_probabilities)
    for done, found in sample_in_chunks(model, params, tokens, lengths, limits, made, rng, *ends, chunk, record):
        yield answers(jax.tree.map(parallel.fetch, found), ends[0], limits)  # a finished row repeats its end: []
        limits = limits - chunk
        if (parallel.fetch(done) | (limits <= 0)).all():
            return


def sample_in_chunks(
    model: LanguageModel,
    params: dict,
    tokens: Int[np.ndarray, "B P"],
    lengths: Int[np.ndarray, " B"],
    max_new_tokens: int | Int[np.ndarray, " B"],
    filters: Filters | Callable[[], Filters],
    rng: jax.Array,
    eos_ids: tuple[int, ...],
    vocab_size: int | None,
    chunk: int,
    record: Callable | None = None,
) -> Iterator[tuple[Bool[Array, " B"], Any]]:
    """Yields (whether a row has ended, the result of `advance`) for each `chunk` of tokens, until there are at least
    max_new_tokens. tokens: prompts padded on the left. filters: a function is called before each chunk. Not for jit."""
    most, rows = int(np.max(max_new_tokens)), len(tokens)
    chunks = -(-most // chunk)
    room = most if model.config.length_turns else chunks * chunk  # steps beyond it only give tokens that nobody reads
    on = functools.partial(compiled, mesh=parallel.mesh_of(params))
    params, model = on(decoding_params)(model, params, rows), decoding_model(model, rows)
    state = on(start)(model, params, tokens, lengths, room, rng, np.int32(max_new_tokens))
    for _ in range(chunks):
        now = filters() if callable(filters) else filters
        state, found = on(advance, "state")(model, params, state, now, chunk, eos_ids, vocab_size, record)
        yield state.done, found
