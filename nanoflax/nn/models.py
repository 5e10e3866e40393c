"""The models: `build(config)` returns a decoder, an encoder, an encoder-decoder or the LSTM."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Bool, Float, Int

from nanoflax.config import ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.kernels import Array, Logits, Quantized, Source, SourceMask, States, Tokens, activate
from nanoflax.nn.attention import LayerCache, attention_weights
from nanoflax.nn.blocks import Stack, empty_cache, norm
from nanoflax.nn.language_model import LanguageModel, SourceModel, empty_delay, mean_pool
from nanoflax.nn.layers import Embedding, Linear
from nanoflax.nn.lstm import AttentionLSTM
from nanoflax.nn.positions import check_context
from nanoflax.nn.targets import shift_right


class Decoder(LanguageModel):
    """A decoder-only Transformer.

    `apply({"params": params}, tokens)` returns the logits of every position: `head` of `hidden`. Losses
    call only `hidden`, because all logits need too much memory; samplers use `prefill` and `decode`.
    """

    def setup(self):
        super().setup()
        self.decoder = Stack(self.config, self.config.layers, remat=self.remat)

    def __call__(
        self, tokens: Tokens, segments: Tokens | None = None, cache: dict | None = None, deterministic: bool = True
    ) -> tuple[Logits, dict | None]:
        """(float32 logits of the next token at every position, the new cache).

        tokens: below V; segments: the document of each token of a packed window (0 is padding);
        cache: from `empty_cache`; the tokens are added to it; deterministic: False turns dropout on
        (pass rngs={"dropout": key}).
        """
        x, cache = self.hidden(tokens, segments, cache, deterministic)
        return self.head(x), cache

    def hidden(
        self,
        tokens: Tokens,
        segments: Tokens | None = None,
        cache: dict | None = None,
        deterministic: bool = True,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[States, dict | None]:
        """(the states that `head` reads, in the compute dtype; the new cache). counted: as in `Stack`."""
        x, cache = self.decoder(self.embed(tokens), segments, cache, None, None, deterministic, counted)
        return self.output(x, segments, cache)

    def empty_cache(self, batch: int, length: int, start: Int[Array, " B"] | None = None) -> dict:
        """A cache of `length` slots. start: the number of padding tokens before each row's first token."""
        if start is None:
            check_context(self.config, length)
        return _empty_cache(self, self.config.layers, batch, length, start)

    def prefill(
        self, params: dict, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], new_tokens: int
    ) -> tuple[Int[Array, " B"], dict]:
        """Read prompts that are padded on the left, except their last tokens.
        Returns (the last tokens, a cache with room for new_tokens)."""
        B, P = tokens.shape
        virtual = len(params["decoder"].get("prompt", ()))
        cache = self.empty_cache(B, virtual + P + new_tokens - 1, P - lengths)
        if virtual:
            _, cache = self.decode(params, tokens[:, :0], cache)
        if P > 1:
            _, cache = self.decode(params, tokens[:, :-1], cache)
        return tokens[:, -1], cache


class DecoderClassifier(Decoder):
    """A decoder that classifies a text from the state of its last real token (Radford et al. 2018;
    Transformers' ...ForSequenceClassification)."""

    def setup(self):
        super().setup()
        self.labels = Linear(self.config.labels, bias=False)

    def __call__(
        self, tokens: Tokens, padding_mask: Bool[Array, "B T"] | None = None, deterministic: bool = True
    ) -> Float[Array, "B labels"]:
        """float32 logits. tokens: padded on the right; padding_mask: True at real tokens, default all."""
        # No real token attends to the padding after it, so no mask is needed.
        x, _ = self.hidden(tokens, deterministic=deterministic, counted=padding_mask)
        last = jnp.full(len(tokens), -1) if padding_mask is None else padding_mask.sum(-1) - 1
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.labels(self.drop(x, deterministic=deterministic)).astype(jnp.float32)


class Encoder(LanguageModel):
    """A bidirectional Transformer. config.head: none, mlm (masked language model), a Linear over labels for
    each text (classify) or each token (tag), or one number for each token (detect: Clark et al. 2020, ELECTRA)."""

    def setup(self):
        super().setup()
        c = self.config
        width = c.embed_dim or c.dim
        self.encoder = Stack(c, c.layers, causal=False, remat=self.remat)
        if c.token_types:
            self.type_embed = Embedding(c.token_types, width, self.compute_dtype)
        if c.has_pooler:
            self.pooler = Linear(c.dim)
        if c.has_transform:
            self.transform, self.norm_transform = Linear(width if c.head == "mlm" else c.dim, c.transform_bias), norm(c)
        if c.head == "detect":
            self.transform, self.labels = Linear(c.dim), Linear(1)
        if c.head in ("classify", "tag"):
            self.labels = Linear(c.labels)

    def __call__(
        self,
        tokens: Tokens,
        padding_mask: Bool[Array, "B T"] | None = None,
        token_types: Tokens | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B ..."]:
        """The hidden states [B, T, D], or the head's float32 logits: mlm [B, T, V], tag [B, T,
        labels], classify [B, labels], detect [B, T].

        padding_mask: True at real tokens, default all; token_types: BERT's segments, default 0;
        deterministic: False turns dropout on.
        """
        x = self.hidden(tokens, padding_mask, token_types, deterministic)
        head = self.config.head
        if self.is_initializing() and self.config.pooler:
            self.pool(x)  # Linen creates parameters on first use
        if head == "mlm":
            return self.head(x)
        if head == "none":
            return x
        if head == "detect":
            return self.labels(activate(self.config.activation, self.transform(x)))[..., 0].astype(jnp.float32)
        if head == "classify":
            x = self.pool(x, padding_mask)
        return self.labels(self.drop(x, deterministic=deterministic)).astype(jnp.float32)

    def hidden(
        self,
        tokens: Tokens,
        padding_mask: Bool[Array, "B T"] | None = None,
        token_types: Tokens | None = None,
        deterministic: bool = True,
    ) -> States:
        """The states that the head reads, in the compute dtype."""
        c = self.config
        x = self.embed(tokens)
        if c.token_types:
            x += self.type_embed(jnp.zeros_like(tokens) if token_types is None else token_types)
        segments = None if padding_mask is None else padding_mask.astype(jnp.int32)
        x, _ = self.encoder(x, segments, deterministic=deterministic)
        return (self._transformed(x) if c.has_transform and c.head != "classify" else x) * c.logit_scale

    def pool(self, x: States, padding_mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B D"]:
        """The state of each text, config.pooling of its states, through the pooler or the transform."""
        c = self.config
        mask = jnp.ones(x.shape[:2], bool) if padding_mask is None else padding_mask
        pooled = lambda x: activate(c.pooler_activation, self.pooler(x)) if c.has_pooler else self._transformed(x)
        if c.pooling == "late":
            return mean_pool(pooled(x), mask)
        return pooled(mean_pool(x, mask) if c.pooling == "mean" else x[:, 0])

    def _transformed(self, x):
        activation = self.config.transform_activation or self.config.activation
        return self.norm_transform(activate(activation, self.transform(x)))


class EncoderDecoder(SourceModel):
    """An encoder, and a decoder that attends to the encoder's states (Vaswani et al. 2017)."""

    def setup(self):
        super().setup()
        c = self.config
        self.encoder = Stack(c, c.layers, causal=False, remat=self.remat)
        self.decoder = Stack(c.decoder, c.cross_layers, cross=True, remat=self.remat)

    def hidden(
        self,
        targets_in: Tokens,
        source: Source | None = None,
        source_mask: SourceMask | None = None,
        cache: dict | None = None,
        deterministic: bool = True,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[States, dict | None]:
        """(the states that `head` reads, in the compute dtype; the new cache). counted: of targets, as in `Stack`."""
        states = None
        if cache is None:
            states = self.encode(source, source_mask, deterministic)  # type: ignore  # without a cache it is given
            states, source_mask = self.through_bottleneck(states, source_mask)
        x, cache = self.decoder(self.embed(targets_in), None, cache, states, source_mask, deterministic, counted)
        return self.output(x, cache=cache)

    def encode(
        self, source: Source, source_mask: SourceMask | None = None, deterministic: bool = True
    ) -> Float[Array, "B S D"]:
        """The encoder's states."""
        segments = None if source_mask is None else source_mask.astype(jnp.int32)
        return self.encoder(self.embed(source), segments, deterministic=deterministic)[0]

    def cross_cache(
        self, source: Source, source_mask: SourceMask
    ) -> tuple[list[LayerCache], Bool[Array, "B _"] | None]:
        """(the cross-attention keys and values of every decoder layer, their mask)."""
        states, mask = self.through_bottleneck(self.encode(source, source_mask), source_mask)
        return self.decoder.cross_cache(states), mask

    def prefill(
        self, params: dict, tokens: Source, lengths: Int[Array, " B"], new_tokens: int
    ) -> tuple[Int[Array, " B"], dict]:
        """Read sources that are padded on the left.
        Returns (config.start_id of each row, a cache with room for new_tokens)."""
        B, S = tokens.shape
        mask = jnp.arange(S)[None] >= S - lengths[:, None]
        cross, mask = self.apply({"params": params}, tokens, mask, method="cross_cache")
        cache = _empty_cache(self, self.config.cross_layers, B, new_tokens)
        cache["layers"] = [layer | more for layer, more in zip(cache["layers"], cross, strict=True)]
        return jnp.full(B, self.config.start_id, jnp.int32), cache | {"source_mask": mask}


def alignment(model: LanguageModel, params: dict, source: Sequence[int], targets: Sequence[int]) -> Float[Array, "T S"]:
    """The float32 attention weights over a source as each target is predicted, averaged over heads, of the layer that
    attends to the fewest tokens: the one with the least entropy. Rows sum to 1, or less with attention sinks."""
    inputs = shift_right(jnp.asarray([targets]), model.config.start_id)
    layers, _ = attention_weights(model, params, inputs, jnp.asarray([source]))
    means = [weights[0].mean(0) for weights in layers]
    return min(means, key=lambda mean: float(jax.scipy.special.entr(mean).sum()))


def _empty_cache(model, layers, batch, length, start=None):
    c, dtypes = model.config.decoder, (model.compute_dtype, model.cache_dtype)
    cache = {"layers": [empty_cache(c, i, batch, length, *dtypes) for i in range(layers)], "index": jnp.int32(0)}
    first = jnp.zeros(batch, jnp.int32) if start is None else start
    return cache | {"start": first} | empty_delay(model, batch, start)


VOCABULARY = {"embed/embedding", "unembed/kernel", "logit_bias"}  # the parameters with a dimension V
MODELS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "lstm": AttentionLSTM}


def without_padding(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """A configuration and parameters without the rows of config.vocab_padding."""
    if not config.vocab_padding:
        return config, params
    V, flat = config.vocab_size - config.vocab_padding, dict(traverse_util.flatten_dict(params, sep="/"))
    for path in VOCABULARY & flat.keys():
        if isinstance(x := flat[path], Quantized):  # its first axis is V in both
            flat[path] = jax.tree.map(lambda leaf: leaf[:V], x)
        else:
            flat[path] = x[:V] if path == "embed/embedding" else x[..., :V]
    return dataclasses.replace(config, vocab_size=V, vocab_padding=0), traverse_util.unflatten_dict(flat, sep="/")


def head_kernel(config: ModelConfig, params: dict) -> Float[Array, "D V"]:
    """The kernel of the output head, from a model's parameters; dequantised."""
    kernel = params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]
    return kernel.astype(jnp.float32) if isinstance(kernel, Quantized) else kernel


def build(config: ModelConfig, remat: str = "none", cache_dtype: str = "") -> LanguageModel:
    """The Linen module of a configuration. cache_dtype: of keys and values in a cache, such as int8; "": as computed.
    Raises: UserError naming every bad field."""
    validate(config)
    if cache_dtype and (not config.has_blocks or config.latent.rank):
        raise UserError(f"cache_dtype={cache_dtype!r} needs attention with keys and values, which this model has not")
    if config.vocab_size < 1:
        raise UserError("model.vocab_size=0 must be set before a model is built")
    model = MODELS[config.architecture]
    if model is Decoder and config.head == "classify":
        model = DecoderClassifier
    return model(config, remat, cache_dtype)
