"""Whole models: `build(config)` chooses a decoder, an encoder, an encoder-decoder or the LSTM."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from nanoflax.config import validate
from nanoflax.errors import UserError
from nanoflax.nn.attention import Attention, attention_weights, empty_cache
from nanoflax.nn.blocks import Stack, norm
from nanoflax.nn.language_model import LanguageModel, SourceModel, empty_delay
from nanoflax.nn.layers import Embedding, Linear, activate
from nanoflax.nn.losses import shift_right
from nanoflax.nn.lstm import AttentionLSTM


class Decoder(LanguageModel):
    """A decoder-only Transformer.

    `apply({"params": params}, tokens)` gives the logits of every position; `hidden` and `head` are
    its two halves, for a loss that never holds all logits; `prefill` and `decode` are the interface
    of the samplers.
    """

    def setup(self):
        super().setup()
        self.decoder = Stack(self.config, self.config.layers, remat=self.remat)

    def __call__(self, tokens, segments=None, cache=None, deterministic=True):
        """Logits of the next token at every position.

        tokens: [B, T] int32 below V; segments: [B, T] int32, the document of each token of a packed
        window (0 is padding), or None; cache: from `empty_cache`, whose slots the tokens extend;
        deterministic: False turns dropout on (pass rngs={"dropout": key}).
        Returns (logits [B, T, V] float32, the new cache or None).
        """
        x, cache = self.hidden(tokens, segments, cache, deterministic)
        return self.head(x), cache

    def hidden(self, tokens, segments=None, cache=None, deterministic=True):
        """The last states that `head` reads, [B, T, D] in the compute dtype, and the cache."""
        x, cache = self.decoder(self.embed(tokens), segments, cache, deterministic=deterministic)
        return self.output(x, segments, cache)

    def empty_cache(self, batch, length, start=None):
        """A cache of `length` slots. start: [B] int32, the padding before each row's first token."""
        return _empty_cache(self, self.config.layers, batch, length, start)

    def prefill(self, params, tokens, lengths, new_tokens):
        """Read prompts [B, P] int32, padded on the left, of lengths [B] int32, all but their last
        token. Returns (last tokens [B] int32, a cache with room for new_tokens more)."""
        B, P = tokens.shape
        virtual = len(params["decoder"].get("prompt", ()))
        cache = self.empty_cache(B, virtual + P + new_tokens - 1, P - lengths)
        if virtual:
            _, cache = self.decode(params, tokens[:, :0], cache)
        if P > 1:
            _, cache = self.decode(params, tokens[:, :-1], cache)
        return tokens[:, -1], cache


class DecoderClassifier(Decoder):
    """A decoder with a Linear over labels on the last real token's state, in place of the language
    model's head (Radford et al. 2018; Transformers' ...ForSequenceClassification)."""

    def setup(self):
        super().setup()
        self.labels = Linear(self.config.labels, bias=False)

    def __call__(self, tokens, padding_mask=None, deterministic=True):
        """tokens: [B, T] int32, padded on the right; padding_mask: [B, T] bool, True at real tokens,
        or None for all. Returns logits [B, labels] float32."""
        # What comes after a token cannot reach it, so attention needs no mask.
        x, _ = self.hidden(tokens, deterministic=deterministic)
        last = jnp.full(len(tokens), -1) if padding_mask is None else padding_mask.sum(-1) - 1
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.labels(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


class Encoder(LanguageModel):
    """A bidirectional Transformer with, by config.head, nothing on it (states), the masked language
    model's head, or a Linear over labels for each sequence (classify) or token (tag)."""

    def setup(self):
        super().setup()
        c = self.config
        self.encoder = Stack(c, c.layers, causal=False, remat=self.remat)
        if c.token_types:
            self.type_embed = Embedding(c.token_types, c.dim, self.compute_dtype)
        if c.has_pooler:
            self.pooler = Linear(c.dim)
        if c.head == "mlm":
            self.transform, self.norm_transform = Linear(c.dim), norm(c)
        elif c.head in ("classify", "tag"):
            self.labels = Linear(c.labels)

    def __call__(self, tokens, padding_mask=None, token_types=None, deterministic=True):
        """tokens: [B, T] int32; padding_mask: [B, T] bool, True at real tokens, or None for all;
        token_types: [B, T] int32 (BERT's segments), default 0; deterministic: False turns dropout
        on. Returns states [B, T, D], or the head's float32 logits: mlm [B, T, V], tag [B, T,
        labels], classify [B, labels].
        """
        x = self.hidden(tokens, padding_mask, token_types, deterministic)
        head = self.config.head
        if self.is_initializing() and self.config.pooler:
            self.pool(x)  # Linen makes parameters on use
        if head == "mlm":
            return self.head(x)
        if head == "none":
            return x
        if head == "classify":
            x = self.pool(x)
        return self.labels(self.drop(x, deterministic=deterministic)).astype(jnp.float32)

    def hidden(self, tokens, padding_mask=None, token_types=None, deterministic=True):
        """The last states that the head reads, [B, T, D] in the compute dtype."""
        c = self.config
        x = self.embed(tokens)
        if c.token_types:
            x += self.type_embed(jnp.zeros_like(tokens) if token_types is None else token_types)
        segments = None if padding_mask is None else padding_mask.astype(jnp.int32)
        x, _ = self.encoder(x, segments, deterministic=deterministic)
        if c.head == "mlm":
            x = self.norm_transform(activate(c.activation, self.transform(x)))
        return x * c.logit_scale

    def pool(self, x):
        """The first state through the pooler's Linear and activation: [B, T, D] -> [B, D]."""
        return activate(self.config.pooler_activation, self.pooler(x[:, 0]))


class EncoderDecoder(SourceModel):
    """An encoder, and a decoder that also attends to its states (Vaswani et al. 2017)."""

    def setup(self):
        super().setup()
        c = self.config
        self.encoder = Stack(c, c.layers, causal=False, remat=self.remat)
        self.decoder = Stack(c, c.cross_layers, cross=True, remat=self.remat)

    def hidden(self, targets_in, source=None, source_mask=None, cache=None, deterministic=True):
        """The last states that `head` reads, [B, T, D] in the compute dtype, and the cache."""
        states = None
        if cache is None:
            states, source_mask = self.seen(self.states(source, source_mask, deterministic), source_mask)
        x, cache = self.decoder(self.embed(targets_in), None, cache, states, source_mask, deterministic)
        return self.output(x, cache=cache)

    def states(self, source, source_mask=None, deterministic=True):
        """The encoder's states [B, S, D] of source [B, S] int32."""
        segments = None if source_mask is None else source_mask.astype(jnp.int32)
        return self.encoder(self.embed(source), segments, deterministic=deterministic)[0]

    def cross_cache(self, source, source_mask):
        """Every decoder layer's cross-attention keys and values of a source [B, S] int32, and their
        mask [B, S] bool ([B, 1] with a bottleneck)."""
        states, mask = self.seen(self.states(source, source_mask), source_mask)
        return self.decoder.cross_cache(states), mask

    def prefill(self, params, tokens, lengths, new_tokens):
        """Read sources [B, S] int32, padded on the left, of lengths [B] int32.
        Returns (config.start_id for each row, a cache with room for new_tokens)."""
        B, S = tokens.shape
        mask = jnp.arange(S)[None] >= S - lengths[:, None]
        cross, mask = self.apply({"params": params}, tokens, mask, method="cross_cache")
        cache = _empty_cache(self, self.config.cross_layers, B, new_tokens)
        cache["layers"] = [layer | more for layer, more in zip(cache["layers"], cross)]
        return jnp.full(B, self.config.start_id, jnp.int32), cache | {"source_mask": mask}


def alignment(model, params, source, targets):
    """What an encoder-decoder or LSTM looks at as it writes: weights [T, S] float32, rows sum to 1.

    source: [S] and targets: [T], lists of ids. Of a Transformer the mean over the heads of that
    layer which looks at the fewest tokens (the least entropy).
    """
    source, targets = jnp.asarray([source]), jnp.asarray([targets])
    inputs = shift_right(targets, model.config.start_id)
    if model.config.architecture == "lstm":
        return model.apply({"params": params}, inputs, source, method="alignment")[0]
    layers, c = [], model.config

    def look(cross, arguments, named, context):
        if isinstance(context.module, Attention) and context.method_name == "cross":
            x, keys, _, mask = arguments
            layers.append(
                attention_weights(context.module.queries(x), keys, mask, c.attention_scale, c.attention_softcap)[
                    0
                ].mean(0)
            )
        return cross(*arguments, **named)

    with nn.intercept_methods(look):
        model.apply({"params": params}, inputs, source)
    return min(layers, key=lambda w: float(jax.scipy.special.entr(w).sum()))


def _empty_cache(model, layers, batch, length, start=None):
    return {
        "layers": [empty_cache(model.config, batch, length, model.compute_dtype) for _ in range(layers)],
        "index": jnp.int32(0),
        "start": jnp.zeros(batch, jnp.int32) if start is None else start,
        **empty_delay(model, batch, start),
    }


def without_padding(config, params):
    """(ModelConfig, params) of a model without the rows of its config.vocab_padding."""
    if not config.vocab_padding:
        return config, params
    V, flat = config.vocab_size - config.vocab_padding, traverse_util.flatten_dict(params, sep="/")
    for path in VOCABULARY & flat.keys():
        flat[path] = flat[path][:V] if path == "embed/embedding" else flat[path][..., :V]
    return (dataclasses.replace(config, vocab_size=V, vocab_padding=0), traverse_util.unflatten_dict(flat, sep="/"))


def head_kernel(config, params):
    """The output projection [D, V] of a model's parameters."""
    return params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]


VOCABULARY = {"embed/embedding", "unembed/kernel", "logit_bias"}  # with a dimension V
MODELS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "lstm": AttentionLSTM}


def build(config, remat="none"):
    """The Linen module of a ModelConfig.

    Raises: UserError naming every bad field.
    """
    validate(config)
    if config.vocab_size < 1:
        raise UserError("model.vocab_size=0 must be set before a model is built")
    model = MODELS[config.architecture]
    if model is Decoder and config.head == "classify":
        model = DecoderClassifier
    return model(config, remat)


def flops_per_token(config, length=None):
    """Floating-point operations of training on one token, forward and backward.

    6 for each weight of a matrix product and 12 L H K T for attention, not halved for the causal
    mask (Chowdhery et al. 2022, appendix B: the numerator of MFU). Of an encoder-decoder or LSTM:
    on one source and one target token. length: T, or the context.
    """
    c, T = config, length or config.context
    head = 6 * c.dim * c.vocab_size if c.head in ("lm", "mlm") else 0
    head += 6 * c.dim**2 * (c.output_delay > 0)
    if c.architecture == "lstm":  # in units of D^2: encoder, decoder, and keys, query, output
        matrices = (24 * c.layers - 8) + (8 * c.layers + 4) + (6 if c.lstm_attention == "additive" else 5)
        return 6 * c.dim**2 * matrices + 18 * c.dim * T + head
    attention = c.dim * c.K * (2 * c.heads + 2 * c.G)
    mlp = c.dim * c.F * (3 if c.gated else 2)
    blocks = c.layers * (6 * (attention + mlp) + 12 * c.heads * c.K * T)
    blocks += c.cross_layers * (6 * (2 * attention + mlp) + 24 * c.heads * c.K * T)
    return blocks + head
