"""The attention with which a model reads the tokens before the next one, computed only when it is asked for."""

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nanoflax import nn
from nanoflax.config import ModelConfig
from nanoflax.nn import Array, LanguageModel
from nanoflax.serve.requests import Attention, Request

if TYPE_CHECKING:
    from nanoflax.serve.programs import Programs

# Tokens that one call reads, by `reads_source`: of a target many, of other texts the last one and padding. (Products of
# two rows are calls of a library; XLA needs three times as long to compile those of one row.)
STEPS = {True: 16, False: 2}


class Layers(NamedTuple):
    """The layers whose attention can be shown, by their numbers and kinds. missing: why others, or all, cannot."""

    kinds: dict[int, str]
    heads: int
    missing: str = ""


def layers_of(config: ModelConfig) -> Layers:
    """The layers with attention to earlier tokens; of a model with a source, with attention to the source."""
    if config.head != "lm":
        return Layers({}, 0, "this model generates no text")
    if config.reads_source and config.bottleneck != "none":
        return Layers({}, 0, "the decoder reads one vector of its source, not the source's tokens")
    if config.reads_source:
        layers = config.cross_layers or 1  # the LSTM has one attention after its last layer
        return Layers(dict.fromkeys(range(layers), "full"), config.decoder.heads if config.cross_layers else 1)
    kinds = {i: config.layer_type(i) for i in range(config.layers)}
    kept = {i: kind for i, kind in kinds.items() if not config.is_recurrent(i)}
    without = ", ".join(sorted({*kinds.values()} - {*kept.values()}))
    missing = f"{'some' if kept else 'all'} layers ({without}) keep a state and have no attention" if without else ""
    return Layers(kept, config.heads if kept else 0, missing)


def factors(layers: Layers, layer: int | None, head: int | None) -> Float[np.ndarray, "L H"]:
    """`Request.attention` for the mean over the layers and heads; layer, head: only of this one."""
    found = np.zeros((len(layers.kinds), layers.heads), np.float32)
    rows = slice(None) if layer is None else [*layers.kinds].index(layer)
    found[rows, slice(None) if head is None else head] = 1
    return found / found.sum()


def step(
    model: LanguageModel,
    params: dict,
    cache: dict,
    tokens: Int[Array, " N"],
    count: Int[Array, ""],
    factors: Float[Array, "L H"],
) -> tuple[dict, Float[Array, " S"]]:
    """(the cache of one text after the tokens, the weights of number count - 1 of them for each slot of the cache).
    factors: see `Request.attention`. The tokens after this one are padding, which it does not see."""
    layers, (_, cache) = nn.attention_weights(model, params, tokens[None], cache=cache)
    return cache, jnp.einsum("lh,lhs->s", factors, jnp.concatenate(layers)[:, :, count - 1])


def read(programs: "Programs", cache: dict, request: Request) -> Generator[bool, None, Attention]:
    """The attention of a request, whose prompt is in the cache: of a decoder without its last token. Yields True after
    each piece of work, and False while it must wait for a function."""
    p, n = programs, len(request.prompt)
    now = size = programs.size_of(cache)
    if not p.reads_source and n >= now:
        size = p.size_for(n + 1)  # with padding
    while not p.compiler.ready(("attention", size), *[("copy", now, size)] * (size > now)):
        yield False
    cache = p.copy(cache, size) if size > now else cache
    tokens, at = [request.prompt[-1]], n - 1
    if p.reads_source:
        tokens, at = [p.model.config.start_id, *request.target], 0
    row, factors, most = None, request.attention, STEPS[p.reads_source]
    assert factors is not None
    for i in range(0, len(tokens), most):
        if i:
            yield True
        cache, row = p.attention(cache, tokens[i : i + most], at, factors)
    # A source is at the end of its slots, other texts at the beginning; before these are trained keys of an adapter.
    slots = np.asarray(row)[-size:]
    return Attention(slots[size - n :] if p.reads_source else slots[:n])
