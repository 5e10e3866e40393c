"""What a model is: one frozen dataclass for every architecture, and the published sizes."""

import dataclasses
from typing import NamedTuple

from nanoflax.config.checks import at_least, choice, from_dict
from nanoflax.errors import UserError


class Architecture(NamedTuple):
    """Facts of an architecture that other rooms need; `nn.build` has the models themselves."""

    heads: tuple[str, ...]  # the values of ModelConfig.head
    reads_source: bool = False  # the model writes a target from a source; a prompt is a source
    is_causal: bool = True  # a token of the output sees only the tokens before it
    has_blocks: bool = True  # the model is a Transformer


ARCHITECTURES = {
    "decoder": Architecture(("lm", "classify")),
    "encoder": Architecture(("none", "mlm", "classify", "tag"), is_causal=False),
    "encoder_decoder": Architecture(("lm",), reads_source=True),
    "lstm": Architecture(("lm",), reads_source=True, has_blocks=False),
}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "tanh")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACES = ("pre", "post", "sandwich", "after")
QK_NORMS = ("none", "head", "full")
POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves", "rotary", "relative", "none")
ROPE_SCALINGS = ("none", "linear", "llama3")
LSTM_ATTENTIONS = ("additive", "multiplicative")
LSTM_STARTS = ("encoder", "zeros")
BOTTLENECKS = ("none", "mean", "first")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTION_BACKENDS = ("auto", "plain", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of any architecture. Sizes in the dimension letters of the design; the published
    families differ in these values alone."""

    architecture: str = "decoder"
    vocab_size: int = 0  # V; 0 takes the tokenizer's
    # Of V, the last ids, which no token has: a mesh needs them. Ordinary logits in the loss, never
    # targets; a run is opened, and exported, without them.
    vocab_padding: int = 0
    # Of finetune: a workdir, Transformers directory, hub name or .gguf, which then decides every field
    # but head, labels, dropout, attention_backend and, where it is set, output_delay.
    init_from: str = ""
    context: int = 256  # the longest T (and S of a source) the model is made for
    layers: int = 4  # L; of an encoder-decoder, on the encoder's side
    decoder_layers: int | None = None  # None means L
    dim: int = 256  # D
    heads: int = 4  # H
    kv_heads: int | None = None  # G; None means H (multi-head), 1 is multi-query
    head_dim: int | None = None  # K; None means D / H
    mlp_dim: int | None = None  # F; None means 4 D, or 8/3 D rounded up to 32 when gated
    activation: str = "gelu_tanh"
    gated: bool = False  # down(act(gate(x)) * up(x)), Shazeer 2020, instead of down(act(up(x)))
    parallel: bool = False  # attention and MLP read the same x (GPT-J, GPT-NeoX)

    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_place: str = "pre"  # see blocks.Block
    norm_unit_offset: bool = False  # the scale is 1 + its parameter (Gemma)
    embed_norm: bool = False  # a norm right after the embeddings (BERT, BART)
    qk_norm: str = "none"  # RMSNorm of queries and keys: over each head's K, or full: over H K

    positions: str = "learned"
    position_offset: int = 0  # rows of the learned table before position 0 (OPT, RoBERTa, BART: 2)
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None  # in the layers with a window (Gemma 3); None: the same
    rope_fraction: float = 1.0  # of K that is rotated (GPT-NeoX)
    rope_scaling: str = "none"
    rope_factor: float = 1.0  # how many times longer than trained for
    rope_low: float = 1.0  # llama3: slower turns a context than this are all slowed by the factor
    rope_high: float = 4.0  # llama3: faster ones are kept
    rope_context: int = 8192  # llama3: the context trained for
    relative_buckets: int = 32  # T5
    relative_distance: int = 128  # T5: the last bucket holds all beyond

    window: int = 0  # a query sees its own and the window - 1 keys before it; 0 means all
    global_layers: tuple[int, ...] = ()  # these ignore the window
    attention_scale: float | None = None  # None means K^-1/2
    attention_softcap: float = 0.0  # cap tanh(score / cap) (Gemma 2); 0 means none

    bias: bool = True  # in every Linear and LayerNorm, unless one of these says otherwise
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None

    head: str = "lm"  # or a decoder's classify; an encoder's: none, mlm, classify or tag
    labels: int = 2  # of classify and tag
    pooler: bool = False  # a Linear and activation on the first state; an encoder's classify has it
    pooler_activation: str = "tanh"
    token_types: int = 0  # kinds of input segment (BERT: 2)
    tied: bool = True  # the output head is the embedding, transposed
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0  # of the states before the head (T5: D^-1/2)
    logit_softcap: float = 0.0
    start_id: int = 0  # the token before the first target of an encoder-decoder
    # All that the decoder sees of a source: the mean of the encoder's states, or the first of them.
    bottleneck: str = "none"
    output_delay: int = 0  # n: to each last state is added GELU(W h) of that n steps before; 0: none

    lstm_attention: str = "additive"
    lstm_start: str = "encoder"  # the decoder's first state: the encoder's last, or zeros

    dropout: float = 0.0
    dtype: str = "auto"  # of activations: float32 on CPU, bfloat16 elsewhere; parameters: float32
    # Of attention: plain, cudnn (GPU), splash (TPU); auto: the platform's, wherever it is exact.
    attention_backend: str = "auto"

    @property
    def _facts(self) -> Architecture:  # none of an unknown architecture, which validation reports
        return ARCHITECTURES.get(self.architecture, Architecture(()))

    @property
    def reads_source(self) -> bool:
        """Whether the model writes a target from a source (an encoder-decoder or LSTM)."""
        return self._facts.reads_source

    @property
    def is_causal(self) -> bool:
        """Whether a token of the output sees only the tokens before it (all but an encoder)."""
        return self._facts.is_causal

    @property
    def has_blocks(self) -> bool:
        """Whether the model is a Transformer, made of blocks."""
        return self._facts.has_blocks

    @property
    def cross_layers(self) -> int:
        """The number of blocks with cross-attention: those of an encoder-decoder's decoder, else 0."""
        if not (self.reads_source and self.has_blocks):
            return 0
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def has_pooler(self) -> bool:
        """Whether a Linear and an activation stand between the first state and the head."""
        return self.pooler or self.head == "classify" and not self.is_causal

    @property
    def G(self):
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def K(self):
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def F(self):
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim

    @property
    def rotary_dim(self):
        """How many of a head's K are rotated."""
        return int(self.K * self.rope_fraction)

    def has_bias(self, part):
        """Whether the Linears or norms of `part` (qkv, out, mlp, norm) have a bias."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    def is_local(self, layer):
        """Whether a layer sees only its window."""
        return self.window > 0 and layer not in self.global_layers


_GPT2 = ModelConfig(vocab_size=50257, context=1024, dropout=0.0)
_LLAMA = ModelConfig(norm="rmsnorm", activation="silu", gated=True, positions="rotary", bias=False, tied=False)


def _with(base, **changes):
    return dataclasses.replace(base, **changes)


PRESETS = {
    "nano-1m": _with(_LLAMA, layers=4, dim=128, heads=4, context=128, tied=True),
    "nano-5m": _with(_LLAMA, layers=4, dim=256, heads=4, context=256, tied=True),
    "nano-15m": _with(_LLAMA, layers=8, dim=384, heads=6, context=512, tied=True),
    "gpt2": _with(_GPT2, layers=12, dim=768, heads=12),
    "gpt2-medium": _with(_GPT2, layers=24, dim=1024, heads=16),
    "gpt2-large": _with(_GPT2, layers=36, dim=1280, heads=20),
    "gpt2-xl": _with(_GPT2, layers=48, dim=1600, heads=25),
    # The base model of Vaswani et al. 2017, table 3, to be trained from scratch.
    "transformer-base": ModelConfig(
        architecture="encoder_decoder", context=512, layers=6, dim=512, heads=8, mlp_dim=2048,
        activation="relu", norm_place="post", positions="sinusoidal", embed_scale=512**0.5,
        qkv_bias=False, out_bias=False, dropout=0.1),
    # Llama 3.2 1B (Meta, 2024), without its rotary scaling.
    "llama-1b": _with(_LLAMA, vocab_size=128256, context=8192, layers=16, dim=2048, heads=32,
                      kv_heads=8, head_dim=64, mlp_dim=8192, rope_theta=500_000.0, tied=True),
    # Llama 3 8B and 70B (Grattafiori et al. 2024, table 3).
    "llama-8b": _with(_LLAMA, vocab_size=128256, context=8192, layers=32, dim=4096, heads=32,
                      kv_heads=8, mlp_dim=14336, rope_theta=500_000.0),
    "llama-70b": _with(_LLAMA, vocab_size=128256, context=8192, layers=80, dim=8192, heads=64,
                       kv_heads=8, mlp_dim=28672, rope_theta=500_000.0),
    # T5 11B (Raffel et al. 2020, section 3.7), its vocabulary padded to 32128 as published.
    "t5-11b": ModelConfig(
        architecture="encoder_decoder", vocab_size=32128, context=512, layers=24, dim=1024,
        heads=128, head_dim=128, mlp_dim=65536, activation="relu", norm="rmsnorm", norm_eps=1e-6,
        positions="relative", bias=False, attention_scale=1.0, logit_scale=1024**-0.5),
}  # fmt: skip


def preset(name, **changes):
    """The ModelConfig of a published or shipped size, with some fields changed.

    Raises: UserError for an unknown name or field.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return from_dict(ModelConfig, dataclasses.asdict(PRESETS[name]) | changes, where="preset")


def problems(m):
    found = []
    for name, choices in [
        ("architecture", ARCHITECTURES),
        ("norm", NORMS),
        ("norm_place", NORM_PLACES),
        ("qk_norm", QK_NORMS),
        ("activation", ACTIVATIONS),
        ("pooler_activation", ACTIVATIONS),
        ("positions", POSITIONS),
        ("rope_scaling", ROPE_SCALINGS),
        ("head", m._facts.heads),
        ("lstm_attention", LSTM_ATTENTIONS),
        ("lstm_start", LSTM_STARTS),
        ("bottleneck", BOTTLENECKS),
        ("dtype", DTYPES),
        ("attention_backend", ATTENTION_BACKENDS),
    ]:
        choice(found, f"model.{name}", getattr(m, name), choices)
    optional = [name for name in ("decoder_layers", "kv_heads", "head_dim", "mlp_dim") if getattr(m, name) is not None]
    at_least(
        found,
        "model",
        m,
        1,
        "context",
        "layers",
        "dim",
        "heads",
        "labels",
        "rope_context",
        "relative_buckets",
        "relative_distance",
        *optional,
    )
    at_least(
        found,
        "model",
        m,
        0,
        "window",
        "attention_softcap",
        "logit_softcap",
        "token_types",
        "position_offset",
        "start_id",
        "output_delay",
    )
    if m.vocab_size < 0:
        found.append(f"model.vocab_size={m.vocab_size} must be positive, or 0 for the tokenizer's")
    if not 0 <= m.vocab_padding < max(m.vocab_size, 1):
        found.append(f"model.vocab_padding={m.vocab_padding} must be from 0 to below model.vocab_size={m.vocab_size}")
    if not 0 <= m.dropout < 1:
        found.append(f"model.dropout={m.dropout} must be in [0, 1)")
    if not 0 < m.rope_fraction <= 1:
        found.append(f"model.rope_fraction={m.rope_fraction} must be in (0, 1]")
    for name in (
        "norm_eps",
        "rope_theta",
        "rope_local_theta",
        "rope_factor",
        "rope_low",
        "rope_high",
        "attention_scale",
    ):
        value = getattr(m, name)
        if value is not None and not value > 0:  # NaN is not
            found.append(f"model.{name}={value} must be positive")
    if found:
        return found
    if m.head_dim is None and m.dim % m.heads:
        found.append(f"model.heads={m.heads} does not divide model.dim={m.dim}; change one or set model.head_dim")
    if m.heads % m.G:
        found.append(f"model.kv_heads={m.G} does not divide model.heads={m.heads}")
    if m.positions == "rotary" and (m.rotary_dim % 2 or m.rotary_dim < 2):
        part = "" if m.rope_fraction == 1 else f" times model.rope_fraction={m.rope_fraction}"
        found.append(f"model.head_dim={m.K}{part} must be even for rotary positions")
    if m.positions.startswith("sinusoidal") and m.dim % 2:
        found.append(f"model.dim={m.dim} must be even for sinusoidal positions")
    if m.parallel and m.norm_place != "pre":
        found.append(f"model.parallel needs model.norm_place='pre', not {m.norm_place!r}")
    if m.rope_scaling == "llama3" and not m.rope_low < m.rope_high:
        found.append(f"model.rope_low={m.rope_low} must be less than model.rope_high={m.rope_high}")
    if m.bottleneck != "none" and not m.reads_source:
        found.append(
            f"model.bottleneck={m.bottleneck!r} is for model.architecture='encoder_decoder' "
            f"or 'lstm', not {m.architecture!r}"
        )
    if not m.has_blocks and m.decoder_layers not in (None, m.layers):
        found.append(
            f"model.decoder_layers={m.decoder_layers} must equal model.layers={m.layers} "
            "in an lstm: each layer starts where the encoder's ended"
        )
    if m.output_delay and m.head != "lm":
        found.append(
            f"model.output_delay={m.output_delay} needs model.head='lm', not {m.head!r}: "
            "without an order of writing, no state is before another"
        )
    if m.vocab_size and m.start_id >= m.vocab_size - m.vocab_padding:
        found.append(f"model.start_id={m.start_id} must be below model.vocab_size={m.vocab_size - m.vocab_padding}")
    return found
