"""The settings of kinds of layers: rotary positions, mixture of experts, latent attention, recurrent layers; and which
settings of layers do not go together."""

import dataclasses
from typing import Any

from nanoflax.config.fields import field

LAYER_TYPES = ("full", "sliding", "chunked", "delta", "mamba2")
RECURRENT = ("delta", "mamba2")
# Kind of scaling -> the fields of RopeConfig that it reads.
ROPE_SCALINGS = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "context"),
    "llama3": ("factor", "low", "high", "context"),
    "yarn": ("factor", "context", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("factor", "context", "short_factors", "long_factors", "attention_factor"),
    "proportional": ("factor",),
}
ROUTER_SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021), and how they change for contexts longer than in training."""

    theta: float = field(10_000.0, "Base of the rotary frequencies.", above=0)
    local_theta: float | None = field(
        None, "The base, without scaling, in layers with a window (Gemma 3); none: as in other layers.", above=0
    )
    fraction: float = field(1.0, "Share of K that is rotated (GPT-NeoX, Phi-3).", within="(0, 1]")
    interleaved: bool = field(False, "A pair is two neighbours (GPT-J), not number i of each half (Llama).")
    reversed: bool = field(False, "The pairs turn the other way (nanochat).")
    nope_scale: float = field(
        0.0,
        "s: in model.nope_layers the queries at position p are multiplied by 1 + s ln(1 + floor((p + 1) / nope_floor)) "
        "(Nakanishi 2025; Llama 4).",
        at_least=0,
    )
    nope_floor: int = field(8192, "See nope_scale.", unit="tokens", at_least=1)
    scaling: str = field("none", "How the frequencies change for longer contexts.", choices=ROPE_SCALINGS)
    factor: float = field(1.0, "How many times longer the context is than in training.", above=0)
    context: int = field(8192, "The context in training.", unit="tokens", at_least=1)
    low: float = field(1.0, "llama3: frequencies with fewer turns in rope.context are divided.", above=0)
    high: float = field(4.0, "llama3: frequencies with more turns in rope.context do not change.", above=0)
    beta_fast: float = field(32.0, "yarn: frequencies with more turns in rope.context do not change.", above=0)
    beta_slow: float = field(1.0, "yarn: frequencies with fewer turns in rope.context are divided.", above=0)
    truncate: bool = field(True, "yarn: the bounds of the ramp are rounded to whole pairs.")
    attention_factor: float | None = field(
        None, "yarn, longrope: factor of cosines and sines; none: from rope.factor.", above=0
    )
    short_factors: tuple[float, ...] = field((), "longrope: divisors of the frequencies up to rope.context.")
    long_factors: tuple[float, ...] = field((), "longrope: divisors of the frequencies for longer texts.")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts (Shazeer et al. 2017): an MLP becomes E experts, of which each token uses k."""

    experts: int = field(0, "E, the experts of a layer; 0: one MLP.", at_least=0)
    active: int = field(2, "k, the experts that a token uses.", at_least=1)
    expert_dim: int | None = field(None, "F of an expert; none: model.mlp_dim.", at_least=1)
    expert_bias: bool | None = field(None, "Biases of the experts; none: as model.mlp_bias.")
    shared_dim: int = field(0, "F of an MLP beside the experts that every token uses; 0: none.", at_least=0)
    shared_gate: bool = field(False, "The MLP beside the experts has a gate, the sigmoid of a product (Qwen2-MoE).")
    dense_layers: tuple[int, ...] = field((), "Layers, from 0, with one MLP of model.mlp_dim.")
    scores: str = field("softmax", "How a token scores all E experts.", choices=ROUTER_SCORES)
    renormalise: bool = field(
        True,
        "The weights of a token's k experts are divided by their sum; of a softmax: a softmax over the k. With "
        "active=1 the weight is 1, and the router learns only from its losses.",
    )
    least_sum: float = field(1e-20, "moe.renormalise: the least number that weights are divided by.", above=0)
    scale: float = field(1.0, "Factor of the weights of a token's experts.", above=0)
    weigh_inputs: bool = field(False, "The weights multiply the inputs of the experts, not their outputs (Llama 4).")
    groups: int = field(1, "Groups of experts; a token uses only experts of top_groups of them.", at_least=1)
    top_groups: int = field(1, "The groups that a token uses, those of the highest score.", at_least=1)
    group_best: int = field(2, "The best scores of a group whose sum is its score (DeepSeek-V2: 1).", at_least=1)
    correction: bool = field(
        False,
        "A bias changes which experts are chosen, not their weights; training equals the loads by it (DeepSeek-V3).",
    )
    router_bias: bool = field(False, "A bias of the router's logits (gpt-oss).")
    stacked: bool = field(
        False, "In files of Transformers the experts of a layer are one tensor, gate and up together (since version 5)."
    )
    balance_loss: float = field(0.0, "Factor of the loss that keeps the experts' loads equal.", at_least=0)
    z_loss: float = field(0.0, "Factor of the mean square of the router's log-sum-exp (Zoph et al. 2022).", at_least=0)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): keys and values from one vector.

    A head's K numbers are K - rope_dim without and rope_dim with rotary positions.
    """

    rank: int = field(0, "Size of the vector of keys and values; 0: ordinary attention.", at_least=0)
    query_rank: int = field(0, "Size of the vector of queries; 0: queries directly from the state.", at_least=0)
    rope_dim: int = field(64, "Numbers of a key, equal in all heads, with rotary positions.", at_least=2)
    value_dim: int = field(128, "Size of a head's value.", at_least=1)


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Layers whose state has one size for any text: gated delta rule (Yang et al. 2024), Mamba-2 (Dao and Gu 2024).

    Each head has a state of key_dim x value_dim numbers.
    """

    heads: int = field(4, "Heads of values.", at_least=1)
    groups: int = field(4, "Heads of queries and keys (Mamba-2: groups of C and B); divides heads.", at_least=1)
    key_dim: int = field(64, "Size of a head's key (Mamba-2: the state size).", at_least=1)
    value_dim: int = field(64, "Size of a head's value.", at_least=1)
    conv: int = field(4, "Tokens that the convolution before the state reads.", at_least=1)
    conv_bias: bool = field(False, "The convolution has a bias.")
    bias: bool = field(False, "The Linears of the layer have biases.")
    chunk: int = field(64, "Tokens that are computed at once; it does not change the result.", at_least=1)
    min_step: float = field(0.0, "mamba2: least step.", at_least=0)
    max_step: float | None = field(None, "mamba2: largest step; none: no limit.", above=0)


def block_problems(m: Any) -> list[str]:
    """The conflicts in a ModelConfig of what all blocks have: attention, norms, positions, embeddings."""
    found = []
    for name, side in [("heads", m), *([("decoder_heads", m.decoder)] if m.decoder_heads else [])]:
        if m.head_dim is None and m.dim % side.heads:
            found.append(
                f"model.{name}={side.heads} does not divide model.dim={m.dim}; change one or set model.head_dim"
            )
        if side.heads % side.G:
            found.append(f"model.kv_heads={side.G} does not divide model.{name}={side.heads}")
    if (m.decoder_heads or m.decoder_mlp_dim) and not m.cross_layers:
        found.append(f"model.decoder_heads and model.decoder_mlp_dim are not for {m.architecture!r}")
    if not m.first_norm and m.norm_place != "pre":
        found.append(f"model.first_norm=false needs model.norm_place='pre', not {m.norm_place!r}")
    if m.positions == "rotary" and (m.rotary_dim % 2 or m.rotary_dim < 2):
        part = "" if m.rope.fraction == 1 else f" times model.rope.fraction={m.rope.fraction}"
        found.append(f"model.head_dim={m.K}{part} must be even for rotary positions")
    if m.positions.startswith("sinusoidal") and m.dim % 2:
        found.append(f"model.dim={m.dim} must be even for sinusoidal positions")
    if m.decoder_layers and not m.reads_source:
        found.append(f"model.decoder_layers={m.decoder_layers} is not for {m.architecture!r}; use model.layers")
    if m.projects_embeddings and (m.architecture not in ("decoder", "encoder") or m.output_delay):
        found.append(
            f"model.embed_dim={m.embed_dim} must equal model.dim={m.dim}, except in a decoder or encoder without "
            "output_delay"
        )
    if m.projects_embeddings and m.head == "mlm" and not m.mlm_transform:
        found.append(f"model.embed_dim={m.embed_dim} needs model.mlm_transform=True with model.head='mlm'")
    return found


def layer_problems(m: Any) -> list[str]:
    """The conflicts of attention, of rotary positions and of kinds of layers in a ModelConfig."""
    rope, moe, found = m.rope, m.moe, _option_problems(m)
    if rope.scaling == "llama3" and not rope.low < rope.high:
        found.append(f"model.rope.low={rope.low} must be less than model.rope.high={rope.high}")
    for name in ("short_factors", "long_factors") if rope.scaling == "longrope" else ():
        if len(factors := getattr(rope, name)) != m.rotary_dim // 2:
            found.append(f"model.rope.{name} has {len(factors)} numbers, but {m.rotary_dim // 2} pairs are rotated")
    if unknown := sorted({*m.layer_types} - {*LAYER_TYPES}):
        found.append(f"model.layer_types has {', '.join(unknown)}; known are {', '.join(LAYER_TYPES)}")
    elif not m.window and {"sliding", "chunked"} & {*m.layer_types}:
        found.append("model.layer_types has sliding or chunked, so model.window must be positive")
    elif m.window and m.layer_types and not {"sliding", "chunked"} & {*m.layer_types}:
        found.append(f"model.window={m.window} needs a layer of the kind sliding or chunked in model.layer_types")
    if {*RECURRENT} & {*m.layer_types} and m.architecture != "decoder":
        found.append(f"model.layer_types with delta or mamba2 is for decoders, not {m.architecture!r}")
    if m.mlp_dim == 0 and {*m.layer_types} != {"mamba2"}:
        found.append("model.mlp_dim=0 must be at least 1, except with model.layer_types=('mamba2',)")
    if m.mlp_dim == 0 and (m.parallel or moe.experts and not moe.expert_dim):
        wrong = "model.parallel=True" if m.parallel else "model.moe.experts without model.moe.expert_dim"
        found.append(f"model.mlp_dim=0 must be at least 1 with {wrong}")
    last = max(m.layers, m.cross_layers) - 1
    for name, numbers in (("nope_layers", m.nope_layers), ("moe.dense_layers", moe.dense_layers)):
        if outside := [i for i in numbers if not 0 <= i <= last]:
            found.append(f"model.{name} has {outside[0]}, but the layers are 0 to {last}")
    if m.nope_layers and m.positions != "rotary":
        found.append(f"model.nope_layers={m.nope_layers} needs model.positions='rotary', not {m.positions!r}")
    if m.positions == "relative":  # distances from `near` on share buckets, of which an encoder has half for each side
        near = {m.relative_buckets // n for n, has in ((2, m.is_causal), (4, m.architecture != "decoder")) if has}
        if 0 in near or m.relative_distance in near:
            found.append(
                f"model.relative_buckets={m.relative_buckets} must be at least 4, and model.relative_distance="
                f"{m.relative_distance} not a half or fourth of it"
            )
    if rope.scaling == "yarn" and rope.theta == 1 or rope.scaling == "longrope" and rope.context == 1:
        wrong = f"theta={rope.theta}" if rope.scaling == "yarn" else f"context={rope.context}"
        found.append(
            f"model.rope.{wrong} must not be 1 with model.rope.scaling={rope.scaling!r}, which divides by its log"
        )
    if m.rope.scaling == "dynamic" and m.positions == "rotary" and m.rotary_dim <= 2:
        found.append("model.rope.scaling='dynamic' needs more than one pair of rotary numbers")
    if m.latent.rank:
        found += _latent_problems(m)
    if {*RECURRENT} & {*m.layer_types} and m.recurrent.groups and m.recurrent.heads % m.recurrent.groups:
        found.append(f"model.recurrent.groups={m.recurrent.groups} does not divide heads={m.recurrent.heads}")
    if m.recurrent.max_step is not None and m.recurrent.min_step > m.recurrent.max_step:
        found.append(f"model.recurrent.min_step={m.recurrent.min_step} must be at most max_step={m.recurrent.max_step}")
    if not moe.experts:
        return found
    if not m.has_blocks:
        found.append(f"model.moe.experts={moe.experts} needs a Transformer, not {m.architecture!r}")
    if moe.active > moe.experts:
        found.append(f"model.moe.active={moe.active} must be at most model.moe.experts={moe.experts}")
    if moe.groups < 1 or moe.experts % moe.groups or moe.top_groups > moe.groups:
        found.append(
            f"model.moe.groups={moe.groups} must divide model.moe.experts={moe.experts}, and "
            f"model.moe.top_groups={moe.top_groups} be at most groups"
        )
    elif moe.active > moe.top_groups * (moe.experts // moe.groups):
        found.append(
            f"model.moe.active={moe.active} must be at most {moe.top_groups * (moe.experts // moe.groups)}, the "
            f"experts in model.moe.top_groups={moe.top_groups} of model.moe.groups={moe.groups}"
        )
    if moe.shared_gate and not moe.shared_dim:
        found.append("model.moe.shared_gate=True needs model.moe.shared_dim of at least 1, not 0")
    return found


def _option_problems(m):
    """The conflicts of what only some families have in attention, MLPs and norms."""
    found = []
    if m.swiglu_limit and (not m.gated or m.activation != "silu"):
        found.append(
            f"model.swiglu_limit={m.swiglu_limit} needs model.gated=True and model.activation='silu', not "
            f"{m.gated} and {m.activation!r}"
        )
    if m.attention_gate and (m.latent.rank or m.architecture != "decoder"):
        found.append("model.attention_gate=True is for decoders without latent attention")
    if m.qkv_clip and m.latent.rank:
        found.append(f"model.qkv_clip={m.qkv_clip} does not work with model.latent.rank={m.latent.rank}")
    if m.attention_sinks and (m.latent.rank or not m.has_blocks):
        what = f"model.latent.rank={m.latent.rank}" if m.has_blocks else f"model.architecture={m.architecture!r}"
        found.append(f"model.attention_sinks=True does not work with {what}")
    if m.parallel and m.norm_place != "pre":
        found.append(f"model.parallel needs model.norm_place='pre', not {m.norm_place!r}")
    if m.parallel and m.cross_layers:
        found.append("model.parallel=True is for a decoder or encoder: its blocks have no cross-attention")
    if m.shared_norm and not m.parallel:
        found.append("model.shared_norm needs model.parallel")
    if m.norm_unit_offset and not m.norm_scale:
        found.append("model.norm_unit_offset needs model.norm_scale")
    return found


def _latent_problems(m):
    """The conflicts of latent attention, which computes its own queries, keys and values."""
    found = []
    if not m.has_blocks or m.latent.rope_dim > m.K or m.latent.rope_dim % 2:
        found.append(
            f"model.latent.rank={m.latent.rank} needs a Transformer and an even model.latent.rope_dim, at most "
            f"head_dim={m.K}, not {m.latent.rope_dim}"
        )
    wrong = {"kv_heads": m.G != m.heads, "qk_norm": m.qk_norm != "none"}
    if m.rope.fraction != 1 and m.positions == "rotary":
        found.append(
            f"model.rope.fraction={m.rope.fraction} must be 1 with model.latent.rank={m.latent.rank}: "
            "model.latent.rope_dim numbers are rotated"
        )
    if m.nope_layers and m.rope.nope_scale:
        found.append(f"model.rope.nope_scale={m.rope.nope_scale} does not work with model.latent.rank={m.latent.rank}")
    wrong["attention_backend"] = m.attention_backend not in ("auto", "plain")
    for name in [name for name, is_wrong in wrong.items() if is_wrong]:
        found.append(f"model.{name}={getattr(m, name)!r} does not work with model.latent.rank={m.latent.rank}")
    return found
