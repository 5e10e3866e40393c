"""The common parts of all language models: the embedding, the output head, the encoded source."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import (
    Array,
    Logits,
    Quantized,
    Source,
    SourceMask,
    States,
    Tokens,
    activate,
    mask_padding,
    quantized_matmul,
)
from nanoflax.nn.layers import Embedding, Linear


class LanguageModel(nn.Module):
    """The embedding, the head and the decode interface. A subclass adds `hidden`, `__call__` and `prefill`.

    Losses and samplers use only these.
    """

    config: ModelConfig
    remat: str = "none"
    cache_dtype: str = ""  # of keys and values in a cache; int8: with a scale for each vector; "": compute_dtype

    def setup(self):
        c = self.config
        width = c.embed_dim or c.dim
        self.embedding = Embedding(c.vocab_size, width, self.compute_dtype, name="embed")
        if c.projects_embeddings and c.is_causal:  # else the Linear is in the encoder's Stack
            self.project_in, self.project_out = Linear(c.dim, bias=False), Linear(width, bias=False)
        if c.head in ("lm", "mlm"):
            if not c.tied:
                self.unembed = Linear(c.vocab_size, bias=False, padding=c.vocab_padding)
            if c.head_bias:
                self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (c.vocab_size,))
        if c.output_delay:
            self.delay = Linear(c.dim, bias=False, stddev=0.0)  # starts as 0, so that it changes nothing at first
        self.drop = nn.Dropout(c.dropout)

    def embed(self, tokens: Tokens) -> States:
        """The embeddings of tokens below V, in the compute dtype."""
        x = parallel.split_embedded(self.embedding(tokens)) * self.config.embed_scale
        return self.project_in(x) if hasattr(self, "project_in") else x

    def output(
        self, x: States, segments: Tokens | None = None, cache: dict | None = None
    ) -> tuple[Float[Array, "B T _"], dict | None]:
        """The states that `head` reads, from the last hidden states x, and the new cache.

        With config.output_delay = n, GELU(W h) is added to each state; h is the state n steps before, or
        0 if this is in another segment or before the first token. The cache holds the last n states.
        """
        n, T = self.config.output_delay, x.shape[1]
        x = (self.project_out(x) if hasattr(self, "project_out") else x) * self.config.logit_scale
        if not n:
            return x, cache
        delay = (cache or empty_delay(self, len(x)))["delay"]
        padding = jnp.arange(T) < delay["padding"][:, None]
        states = jnp.concatenate([delay["states"], jnp.where(padding[..., None], 0, x)], 1)
        before = states[:, :T]
        if segments is not None:
            same = jnp.pad(segments, [(0, 0), (n, 0)], constant_values=-1)[:, :T] == segments
            before = jnp.where(same[..., None], before, 0)
        if cache is not None:
            cache = cache | {"delay": {"states": states[:, T:], "padding": jnp.maximum(delay["padding"] - T, 0)}}
        return x + activate("gelu", self.delay(before)), cache

    def head(self, x: States) -> Logits:
        """The float32 logits of the states that `hidden` returns; -inf for the ids of config.vocab_padding."""
        c = self.config
        if c.tied:
            table = self.embedding.embedding
            if isinstance(table, Quantized):
                logits = quantized_matmul(x, table.T).astype(jnp.float32)
            else:
                logits = jnp.einsum("btd,vd->btv", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        else:
            logits = self.unembed(x).astype(jnp.float32)
        if c.head_bias:
            logits += self.logit_bias
        if c.logit_softcap:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return mask_padding(logits, c.vocab_padding)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations: `auto` is float32 on CPU, where bfloat16 is not faster, else bfloat16."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if parallel.current_platform() == "cpu" else "bfloat16")

    def decode(self, params: dict, tokens: Tokens, cache: dict) -> tuple[Logits, dict]:
        """One step of generation: (float32 logits, the cache extended by the tokens).

        For samplers a cache is any tree of scalars and arrays [B, ...].
        """
        return self.apply({"params": params}, tokens, cache=cache)  # type: ignore  # Linen's apply has no type


def mean_pool(states: Float[Array, "B S D"], padding_mask: SourceMask) -> Float[Array, "B D"]:
    """A vector of each text: the mean of its tokens' states (Reimers and Gurevych 2019)."""
    weights = padding_mask[..., None].astype(states.dtype)
    return (states * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def empty_delay(model: LanguageModel, batch: int, padding: Int[Array, " B"] | None = None) -> dict:
    """The cache's entry for config.output_delay before the first token; {} without a delay.
    padding: the number of padding tokens before each row's first token."""
    c = model.config
    if not c.output_delay:
        return {}
    states = jnp.zeros((batch, c.output_delay, c.dim), model.compute_dtype)
    return {"delay": {"states": states, "padding": jnp.zeros(batch, jnp.int32) if padding is None else padding}}


class SourceModel(LanguageModel):
    """A language model of targets given a source. A subclass adds `encode`, `hidden` and `prefill`."""

    def __call__(
        self,
        targets_in: Tokens,
        source: Source | None = None,
        source_mask: SourceMask | None = None,
        cache: dict | None = None,
        deterministic: bool = True,
    ) -> tuple[Logits, dict | None]:
        """(float32 logits of the next target at every position, the new cache).

        targets_in: the targets shifted right; source_mask: True at real tokens, default all;
        cache: from `prefill`, instead of a source; deterministic: False turns dropout on.
        """
        x, cache = self.hidden(targets_in, source, source_mask, cache, deterministic)
        return self.head(x), cache

    def vector(self, source: Source, source_mask: SourceMask | None = None) -> Float[Array, "B D"]:
        """The embedding of a text: config.bottleneck of the encoder's states (2D numbers for the LSTM)."""
        return self.through_bottleneck(self.encode(source, source_mask), source_mask)[0][:, 0]

    def through_bottleneck(
        self, states: Float[Array, "B S D"], mask: SourceMask | None
    ) -> tuple[Float[Array, "B _ D"], Bool[Array, "B _"] | None]:
        """The states that the decoder attends to, and their mask: all encoder states, or one state per text
        if there is a config.bottleneck."""
        kind = self.config.bottleneck
        if kind == "none":
            return states, mask
        if mask is None:
            mask = jnp.ones(states.shape[:2], bool)
        vector = mean_pool(states, mask) if kind == "mean" else states[jnp.arange(len(states)), mask.argmax(1)]
        return vector[:, None], jnp.ones((len(states), 1), bool)
