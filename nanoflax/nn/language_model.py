"""What every language model shares: embeddings in, the output head, the encoded source."""

import flax.linen as nn
import jax.numpy as jnp

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.nn.layers import Embedding, Linear, activate


class LanguageModel(nn.Module):
    """The embedding, the head and the decode interface: what a loss and a sampler know of a model.

    A model adds `hidden`, `__call__` and `prefill`.
    """

    config: ModelConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        self.embedding = Embedding(c.vocab_size, c.dim, self.compute_dtype, name="embed")
        if c.head in ("lm", "mlm"):
            if not c.tied:
                self.unembed = Linear(c.vocab_size, bias=False)
            if c.head_bias:
                self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (c.vocab_size,))
        if c.output_delay:
            self.delay = Linear(c.dim, bias=False, stddev=0.0)  # at first it changes nothing
        self.drop = nn.Dropout(c.dropout)

    def embed(self, tokens):
        """tokens: [B, T] int32 below V -> [B, T, D] in the compute dtype."""
        return parallel.split_embedded(self.embedding(tokens)) * self.config.embed_scale

    def output(self, x, segments=None, cache=None):
        """The last states x [B, T, D] as `head` reads them, and the cache or None.

        With config.output_delay = n, GELU(W h) of the state h n steps before is added to each: of
        its own document by segments [B, T], if given. The cache holds the last n states; what lies
        before the first is zeros, and adds nothing.
        """
        n, T = self.config.output_delay, x.shape[1]
        x *= self.config.logit_scale
        if not n:
            return x, cache
        line = (cache or empty_delay(self, len(x)))["delay"]
        padding = jnp.arange(T) < line["padding"][:, None]
        states = jnp.concatenate([line["states"], jnp.where(padding[..., None], 0, x)], 1)
        before = states[:, :T]
        if segments is not None:
            own = jnp.pad(segments, [(0, 0), (n, 0)], constant_values=-1)[:, :T] == segments
            before = jnp.where(own[..., None], before, 0)
        if cache is not None:
            cache = cache | {"delay": {"states": states[:, T:], "padding": jnp.maximum(line["padding"] - T, 0)}}
        return x + activate("gelu", self.delay(before)), cache

    def head(self, x):
        """The logits [B, T, V] float32 of `hidden`'s states x [B, T, D]."""
        c = self.config
        if c.tied:
            logits = jnp.einsum(
                "btd,vd->btv", x, self.embedding.embedding.astype(x.dtype), preferred_element_type=jnp.float32
            )
        else:
            logits = self.unembed(x).astype(jnp.float32)
        if c.head_bias:
            logits += self.logit_bias
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap) if c.logit_softcap else logits

    @property
    def compute_dtype(self):
        """The dtype of activations: `auto` is float32 on CPU, where bfloat16 gains nothing."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if parallel.current_platform() == "cpu" else "bfloat16")

    def decode(self, params, tokens, cache):
        """One step of generation: tokens [B, T] int32 extend the cache.

        Returns (logits [B, T, V] float32, cache). The whole of what samplers know of a model: and
        that a cache is a tree of scalars and of arrays [B, ...].
        """
        return self.apply({"params": params}, tokens, cache=cache)


def mean_pool(states, padding_mask):
    """A sentence's vector: the mean of its tokens' states (Reimers and Gurevych 2019).

    states: [B, T, D]; padding_mask: [B, T] bool. Returns [B, D] in the states' dtype.
    """
    weights = padding_mask[..., None].astype(states.dtype)
    return (states * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def empty_delay(model, batch, padding=None):
    """What a cache holds of the output delay before the first token: {} if there is none.
    padding: [B] int32, how many tokens of each row are not real ones."""
    c = model.config
    return (
        {}
        if not c.output_delay
        else {
            "delay": {
                "states": jnp.zeros((batch, c.output_delay, c.dim), model.compute_dtype),
                "padding": jnp.zeros(batch, jnp.int32) if padding is None else padding,
            }
        }
    )


class SourceModel(LanguageModel):
    """A language model of targets that follow from a source; adds `states`, `hidden`, `prefill`."""

    def __call__(self, targets_in, source=None, source_mask=None, cache=None, deterministic=True):
        """Logits of the next target at every position.

        targets_in: [B, T] int32, the targets shifted right; source: [B, S] int32; source_mask:
        [B, S] bool, True at real tokens, or None for all; cache: from `prefill`, in place of the
        source; deterministic: False turns dropout on.
        Returns (logits [B, T, V] float32, the new cache or None).
        """
        x, cache = self.hidden(targets_in, source, source_mask, cache, deterministic)
        return self.head(x), cache

    def vector(self, source, source_mask=None):
        """A sentence's embedding: what config.bottleneck makes of the encoder's states.

        source: [B, S] int32; source_mask: [B, S] bool, or None for all. Returns [B, D], of the LSTM
        [B, 2D], in the compute dtype.
        """
        return self.seen(self.states(source, source_mask), source_mask)[0][:, 0]

    def seen(self, states, mask):
        """What the decoder sees of an encoder's states [B, S, D] and their mask [B, S] bool or
        None: just these, or by config.bottleneck a source of length 1, [B, 1, D] and [B, 1]."""
        kind = self.config.bottleneck
        if kind == "none":
            return states, mask
        if mask is None:
            mask = jnp.ones(states.shape[:2], bool)
        vector = mean_pool(states, mask) if kind == "mean" else states[jnp.arange(len(states)), mask.argmax(1)]
        return vector[:, None], jnp.ones((len(states), 1), bool)
