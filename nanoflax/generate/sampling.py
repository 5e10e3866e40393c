"""Generation: prefill, a scanned decode loop, and the filters that choose a token.

Everything the loop carries is one value, `Generation`. Prompts of a batch are padded on the left to
a length bucket, so all rows write the same cache slot and one compilation serves every prompt of a
bucket.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import parallel
from nanoflax.errors import UserError


class Filters(NamedTuple):
    """How the next token is drawn; None leaves a filter out. Plain numbers or traced scalars."""

    temperature: Any = 1.0  # None is greedy
    top_k: Any = None  # Fan et al. 2018
    top_p: Any = None  # Holtzman et al. 2020
    min_p: Any = None  # Nguyen et al. 2024
    repetition_penalty: Any = None  # Keskar et al. 2019


class Generation(NamedTuple):
    """The state between two tokens."""

    cache: Any
    token: jax.Array  # [B] int32, not yet in the cache
    done: jax.Array  # [B] bool: the row has met its end of sequence
    seen: Any  # [B, V] bool for the repetition penalty, else None
    rng: jax.Array


def bucket(n, least=16):
    """The padded length of a prompt of n tokens: the next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def choose(logits, rng, filters, seen=None):
    """The next token of each row. logits: [B, V] float32; seen: [B, V] bool. Returns [B] int32.

    In the order of Transformers: repetition penalty, temperature, top-k, top-p, min-p.
    """
    f = filters
    if f.repetition_penalty is not None:
        penalised = jnp.where(logits > 0, logits / f.repetition_penalty, logits * f.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if f.temperature is None:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(rng, filtered(logits, f)).astype(jnp.int32)


def filtered(logits, filters):
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
            kept = jnp.cumsum(p, axis=-1) - p < f.top_p  # the first to reach top_p stays
            least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, out, logits)
    if f.min_p is not None:
        least = logits.max(-1, keepdims=True) + jnp.log(f.min_p)
        logits = jnp.where(logits < least, out, logits)
    return logits


def only_below(vocab_size, logits):
    """Logits [B, V], -inf from id vocab_size on (a padded vocabulary's); None is V."""
    if vocab_size is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def start(model, params, tokens, lengths, new_tokens, rng, filters):
    """Read the prompts: tokens [B, P] int32 padded on the left, lengths [B] int32.

    The cache has room for new_tokens. Returns a Generation.
    """
    B, P = tokens.shape
    token, cache = model.prefill(params, tokens, lengths, new_tokens)
    seen = None
    if filters.repetition_penalty is not None:
        seen = jnp.zeros((B, model.config.vocab_size), bool)
        if model.config.reads_source:  # the prompt may be copied without a penalty
            seen = seen.at[jnp.arange(B), token].set(True)
        else:
            real = jnp.arange(P)[None] >= P - lengths[:, None]
            seen = seen.at[jnp.arange(B)[:, None], tokens].max(real)
    return Generation(cache, token, jnp.zeros(B, bool), seen, rng)


def advance(model, params, state, filters, steps, eos_id=None, vocab_size=None):
    """Generate `steps` tokens by a scan. A finished row is frozen: it goes on with eos_id.

    vocab_size: ids from there on (a padded vocabulary's) are never drawn.
    Returns (Generation, tokens [B, steps] int32).
    """

    def step(state, _):
        logits, cache = model.decode(params, state.token[:, None], state.cache)
        logits = only_below(vocab_size, logits[:, -1])
        rng, key = jax.random.split(state.rng)
        token, done, seen = choose(logits, key, filters, state.seen), state.done, state.seen
        if eos_id is not None:
            token = jnp.where(done, eos_id, token)
            done |= token == eos_id
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
        return Generation(cache, token, done, seen, rng), token

    state, tokens = jax.lax.scan(step, state, length=steps)
    return state, tokens.T


def untied(model, rows):
    """The model whose parameters are `decoding_params`."""
    if rows == 1 or not model.config.tied:
        return model
    return model.clone(config=dataclasses.replace(model.config, tied=False))


def decoding_params(model, params, rows):
    """Parameters as the loop reads them at every token: matrices in the compute dtype, and a tied
    head as [D, V] besides, which several rows multiply twice as fast on CPU."""
    dtype = model.compute_dtype
    params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
    if not model.config.tied or rows == 1:
        return params
    return params | {"unembed": {"kernel": params["embed"]["embedding"].T}}


@functools.cache
def compiled(function, donate=(), mesh=None):
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
    model,
    params,
    prompts,
    max_new_tokens=64,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    rng=None,
    eos_id=None,
    vocab_size=None,
):
    """Continue each prompt.

    prompts: a list of lists of token ids, of any lengths; temperature 0 is greedy; rng: a PRNG key
    (default: key 0); eos_id: a row ends with it; vocab_size: ids from there on are never drawn.
    Compiled once for a bucket of prompt lengths, batch size and max_new_tokens.
    Returns a list of lists: the new tokens of each prompt, cut before its eos_id.
    Raises: UserError for an empty prompt, an id out of range, a prompt that with its new tokens
    exceeds the model's context, or a filter out of its range.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    tokens, lengths = pad_left(prompts)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty)
    new = compiled(_sample, mesh=parallel.mesh_of(params))(
        model, params, tokens, lengths, _key(rng), filters, max_new_tokens, eos_id, vocab_size
    )
    return [cut(row, eos_id) for row in parallel.fetch(new).tolist()]


def stream(
    model,
    params,
    prompts,
    max_new_tokens=64,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    rng=None,
    eos_id=None,
    vocab_size=None,
    chunk=8,
):
    """`sample`, giving tokens as they come: yields lists of up to `chunk` new tokens per prompt.

    The tokens are those of `sample` with the same key. Ends when every row has met eos_id.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    tokens, lengths = pad_left(prompts)
    filters = make_filters(temperature, top_k, top_p, min_p, repetition_penalty)
    chunks = -(-max_new_tokens // chunk)
    rows, on = len(prompts), functools.partial(compiled, mesh=parallel.mesh_of(params))
    params, model = on(decoding_params)(model, params, rows), untied(model, rows)
    state = on(start)(model, params, tokens, lengths, chunks * chunk, _key(rng), filters)
    ended = np.zeros(len(prompts), bool)
    for i in range(chunks):
        state, new = on(advance, "state")(model, params, state, filters, chunk, eos_id, vocab_size)
        rows = np.asarray(new)[:, : max_new_tokens - i * chunk].tolist()
        yield [cut(row, eos_id) for row in rows]  # a finished row repeats eos_id: nothing is left
        ended |= np.array([eos_id is not None and eos_id in row for row in rows])
        if ended.all():
            return


def check_prompts(config, prompts, max_new_tokens):
    """Raises: UserError for prompts that the model cannot continue by max_new_tokens."""
    if config.head != "lm":
        raise UserError(
            f"an {config.architecture} with model.head={config.head!r} writes no text; "
            "give a decoder or an encoder-decoder"
        )
    if not prompts:
        raise UserError("prompts is empty; give at least one")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty; give at least one token, such as the one a document starts with")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise UserError(f"prompt {i} holds token id {bad}, outside the model's vocabulary of {config.vocab_size}")
        if not config.reads_source and len(prompt) + max_new_tokens > config.context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that "
                f"exceeds the model's context of {config.context}; shorten one of them"
            )
        if max(len(prompt), max_new_tokens) > config.context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, max_new_tokens={max_new_tokens}: neither "
                f"may exceed the model's context of {config.context}"
            )


def make_filters(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """Filters as float32 and int32 scalars, so that a new value compiles nothing.

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


def pad_left(prompts, pad=0):
    """Ragged lists of ids to ([B, P] int32 in a length bucket, [B] int32 lengths)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.full((len(prompts), bucket(int(lengths.max()))), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return tokens, lengths


def cut(row, eos_id):
    """The tokens of a list before its first eos_id."""
    return row[: row.index(eos_id)] if eos_id is not None and eos_id in row else row


def _key(rng):
    return jax.random.PRNGKey(0) if rng is None else rng
