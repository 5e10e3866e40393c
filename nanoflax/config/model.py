"""The settings of a model: one frozen dataclass for all architectures."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from nanoflax.config.fields import field
from nanoflax.config.generation import GenerationDefaults
from nanoflax.config.layers import (
    LAYER_TYPES,
    RECURRENT,
    LatentConfig,
    MoEConfig,
    RecurrentConfig,
    RopeConfig,
    block_problems,
    layer_problems,
)


class Architecture(NamedTuple):
    """Properties of an architecture that other rooms need; `nn.build` makes the models."""

    heads: tuple[str, ...]  # the allowed values of ModelConfig.head
    reads_source: bool = False  # the model generates a target from a source; a prompt is a source
    is_causal: bool = True  # an output token sees only the tokens before it
    has_blocks: bool = True  # the model is a Transformer


ARCHITECTURES = {
    "decoder": Architecture(("lm", "classify")),
    "encoder": Architecture(("none", "mlm", "classify", "tag", "detect"), is_causal=False),
    "encoder_decoder": Architecture(("lm",), reads_source=True),
    "lstm": Architecture(("lm",), reads_source=True, has_blocks=False),
}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu2", "tanh")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACES = ("pre", "post", "sandwich", "after")
QK_NORMS = ("none", "head", "full", "each_head", "layer", "rotated", "rotated_scale")
POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves", "sinusoidal_fairseq", "rotary", "relative", "none")
LSTM_ATTENTIONS = ("additive", "multiplicative")
LSTM_STARTS = ("encoder", "zeros")
BOTTLENECKS = ("none", "mean", "first")
POOLINGS = ("first", "mean", "late")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTION_BACKENDS = ("auto", "plain", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The settings of a model of any architecture or published family."""

    section: ClassVar[str] = "model"
    architecture: str = field("decoder", "Kind of model; lstm: the recurrent encoder-decoder.", choices=ARCHITECTURES)
    vocab_size: int = field(0, "V, the vocabulary; 0: the tokenizer's.", unit="tokens")
    vocab_padding: int = field(0, "Unused ids at the end of V, so that the mesh divides V.", unit="tokens")
    init_from: str = field(
        "",
        "Model to start from: a workdir, Transformers directory, hub name or .gguf file. This model decides all other "
        "fields of model except head, the classes, dropout, attention_backend and a nonzero output_delay.",
    )
    context: int = field(256, "Largest T, and largest S of a source.", unit="tokens", at_least=1)
    layers: int = field(4, "L, the number of blocks; for an encoder-decoder of its encoder.", at_least=1)
    decoder_layers: int | None = field(None, "Blocks of an encoder-decoder's decoder; none: L.", at_least=1)
    decoder_heads: int | None = field(None, "Query heads of an encoder-decoder's decoder; none: H.", at_least=1)
    decoder_mlp_dim: int | None = field(None, "F of an encoder-decoder's decoder; none: as the encoder.", at_least=1)
    dim: int = field(256, "D, the width of the model.", at_least=1)
    heads: int = field(4, "H, the query heads.", at_least=1)
    kv_heads: int | None = field(None, "G, the key and value heads; none: H, 1: multi-query attention.", at_least=1)
    head_dim: int | None = field(None, "K, the size of a head; none: D / H.", at_least=1)
    mlp_dim: int | None = field(
        None, "F; none: 4 D, or if gated 8/3 D rounded up to a multiple of 32; 0: no MLP.", at_least=0
    )
    activation: str = field("gelu_tanh", "Activation of the MLP.", choices=ACTIVATIONS)
    gated: bool = field(False, "The MLP is down(act(gate(x)) * up(x)) (Shazeer 2020), not down(act(up(x))).")
    swiglu_limit: float = field(
        0.0,
        "c: a gated MLP is down((clip(up(x), -c, c) + 1) g sigmoid(alpha g)) with g = min(gate(x), c) (gpt-oss); 0: as "
        "model.gated says.",
        at_least=0,
    )
    swiglu_alpha: float = field(1.702, "alpha of model.swiglu_limit.")
    parallel: bool = field(False, "Attention and MLP read the same input (GPT-J, GPT-NeoX).")
    shared_norm: bool = field(False, "Attention and MLP in parallel read the same norm of it (Cohere, GPT-J).")
    residual_scale: float = field(1.0, "Factor of what attention and MLP add to a state (Granite).")

    norm: str = field("layernorm", "Normalisation.", choices=NORMS)
    norm_eps: float = field(1e-5, "Added to the variance in a norm.", above=0)
    norm_place: str = field("pre", "Where the norms of a block are: see nn.blocks.Block.", choices=NORM_PLACES)
    norm_scale: bool = field(True, "A norm has a scale.")
    first_norm: bool = field(True, "The first block has a norm before its attention (ModernBERT: none).")
    norm_unit_offset: bool = field(False, "A norm's scale is 1 + its parameter (Gemma).")
    embed_norm: bool = field(False, "A norm directly after the embeddings (BERT, BART).")
    qk_norm: str = field(
        "none",
        "RMSNorm of queries and keys, over a head's K or all H K; rotated: of a head, after rotary positions, without "
        "scale (Llama 4), only where there are some; rotated_scale: the same with a scale (HunYuan); each_head: "
        "LayerNorm with a scale for each head; layer: LayerNorm with a scale and bias for all heads (Phi).",
        choices=QK_NORMS,
    )

    positions: str = field("learned", "How positions are encoded.", choices=POSITIONS)
    position_offset: int = field(
        0, "The number of position 0, in the learned table or in the sines (OPT, RoBERTa, BART: 2).", at_least=0
    )
    rope: RopeConfig = field(RopeConfig(), "Rotary positions.")
    nope_layers: tuple[int, ...] = field((), "Layers, from 0, without rotary positions (SmolLM3, Llama 4).")
    relative_buckets: int = field(32, "Buckets of relative positions (T5).", at_least=1)
    relative_distance: int = field(128, "Distance where the last bucket begins (T5).", unit="tokens", at_least=1)

    window: int = field(
        0,
        "Keys that a query sees in a sliding layer: its own position and window - 1 before, in an encoder also after; "
        "in a chunked layer the length of the parts of a text that attend to themselves.",
        at_least=0,
    )
    layer_types: tuple[str, ...] = field(
        (), f"Kinds of layers, from the first, repeated: {', '.join(LAYER_TYPES)}; none: full, with a window sliding."
    )
    attention_scale: float | None = field(None, "Factor of the attention scores; none: K^-1/2.", above=0)
    scale_by_layer: bool = field(
        False, "The attention scores of layer i, from 0, are also divided by i + 1 (GPT-2 of Stanford CRFM)."
    )
    attention_softcap: float = field(0.0, "c: scores become c tanh(score / c) (Gemma 2); 0: unchanged.", at_least=0)
    qkv_clip: float | None = field(
        None, "c: queries, keys and values are clipped to -c .. c, after model.qk_norm (OLMoE); none: not.", above=0
    )
    attention_gate: bool = field(False, "Attention's output times the sigmoid of a Linear of its input (Qwen3-Next).")
    attention_sinks: bool = field(
        False, "A trained score of each head for no key, in the softmax (Xiao et al. 2023; gpt-oss)."
    )

    moe: MoEConfig = field(MoEConfig(), "Mixture of experts.")
    latent: LatentConfig = field(LatentConfig(), "Multi-head latent attention.")
    recurrent: RecurrentConfig = field(RecurrentConfig(), "Layers of the kinds delta and mamba2.")

    bias: bool = field(True, "Biases in every Linear and LayerNorm; qkv_bias to norm_bias may override it.")
    qkv_bias: bool | None = field(None, "Biases of query, key and value; none: the value of bias.")
    out_bias: bool | None = field(None, "Bias of the attention's output; none: the value of bias.")
    mlp_bias: bool | None = field(None, "Biases of the MLP; none: the value of bias.")
    norm_bias: bool | None = field(None, "Biases of LayerNorm; none: the value of bias.")

    head: str = field("lm", "Output: lm or classify for a decoder; none, mlm, classify, tag or detect for an encoder.")
    labels: int = field(2, "Classes of the heads classify and tag.", at_least=1)
    class_names: tuple[str, ...] = field((), "Names of the classes, in the order of the head's outputs.")
    multi_label: bool = field(False, "classify: a text may have several classes, or none.")
    mlm_transform: bool = field(True, "mlm: a Linear, the activation and a norm before the output layer (BERT).")
    label_transform: bool = field(
        False, "classify, tag: a Linear, an activation and a norm before the Linear over classes (ModernBERT)."
    )
    transform_activation: str | None = field(
        None, "The activation of mlm_transform and label_transform; none: model.activation.", choices=ACTIVATIONS
    )
    transform_bias: bool = field(True, "The Linear of mlm_transform and label_transform has a bias.")
    pooling: str = field(
        "first",
        "The state of a text in an encoder with classify; late: the mean of what the pooler makes of each state.",
        choices=POOLINGS,
    )
    pooler: bool = field(
        False, "A Linear and an activation on the state of a text; always with classify without label_transform."
    )
    pooler_activation: str = field("tanh", "Activation of the pooler.", choices=ACTIVATIONS)
    token_types: int = field(0, "Kinds of input segment (BERT: 2).", at_least=0)
    tied: bool = field(True, "The output head is the transposed embedding.")
    head_bias: bool = field(False, "A bias of the logits.")
    embed_dim: int | None = field(
        None, "Width of the embeddings and of the states before the head (OPT-350M); none: D.", at_least=1
    )
    embed_scale: float = field(1.0, "Factor of the embeddings.")
    logit_scale: float = field(1.0, "Factor of the states before the head (T5: D^-1/2).")
    logit_softcap: float = field(0.0, "c: logits become c tanh(logit / c); 0: unchanged.", at_least=0)
    start_id: int = field(0, "Token before the first target of an encoder-decoder.", at_least=0)
    bottleneck: str = field("none", "The decoder sees only the mean or first state of a source.", choices=BOTTLENECKS)
    output_delay: int = field(0, "n: add GELU(W h) of the final state n steps before; 0: none.", at_least=0)

    lstm_attention: str = field("additive", "Attention of an lstm.", choices=LSTM_ATTENTIONS)
    lstm_start: str = field("encoder", "First state of the decoder: the encoder's last or zeros.", choices=LSTM_STARTS)

    dropout: float = field(0.0, "Share of activations that are set to 0 in training.", within="[0, 1)")
    dtype: str = field("auto", "Dtype of activations; auto: float32 on CPU, bfloat16 elsewhere.", choices=DTYPES)
    attention_backend: str = field(
        "auto", "Kernel; auto: cudnn on GPU and splash on TPU if exact, else plain.", choices=ATTENTION_BACKENDS
    )
    generation: GenerationDefaults = field(GenerationDefaults(), "How the model generates text by default.")

    @property
    def _properties(self) -> Architecture:  # `validate` reports an unknown architecture
        return ARCHITECTURES.get(self.architecture, Architecture(()))

    @property
    def reads_source(self) -> bool:
        """Whether the model generates a target from a source (an encoder-decoder or LSTM)."""
        return self._properties.reads_source

    @property
    def is_causal(self) -> bool:
        """Whether an output token sees only the tokens before it (in all architectures except the encoder)."""
        return self._properties.is_causal

    @property
    def has_blocks(self) -> bool:
        """Whether the model is a Transformer, made of blocks."""
        return self._properties.has_blocks

    @property
    def cross_layers(self) -> int:
        """The number of blocks with cross-attention: the decoder blocks of an encoder-decoder, else 0."""
        if not (self.reads_source and self.has_blocks):
            return 0
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def max_length(self) -> int:
        """The largest T or S that the model can compute: the context, but relative positions (T5) and models of only
        recurrent layers (Mamba-2) have no limit."""
        unlimited = self.positions == "relative" or all(map(self.is_recurrent, range(self.layers)))
        return 2**31 - 1 if unlimited else self.context

    @property
    def length_turns(self) -> bool:
        """Whether the rotary angles of all tokens depend on the length of the text."""
        return self.positions == "rotary" and self.rope.scaling in ("longrope", "dynamic")

    def padding_limit(self, length: int) -> int:
        """The largest length to which texts of this length may be padded: longer ones may have other rotary angles."""
        if not self.length_turns:
            return self.max_length
        return self.rope.context if length <= self.rope.context else length

    @property
    def decoder(self) -> "ModelConfig":
        """The settings of the blocks of an encoder-decoder's decoder."""
        heads, F = self.decoder_heads or self.heads, self.decoder_mlp_dim or self.mlp_dim
        return dataclasses.replace(self, heads=heads, mlp_dim=F)

    @property
    def has_pooler(self) -> bool:
        """Whether there is a Linear and an activation between the state of a text and the head."""
        return self.pooler or self.head == "classify" and not (self.is_causal or self.label_transform)

    @property
    def has_transform(self) -> bool:
        """Whether there is a Linear, an activation and a norm between an encoder's states and its head."""
        return self.mlm_transform if self.head == "mlm" else self.label_transform and self.head in ("classify", "tag")

    @property
    def is_regression(self) -> bool:
        """Whether the head gives one number for a text, so that there is no class to choose."""
        return self.head == "classify" and self.labels == 1 and not self.multi_label

    @property
    def G(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def K(self) -> int:
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def F(self) -> int:
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim

    @property
    def swiglu(self) -> tuple[float, float]:
        """The limit and alpha of gated MLPs, as in `nn.layers.gated`."""
        return self.swiglu_limit, self.swiglu_alpha

    @property
    def projects_embeddings(self) -> bool:
        """Whether there is a Linear between the embeddings and the first block, in a decoder also after the last."""
        return self.embed_dim not in (None, self.dim)

    @property
    def rotary_dim(self) -> int:
        """How many of the K dimensions of a head have rotary angles."""
        if self.latent.rank or self.rope.scaling == "proportional":  # where the other angles are 0
            return self.latent.rope_dim if self.latent.rank else self.K
        return int(self.K * self.rope.fraction)

    def has_bias(self, part: str) -> bool:
        """Whether the Linears or norms of `part` (qkv, out, mlp, norm) have a bias."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    def in_layer(self, layer: int) -> "ModelConfig":
        """The settings of the attention of a layer."""
        if not self.scale_by_layer:
            return self
        scale = (self.attention_scale or self.K**-0.5) / (layer + 1)
        return dataclasses.replace(self, attention_scale=scale)

    def layer_type(self, layer: int) -> str:
        """The kind of a layer: one of LAYER_TYPES."""
        if not self.layer_types:
            return "sliding" if self.window else "full"
        return self.layer_types[layer % len(self.layer_types)]

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only its window or its part of the text."""
        return self.layer_type(layer) in ("sliding", "chunked")

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a state in place of attention."""
        return self.layer_type(layer) in RECURRENT

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has rotary positions."""
        return self.positions == "rotary" and layer not in self.nope_layers and not self.is_recurrent(layer)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        return self.moe.experts > 0 and layer not in self.moe.dense_layers

    @property
    def layer_groups(self) -> tuple[tuple[int, int], ...]:
        """The groups (first layer, distance to the next) of layers with equal parameters, for train.scan_layers: a
        period, after the layers that do not repeat. Of an encoder-decoder, those of the deeper stack."""
        L = max(self.layers, self.cross_layers)
        recurrent = [self.layer_type(i) if self.is_recurrent(i) else "" for i in range(L)]
        kinds = [
            (x, self.is_sparse(i), i > 0 or self.first_norm, i * self.scale_by_layer) for i, x in enumerate(recurrent)
        ]
        start, period = min(
            (
                (n, p)
                for n in range(L)
                for p in range(1, L - n + 1)
                if (L - n) % p == 0 and kinds[n:-p] == kinds[n + p :]
            ),
            key=lambda found: (sum(found), found),
        )
        return tuple((start + i, period) for i in range(period))

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a configuration that an older version of nanoflax wrote, as this version has them."""
        values = dict(values)
        rope = {name.removeprefix("rope_"): values.pop(name) for name in [*values] if name.startswith("rope_")}
        if rope:
            values["rope"] = rope | values.get("rope", {})
        layers = values.pop("global_layers", ())
        if layers and values.get("window"):
            L = max(values.get("layers", 4), values.get("decoder_layers") or 0)
            values["layer_types"] = ["full" if i in layers else "sliding" for i in range(L)]
        return values

    def problems(self) -> list[str]:
        """The conflicts between fields; the value of each field is in its range."""
        m, found = self, []
        if m.head not in (heads := m._properties.heads):
            found.append(f"model.head={m.head!r} is not one of {', '.join(heads)}")
        if m.vocab_size < 0:
            found.append(f"model.vocab_size={m.vocab_size} must be positive, or 0 for the tokenizer's")
        if not 0 <= m.vocab_padding < max(m.vocab_size, 1):
            found.append(
                f"model.vocab_padding={m.vocab_padding} must be from 0 to below model.vocab_size={m.vocab_size}"
            )
        found += block_problems(m) + layer_problems(m)
        if m.class_names and len(m.class_names) != m.labels and m.vocab_size:  # finetune sets both
            found.append(f"model.class_names has {len(m.class_names)} names for model.labels={m.labels} classes")
        if twice := [name for name in dict.fromkeys(m.class_names) if m.class_names.count(name) > 1]:
            found.append(f"model.class_names has {', '.join(twice)} twice")
        if m.bottleneck != "none" and not m.reads_source:
            found.append(
                f"model.bottleneck={m.bottleneck!r} is for model.architecture='encoder_decoder' "
                f"or 'lstm', not {m.architecture!r}"
            )
        if not m.has_blocks and m.decoder_layers not in (None, m.layers):
            found.append(
                f"model.decoder_layers={m.decoder_layers} must equal model.layers={m.layers} "
                "in an lstm: a decoder layer starts from the last state of the encoder layer"
            )
        if m.output_delay and m.head != "lm":
            found.append(
                f"model.output_delay={m.output_delay} needs model.head='lm', not {m.head!r}: "
                "the delay is for models that generate token by token"
            )
        if m.vocab_size > 0 and m.start_id >= m.vocab_size - m.vocab_padding:
            found.append(f"model.start_id={m.start_id} must be below model.vocab_size={m.vocab_size - m.vocab_padding}")
        g = m.generation
        for i in {g.forced_bos_token_id, g.decoder_start_token_id, *g.forced_eos_token_id} - {None}:
            if m.vocab_size and i >= m.vocab_size:
                found.append(f"model.generation has the token id {i}, but model.vocab_size={m.vocab_size}")
        return found
