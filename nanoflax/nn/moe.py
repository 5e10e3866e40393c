"""Mixture of experts (Shazeer et al. 2017): a router chooses k of a layer's E experts for each token.

No token is dropped. Tokens are sorted by expert into blocks of rows that have one expert each, so that the experts'
products are products of blocks.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig, MoEConfig
from nanoflax.kernels import Array, States, blocks_of, cast, grouped_matmul, move
from nanoflax.nn.layers import MLP, Linear, parameter


def route(
    logits: Float[Array, "*B E"], moe: MoEConfig, correction: Float[Array, " E"] | None = None
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"], Float[Array, "*B E"]]:
    """(the experts of each token, their weights, the scores of all experts as shares of 1), from float32 logits.

    Groups and correction: DeepSeek-V3 (DeepSeek-AI 2024, equations 12 to 16). Softmax scores with moe.renormalise
    are a softmax over the k chosen experts.
    """
    scores = jax.nn.softmax(logits) if moe.scores == "softmax" else jax.nn.sigmoid(logits)
    rank = scores if correction is None else scores + correction
    if moe.groups > 1:
        grouped = rank.reshape(*rank.shape[:-1], moe.groups, -1)
        best = jax.lax.top_k(grouped, min(moe.group_best, grouped.shape[-1]))[0].sum(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, moe.top_groups)[1], moe.groups).sum(-2)
        rank = jnp.where(kept[..., None] > 0, grouped, -jnp.inf).reshape(rank.shape)
    chosen = jax.lax.top_k(rank, moe.active)[1]
    weights = jnp.take_along_axis(scores, chosen, -1)
    if moe.renormalise:
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), moe.least_sum)  # all sigmoids may be 0
    return chosen, weights * moe.scale, scores / jnp.maximum(scores.sum(-1, keepdims=True), 1e-20)


def expert_product(x: Float[Array, "n b I"], p: Mapping[str, Any], experts: Int[Array, " n"]) -> Float[Array, "n b O"]:
    """The product of each block of rows with the kernel [E, I, O], among an expert Linear's parameters p, of its
    expert, and LoRA if p has lora_a [E, I, R] and lora_b [E, R, O]. experts: ascending, E for none."""
    y = grouped_matmul(x, cast(p["kernel"], x.dtype), experts)
    if "lora_a" in p:
        a, b, scale = (p[f"lora_{name}"].astype(x.dtype) for name in ("a", "b", "scale"))
        y += grouped_matmul(grouped_matmul(x, a, experts) * jax.lax.stop_gradient(scale), b, experts)
    return y


class ExpertLinear(nn.Module):
    """A Linear for each expert."""

    experts: int  # E
    features: int
    bias: bool = True
    stddev: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "n b I"], experts: Int[Array, " n"]) -> Float[Array, "n b O"]:
        parameter(self, "kernel", nn.initializers.normal(self.stddev), (self.experts, x.shape[-1], self.features))
        y = expert_product(x, self.variables["params"], experts)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.experts, self.features))
            y += jnp.asarray(bias, x.dtype)[experts][:, None]
        return y


class Router(Linear):
    """The logits of the experts, and the correction of their scores: 0 at first, None without."""

    correction: bool = False

    @nn.compact
    def __call__(self, x):
        correction = self.param("correction", nn.initializers.zeros, (self.features,)) if self.correction else None
        return super().__call__(x), correction


def _router_sums(logits, chosen, shares, correction, counted):
    """[5, E] float32, over counted tokens: choices and shares of each expert; E times logsumexp^2 of logits, and 1; the
    correction of each expert."""
    E = logits.shape[-1]
    real = jnp.ones(logits.shape[:2]) if counted is None else counted.astype(jnp.float32)
    of_token = jnp.stack([jax.nn.logsumexp(logits, -1) ** 2, jnp.ones_like(real)], -1)
    of_expert = jnp.stack([jax.nn.one_hot(chosen, E).sum(-2), shares], -2)
    x = jnp.concatenate([of_expert, jnp.broadcast_to(of_token[..., None], (*real.shape, 2, E))], -2)
    sums = jnp.tensordot(real, x, 2)
    return jnp.concatenate([sums, jnp.broadcast_to(0.0 if correction is None else correction, (1, E))])


def router_terms(moe: MoEConfig, collected: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(the losses of the routers times their factors, metrics) over all layers and counted tokens of a stack together;
    the losses of an encoder and a decoder are added, as in NLLB-MoE.

    collected: the values that `apply` returns with mutable=["router"]. The balance loss is E times the
    sum over experts of choices per token times mean share (Fedus et al. 2021, equation 4, as Transformers has it); the
    z-loss is the mean of logsumexp^2 (Zoph et al. 2022, equation 5). The correction of an expert falls while it has
    more than its part of a layer's tokens (Wang et al. 2024, algorithm 1, with Adam's steps).
    Metrics: both losses; expert_load, the largest share of a layer's choices that an expert has, times E (1:
    balanced); dropped, the share of choices that are not computed: always 0.
    """
    stacks = [jax.tree.leaves([x.get("router", {}).get(name) for x in collected]) for name in ("encoder", "decoder")]
    stacks = [jnp.concatenate([x.reshape(-1, 5, moe.experts) for x in leaves]) for leaves in stacks if leaves]
    chosen, shares, z, ones, _ = jnp.stack([layers.sum(0) for layers in stacks], 1)
    tokens = jnp.maximum(ones, 1)
    balance, z = moe.experts * jnp.sum(chosen / tokens * shares / tokens), jnp.mean((z / tokens).sum(0))
    chosen, *_, correction = jnp.concatenate(stacks).swapaxes(0, 1)
    load = moe.experts * jnp.max(chosen / jnp.maximum(chosen.sum(1, keepdims=True), 1))
    metrics = {"balance_loss": balance, "router_z_loss": z, "expert_load": load, "dropped": jnp.zeros(())}
    # The gradient of a correction is the excess load of its expert. It is small beside all others, so that clipping
    # ignores it; the step of Adam has the size of its learning rate all the same.
    excess = jax.lax.stop_gradient(chosen / jnp.maximum(chosen.mean(1, keepdims=True), 1) - 1)
    pull = 1e-5 * jnp.sum(correction * excess)
    loss = moe.balance_loss * balance + moe.z_loss * z + pull - jax.lax.stop_gradient(pull)
    return loss, jax.lax.stop_gradient(metrics)


class MoE(nn.Module):
    """E experts, each an MLP, of which each token uses k, and an MLP for all tokens. Settings: config.moe."""

    config: ModelConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x: States, counted: Bool[Array, "B T"] | None = None) -> States:
        """counted: False at tokens that the statistics of the router leave out."""
        c, m, D = self.config, self.config.moe, x.shape[-1]
        bias, rest = c.has_bias("mlp"), (self.out_stddev, c.swiglu)
        options = c.activation, c.gated, bias if m.expert_bias is None else m.expert_bias, *rest
        router = Router(m.experts, m.router_bias, correction=m.correction, name="router")
        logits, correction = router(x.astype(jnp.float32))
        chosen, weights, shares = parallel.map_tokens(lambda x, bias: route(x, m, bias), logits, correction)
        if self.is_mutable_collection("router") and not self.is_initializing():
            self.sow("router", "sums", _router_sums(logits, chosen, shares, correction, counted))

        def compute(x, chosen, weights, params):  # with all experts, or with those of a device of a mesh
            E, F, _ = params["down"]["kernel"].shape
            rows, places, experts = blocks_of(chosen.reshape(-1), E, chosen.size // m.active * min(m.active, E))
            h = jnp.repeat(x.reshape(-1, D), m.active, 0)
            if m.weigh_inputs:
                h, weights = h * weights.reshape(-1, 1).astype(h.dtype), jnp.ones_like(weights)
            h = move(h, rows, places).reshape(len(experts), -1, D)
            h: Any = MLP(F, *options, partial(ExpertLinear, E), parent=None).apply({"params": params}, h, experts)
            h = move(h.reshape(-1, D), places, rows).reshape(*chosen.shape, D)
            return jnp.einsum("...kd,...k->...d", h, weights.astype(h.dtype))

        if self.is_initializing():
            linear = partial(ExpertLinear, m.experts)
            MLP(m.expert_dim or c.F, *options, linear, name="experts")(x[:1], jnp.zeros(1, jnp.int32))
        params = cast(self.variables["params"]["experts"], x.dtype)
        y = parallel.map_experts(compute, x, chosen, weights, params)
        if m.shared_dim:
            shared = MLP(m.shared_dim, c.activation, c.gated, bias, *rest, name="shared")(x)
            y += jax.nn.sigmoid(Linear(1, False, name="shared_gate")(x)) * shared if m.shared_gate else shared
        return y
