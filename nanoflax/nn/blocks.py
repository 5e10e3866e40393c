"""A Transformer block, the stack of blocks that is the body of every Transformer, and what all
language models share: the embedding, the head and the decode interface."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.nn import masking, positions
from nanoflax.nn.attention import Attention, AttentionInputs
from nanoflax.nn.kernels import MaskSpec
from nanoflax.nn.layers import MLP, Embedding, Norm, bottleneck

REMAT_POLICIES = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def norm(config, name=None):
    """The Norm that a configuration asks for."""
    c = config
    return Norm(c.norm, c.norm_eps, c.has_bias("norm"), c.norm_unit_offset, name=name)


class Block(nn.Module):
    """Self-attention, attention to a source if `cross`, and an MLP: each a residual with its norm.

    The norm's place: pre, x + f(norm(x)) (Radford et al. 2019); post, norm(x + f(x)) (Vaswani et
    al. 2017); after, x + norm(f(x)) (OLMo 2); sandwich, x + norm(f(norm(x))) (Gemma 2).
    """

    config: ModelConfig
    causal: bool = True
    cross: bool = False

    def setup(self):
        c = self.config
        out_stddev = 0.02 / (2 * c.layers) ** 0.5  # GPT-2: keeps the residual's variance near 1
        self.attention = Attention(c, out_stddev, self.causal)
        if self.cross:
            self.cross_attention = Attention(c, out_stddev)
        self.mlp = MLP(c.F, c.activation, c.gated, c.has_bias("mlp"), out_stddev)
        self.drop = nn.Dropout(c.dropout)
        for name in ("attention", "cross", "mlp") if self.cross else ("attention", "mlp"):
            setattr(self, f"norm_{name}", norm(c))
            if c.norm_place == "sandwich":
                setattr(self, f"norm_{name}_out", norm(c))

    def __call__(self, x, view, cache=None, deterministic=True):
        """x: [B, T, D]; view: a View; cache: this layer's, or None. Returns ([B, T, D], cache)."""
        x = parallel.split_batch(x)
        h, cache = self.attention(self._before("attention", x), view, cache)
        if self.config.parallel:
            h = self._adapt("attention", h)
            h += self._adapt("mlp", self.mlp(self._before("mlp", x)))
            return x + self.drop(h, deterministic=deterministic), cache
        x = self._after("attention", x, h, deterministic)
        if self.cross:
            keys, values = (
                self.cross_keys_values(view.source) if cache is None else (cache["cross_key"], cache["cross_value"])
            )
            h = self.cross_attention.cross(
                self._before("cross", x), keys, values, view.source_mask, cached=cache is not None
            )
            x = self._after("cross", x, h, deterministic)
        return self._after("mlp", x, self.mlp(self._before("mlp", x)), deterministic), cache

    def cross_keys_values(self, source):
        """What cross-attention reads of a source [B, S, D]: keys and values, each [B, G, S, K]."""
        return self.cross_attention.keys_values(source)

    def _before(self, name, x):
        normed = self.config.norm_place in ("pre", "sandwich")
        return getattr(self, f"norm_{name}")(x) if normed else x

    def _adapt(self, name, h):
        """A sublayer's output through the bottleneck adapter that the parameters hold for it."""
        if not self.has_variable("params", f"adapter_{name}"):
            return h
        return bottleneck(h, self.get_variable("params", f"adapter_{name}"), self.config.activation)

    def _after(self, name, x, h, deterministic):
        place = self.config.norm_place
        h = self.drop(self._adapt(name, h), deterministic=deterministic)
        if place == "post":
            return getattr(self, f"norm_{name}")(x + h)
        if place == "after":
            h = getattr(self, f"norm_{name}")(h)
        elif place == "sandwich":
            h = getattr(self, f"norm_{name}_out")(h)
        return x + h


class Stack(nn.Module):
    """Positions, blocks and the last norm: the body of an encoder or a decoder.

    The blocks run one by one, or if the parameters hold them stacked (see `stacking`) as one, in a
    scan: the same numbers, but for dropout's keys.
    """

    config: ModelConfig
    layers: int
    causal: bool = True
    cross: bool = False
    remat: str = "none"

    def setup(self):
        c = self.config
        if c.positions == "learned":
            self.position_embed = Embedding(c.context + c.position_offset, c.dim)
        elif c.positions == "relative":
            self.relative_bias = Embedding(c.relative_buckets, c.heads)
        if c.embed_norm:
            self.embed_norm = norm(c)
        block = Block
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], static_argnums=(4,))
        self.blocks = [block(c, self.causal, self.cross, name=f"block_{i}") for i in range(self.layers)]
        if c.norm_place != "post":
            self.norm = norm(c)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, x, segments=None, cache=None, source=None, source_mask=None, deterministic=True):
        """x: [B, T, D] embeddings; segments: [B, T] int32 or None: tokens see their own segment
        alone (0 may be padding), but of an encoder all those that are not 0; cache: whose slots the
        tokens extend, or None; source: [B, S, D], an encoder's states, and source_mask: [B, S]
        bool, for cross-attention.
        Returns ([B, T, D], the new cache or None).

        Prompt tuning (Lester et al. 2021): P vectors that the parameters hold stand before position
        0 and are seen by all. A call without tokens (T = 0) reads them into the cache's first slots.
        """
        c = self.config
        P, prompted = 0, False
        if self.has_variable("params", "prompt"):
            prompt = self.get_variable("params", "prompt").astype(x.dtype)
            P, prompted = len(prompt), cache is None or x.shape[1] == 0
            if prompted:
                x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], 1)
        T = x.shape[1]
        if cache is None:
            slots = keys = place = jnp.arange(T, dtype=jnp.int32)[None] - P
            mask, index, layers = None, None, [None] * self.layers
        else:
            index, start, layers = cache["index"], cache["start"], cache["layers"]
            slots = index + jnp.arange(T, dtype=jnp.int32)[None] - P
            keys = jnp.arange(layers[0]["key"].shape[2], dtype=jnp.int32)[None] - P
            place = jnp.maximum(slots - start[:, None], jnp.minimum(slots, 0) if P else 0)
            source_mask = cache.get("source_mask")
        everyones, facts = masking.padding(keys < 0) if P else False, None
        if cache is not None:
            real = masking.padding(keys >= start[:, None])
            mask = masking.causal(slots, keys) & (real | everyones)
        elif segments is not None:
            place = positions.restarting(segments)
            if P:
                place = jnp.concatenate([jnp.broadcast_to(slots[:, :P], (len(x), P)), place], 1)
                segments = jnp.pad(segments, [(0, 0), (P, 0)], constant_values=1)
            mask = masking.segments(segments, segments) | everyones if self.causal else masking.padding(segments > 0)
        if cache is None and not P:
            facts = MaskSpec(segments) if self.causal or segments is None else MaskSpec(valid=segments > 0)
        view = AttentionInputs(
            mask,
            facts,
            index=index,
            source=source,
            source_mask=None if source_mask is None else masking.padding(source_mask),
        )
        if c.positions == "learned":
            row = jnp.maximum(place, 0) if P else place
            table = parallel.replicate(self.position_embed.embedding)
            x += table[row + c.position_offset].astype(x.dtype)
        elif c.positions.startswith("sinusoidal"):
            halves = c.positions == "sinusoidal_halves"
            x += positions.sinusoidal(place, c.dim, halves).astype(x.dtype)
        elif c.positions == "relative":
            view = view._replace(bias=self._relative_bias(slots[0], keys[0]))
        if c.embed_norm:
            x = self.embed_norm(x)
        x = self.drop(x, deterministic=deterministic)
        local = [c.is_local(i) for i in range(self.layers)]
        views = {kind: self._view(view, kind, slots, keys, place, everyones) for kind in sorted(set(local))}
        if self.has_variable("params", "blocks"):
            x, new = self._scan(x, views, local, layers, deterministic)
        else:
            new = []
            for block, kind, layer in zip(self.blocks, local, layers):
                x, layer = block(x, views[kind], layer, deterministic)
                new.append(layer)
        if cache is not None:
            cache = cache | {"layers": new, "index": index + T}
        x = x[:, P:] if prompted else x
        return (x if c.norm_place == "post" else self.norm(x)), cache

    def cross_cache(self, source):
        """The cross-attention keys and values of every layer for a source [B, S, D]: computed once,
        to lie in the cache. Returns a list of {cross_key, cross_value: [B, G, S, K]}."""
        if self.has_variable("params", "blocks"):
            block = Block(self.config, self.causal, self.cross, parent=None)
            stacked = jax.lax.map(
                lambda params: block.apply({"params": params}, source, method="cross_keys_values"), self._stacked()
            )
            found = _layers(stacked, self.layers)
        else:
            found = [block.cross_keys_values(source) for block in self.blocks]
        return [dict(zip(("cross_key", "cross_value"), pair)) for pair in found]

    def _scan(self, x, views, local, caches, deterministic):
        """x: [B, T, D]; views: by kind of layer; local, caches: of each layer.
        Returns ([B, T, D], the new caches)."""
        block = Block(self.config, self.causal, self.cross, parent=None)
        rng = self.make_rng("dropout") if self.config.dropout and not deterministic else None

        def body(x, layer):
            i, kind, params, cache = layer
            rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, i)}

            def run(view):
                return lambda: block.apply({"params": params}, x, view, cache, deterministic, rngs=rngs)

            return jax.lax.switch(kind, [run(view) for view in views.values()])

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        kinds = jnp.array([list(views).index(kind) for kind in local])
        cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
        x, cache = jax.lax.scan(body, x, (jnp.arange(self.layers), kinds, self._stacked(), cache))
        return x, _layers(cache, self.layers)

    def _stacked(self):
        return self.get_variable("params", "blocks")

    def _relative_bias(self, slots, keys):
        c = self.config
        buckets = positions.relative_buckets(
            keys[None] - slots[:, None], c.relative_buckets, c.relative_distance, self.causal
        )
        return self.relative_bias(buckets).astype(jnp.float32).transpose(2, 0, 1)[None]

    def _view(self, view, local, slots, keys, place, everyones):
        c = self.config
        if c.positions == "rotary":
            rates = positions.rotary_rates(c, local)
            view = view._replace(angles=positions.rotary_angles(place, rates))
        if local:
            window = masking.window(slots, keys, c.window) | everyones
            view = view._replace(mask=window if view.mask is None else view.mask & window)
            if view.facts is not None:
                view = view._replace(facts=dataclasses.replace(view.facts, window=c.window))
        return view


def _layers(tree, count):
    """The trees of each layer, of a tree of leaves [L, ...]."""
    return [jax.tree.map(lambda x: x[i], tree) for i in range(count)]
