"""A block, and the stack of blocks that is the body of every model except the LSTM."""

import dataclasses
import operator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import Array, Keys, MaskSpec, SourceMask, States, Tokens, empty_key_values
from nanoflax.nn import masking, positions
from nanoflax.nn.attention import Attention, AttentionInputs, LayerCache
from nanoflax.nn.latent import LatentAttention, empty_latent_cache
from nanoflax.nn.layers import MLP, Embedding, Linear, Norm, bottleneck
from nanoflax.nn.moe import MoE
from nanoflax.nn.recurrent import RECURRENT_LAYERS, empty_recurrent_cache

REMAT_POLICIES = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def norm(config: ModelConfig) -> Norm:
    """The normalisation layer of a configuration."""
    return Norm(config.norm, config.norm_eps, config.has_bias("norm"), config.norm_unit_offset, config.norm_scale)


def empty_cache(config: ModelConfig, layer: int, batch: int, length: int, dtype: DTypeLike, keys: str) -> LayerCache:
    """The cache of a layer before the first token, with room for `length` tokens. keys: dtype of keys and values."""
    if config.is_recurrent(layer):
        return empty_recurrent_cache(config, batch, dtype)
    if config.latent.rank:
        return empty_latent_cache(config, batch, length, dtype)
    return empty_key_values((batch, config.G, length, config.K), jnp.dtype(keys or dtype))


class Block(nn.Module):
    """Self-attention or a recurrent layer, cross-attention if `cross`, and an MLP or experts if the layer has one:
    each with a residual connection and a norm. layer: its number, which decides the kinds.

    norm_place: pre, x + f(norm(x)) (Radford et al. 2019); post, norm(x + f(x)) (Vaswani et al. 2017);
    after, x + norm(f(x)) (OLMo 2); sandwich, x + norm(f(norm(x))) (Gemma 2).
    """

    config: ModelConfig
    causal: bool = True
    cross: bool = False
    layer: int = 0

    def setup(self):
        c = self.config
        out_stddev = 0.02 / (2 * c.layers) ** 0.5  # GPT-2: the sum of all 2 L outputs does not grow with L
        if c.is_recurrent(self.layer):
            self.recurrent = RECURRENT_LAYERS[c.layer_type(self.layer)](c, out_stddev)
        else:
            kind = LatentAttention if c.latent.rank else Attention
            self.attention = kind(c.in_layer(self.layer), out_stddev, self.causal)
        if self.cross:
            self.cross_attention = Attention(c, out_stddev)
        if c.is_sparse(self.layer):
            self.mlp = MoE(c, out_stddev)
        elif c.F:
            self.mlp = MLP(c.F, c.activation, c.gated, c.has_bias("mlp"), out_stddev, c.swiglu)
        self.drop = nn.Dropout(c.dropout)
        has_norm = {"attention": self.layer > 0 or c.first_norm, "cross": self.cross}
        has_norm["mlp"] = self.has_mlp and not c.shared_norm
        for name in [name for name, wanted in has_norm.items() if wanted]:
            setattr(self, f"norm_{name}", norm(c))
            if c.norm_place == "sandwich":
                setattr(self, f"norm_{name}_out", norm(c))

    def __call__(
        self, x: States, inputs: AttentionInputs, cache: LayerCache | None = None, deterministic: bool = True
    ) -> tuple[States, LayerCache | None]:
        """cache: this layer's. Returns (the output, the new cache)."""
        x = parallel.split_batch(x)
        mixer = self.recurrent if self.config.is_recurrent(self.layer) else self.attention
        before = self._before("attention", x)
        h, cache = mixer(before, inputs, cache)
        if self.config.parallel:
            h = self._adapt("attention", h)
            h += self._adapt("mlp", self._mlp(before if self.config.shared_norm else self._before("mlp", x), inputs))
            return x + self.drop(h, deterministic=deterministic) * self.config.residual_scale, cache
        x = self._after("attention", x, h, deterministic)
        if self.cross:
            if cache is None:
                keys, values = self.cross_keys_values(inputs.source)
            else:
                keys, values = cache["cross_key"], cache["cross_value"]
            before, cached = self._before("cross", x), cache is not None
            h = self.cross_attention.cross(before, keys, values, inputs.source_mask, cached=cached)
            x = self._after("cross", x, h, deterministic)
        if self.has_mlp:
            x = self._after("mlp", x, self._mlp(self._before("mlp", x), inputs), deterministic)
        return x, cache

    @property
    def has_mlp(self) -> bool:
        return self.config.F > 0 or self.config.is_sparse(self.layer)

    def cross_keys_values(self, source: Float[Array, "B S D"]) -> tuple[Keys, Keys]:
        """The keys and values by which cross-attention reads a source."""
        return self.cross_attention.keys_values(source)

    def _mlp(self, x, inputs):
        return self.mlp(x, inputs.counted) if self.config.is_sparse(self.layer) else self.mlp(x)

    def _before(self, name, x):
        normed = self.config.norm_place in ("pre", "sandwich") and hasattr(self, f"norm_{name}")
        return getattr(self, f"norm_{name}")(x) if normed else x

    def _adapt(self, name, h):
        """The output of a sublayer, after its bottleneck adapter if the parameters have one."""
        if not self.has_variable("params", f"adapter_{name}"):
            return h
        return bottleneck(h, self.get_variable("params", f"adapter_{name}"), self.config.activation)

    def _after(self, name, x, h, deterministic):
        place = self.config.norm_place
        h = self.drop(self._adapt(name, h), deterministic=deterministic)
        if place == "after":
            h = getattr(self, f"norm_{name}")(h)
        elif place == "sandwich":
            h = getattr(self, f"norm_{name}_out")(h)
        x = x + h * self.config.residual_scale
        return getattr(self, f"norm_{name}")(x) if place == "post" else x


class Places(NamedTuple):
    """The positions of the tokens of a call. The P vectors of a prompt have positions -P .. -1."""

    queries: Int[Array, "#B T"]  # the slot of each token, minus P
    keys: Int[Array, "1 S"]  # the slot of each key, minus P
    positions: Int[Array, "#B T"]  # of each token in its document, for position embeddings
    key_positions: Int[Array, "#B S"]  # the same of each key
    prompt_keys: Bool[Array, "1 1 1 S"] | bool  # True at the keys of the prompt, which every query attends to
    length: Int[Array, ""] | None = None  # of the longest text, or that the cache has room for; None: of the positions


class Stack(nn.Module):
    """Positions, blocks and the last norm: the body of an encoder or a decoder.

    The blocks run one by one. If the parameters are stacked (`parallel.stack`), a scan over layers runs
    them; it computes the same numbers, except that dropout has other keys.
    """

    config: ModelConfig
    layers: int
    causal: bool = True
    cross: bool = False
    remat: str = "none"

    def setup(self):
        c = self.config
        width = c.dim if self.causal else c.embed_dim or c.dim
        if c.positions == "learned":
            self.position_embed = Embedding(c.context + c.position_offset, width)
        elif c.positions == "relative":
            self.relative_bias = Embedding(c.relative_buckets, c.heads)
        if c.embed_norm:
            self.embed_norm = norm(c)
        if width != c.dim:
            self.project_in = Linear(c.dim)
        block = Block
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], static_argnums=(4,))
        self.blocks = [block(c, self.causal, self.cross, i, name=f"block_{i}") for i in range(self.layers)]
        if c.norm_place != "post":
            self.norm = norm(c)
        self.drop = nn.Dropout(c.dropout)

    def __call__(
        self,
        x: Float[Array, "B T _"],
        segments: Tokens | None = None,
        cache: dict | None = None,
        source: Float[Array, "B S D"] | None = None,
        source_mask: SourceMask | None = None,
        deterministic: bool = True,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[States, dict | None]:
        """The last hidden states of the embeddings x (in an encoder of config.embed_dim), and the new cache.

        segments: with `causal`, a token attends only to its own segment; else to all tokens except those
        of segment 0 (padding). cache: x is added to it. source, source_mask: for cross-attention. counted: False at
        tokens that the statistics of routers leave out; default segment 0.

        Prompt tuning (Lester et al. 2021): P trained vectors precede position 0, visible to all tokens.
        A call with T = 0 writes their keys and values to the cache's first slots.
        """
        c, P, prompted = self.config, 0, False
        positions.check_context(c, x.shape[1])
        if self.has_variable("params", "prompt"):
            prompt = self.get_variable("params", "prompt").astype(x.dtype)
            P, prompted = len(prompt), cache is None or x.shape[1] == 0
            if prompted:
                x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], 1)
        after_prompt = lambda x: x if x is None else jnp.pad(x, [(0, 0), (P, 0)], constant_values=1)
        segments, counted = after_prompt(segments), after_prompt(counted)
        if cache is None:
            places, mask, spec = self._whole_texts(x, P, segments)
            index, caches = None, [None] * self.layers
        else:
            places, mask, spec = self._after_cache(x, P, cache)
            segments = (places.queries >= cache["start"][:, None]).astype(jnp.int32)
            index, caches, source_mask = cache["index"], cache["layers"], cache.get("source_mask")
        source_mask = None if source_mask is None else masking.padding(source_mask)
        counted = segments > 0 if counted is None and segments is not None else counted
        if P and cache is None and counted is not None:  # nor does the prompt of a row without tokens count
            counted &= counted[:, P:].any(1, keepdims=True)
        inputs = AttentionInputs(mask, spec, index=index, source=source, source_mask=source_mask, segments=segments)
        inputs = inputs._replace(counted=counted)
        if c.positions == "relative":
            inputs = inputs._replace(bias=self._relative_bias(places.queries[0], places.keys[0]))
        x = self._add_positions(x, places.positions, P)
        if c.embed_norm:
            x = self.embed_norm(x)
        x = self.drop(x, deterministic=deterministic)
        x = self.project_in(x) if hasattr(self, "project_in") else x
        kinds = [(c.layer_type(i) if c.is_local(i) else "full", c.has_rope(i)) for i in range(self.layers)]
        by_kind = {kind: self._inputs_of(*kind, inputs, places) for kind in sorted(set(kinds))}
        run = self._scan if self.has_variable("params", "blocks") else self._loop
        x, caches = run(x, by_kind, kinds, caches, deterministic)
        if cache is not None:
            cache = cache | {"layers": caches, "index": cache["index"] + places.queries.shape[1]}
        x = x[:, P:] if prompted else x
        return (x if c.norm_place == "post" else self.norm(x)), cache

    def cross_cache(self, source: Float[Array, "B S D"]) -> list[LayerCache]:
        """The cross-attention keys and values of every layer, computed once for a source."""
        if self.has_variable("params", "blocks"):
            first, blocks, stacked = self._stacked()
            pairs = [block.cross_keys_values(source) for block in self.blocks[:first]]

            def of_period(params):
                pairs = zip(blocks, params, strict=True)
                return [block.apply({"params": p}, source, method="cross_keys_values") for block, p in pairs]

            pairs += _layers(jax.lax.map(of_period, stacked), (self.layers - first) // len(blocks))
        else:
            pairs = [block.cross_keys_values(source) for block in self.blocks]
        return [{"cross_key": key, "cross_value": value} for key, value in pairs]

    def _whole_texts(self, x, P, segments):
        """(Places, mask, MaskSpec) of texts read from their beginning, without a cache."""
        slots = in_text = jnp.arange(x.shape[1], dtype=jnp.int32)[None] - P
        prompt_keys, mask = masking.padding(slots < 0) if P else False, None
        if segments is not None:
            in_text = positions.restarting(segments[:, P:])
            if P:
                in_text = jnp.concatenate([jnp.broadcast_to(slots[:, :P], (len(x), P)), in_text], 1)
            mask = masking.segments(segments, segments) | prompt_keys if self.causal else masking.padding(segments > 0)
        spec = None
        if not P:
            spec = MaskSpec(segments) if self.causal or segments is None else MaskSpec(valid=segments > 0)
        length = None if segments is None else jnp.where(segments > 0, in_text, 0).max() + 1  # without padding
        return Places(slots, slots, in_text, in_text, prompt_keys, length), mask, spec

    def _after_cache(self, x, P, cache):
        """(Places, mask, no MaskSpec) of tokens that extend a cache."""
        start = cache["start"][:, None]
        positions.check_context(self.config, cache["index"] + x.shape[1] - P - start.min())
        slots = cache["index"] + jnp.arange(x.shape[1], dtype=jnp.int32)[None] - P
        S = max(layer["key"].shape[2] if "key" in layer else 1 for layer in cache["layers"])  # recurrent layers: none
        keys = jnp.arange(S, dtype=jnp.int32)[None] - P
        in_text = jnp.maximum(slots - start, jnp.minimum(slots, 0) if P else 0)
        prompt_keys = masking.padding(keys < 0) if P else False
        mask = masking.causal(slots, keys) & (masking.padding(keys >= start) | prompt_keys)
        return Places(slots, keys, in_text, keys - start, prompt_keys, S - P - start.min()), mask, None

    def _add_positions(self, x, in_text, P):
        c = self.config
        if c.positions == "learned":
            row = jnp.maximum(in_text, 0) if P else in_text
            table = parallel.replicate(self.position_embed.embedding)
            return x + table[row + c.position_offset].astype(x.dtype)
        if c.positions.startswith("sinusoidal"):
            return x + positions.sinusoidal(in_text + c.position_offset, x.shape[-1], c.positions).astype(x.dtype)
        return x

    def _relative_bias(self, queries, keys):
        c = self.config
        distance = keys[None] - queries[:, None]
        buckets = positions.relative_buckets(distance, c.relative_buckets, c.relative_distance, self.causal)
        return self.relative_bias(buckets).astype(jnp.float32).transpose(2, 0, 1)[None]

    def _inputs_of(self, layer_type, has_rope, inputs, places):
        """The AttentionInputs of the layers of a kind."""
        c, local = self.config, layer_type != "full"
        if has_rope:
            inputs = inputs._replace(angles=positions.angles_of(c, places.positions, local, places.length))
        elif c.nope_layers and c.rope.nope_scale:
            inputs = inputs._replace(query_scale=positions.query_scale(c.rope, places.positions)[:, None, :, None])
        if not local:
            return inputs
        if layer_type == "sliding":
            window = masking.window(places.queries, places.keys, c.window)
            spec = inputs.spec and dataclasses.replace(inputs.spec, window=c.window)
        else:  # the parts of a text begin at its first token, after padding or another document
            window, spec = masking.chunk(places.positions, places.key_positions, c.window), None
        window |= places.prompt_keys
        return inputs._replace(mask=window if inputs.mask is None else inputs.mask & window, spec=spec)

    def _loop(self, x, by_kind, kinds, caches, deterministic):
        """Run the blocks one by one. by_kind: kind -> AttentionInputs; kinds, caches: of each layer.
        Returns (the output, the new caches)."""
        new = []
        for block, kind, cache in zip(self.blocks, kinds, caches, strict=False):
            x, cache = block(x, by_kind[kind], cache, deterministic)
            new.append(cache)
        return x, new

    def _scan(self, x, by_kind, kinds, caches, deterministic):
        """`_loop` as a scan over stacked blocks, a period of them in a step; the blocks before run one by one."""
        first, blocks, stacked = self._stacked()
        period = range(len(blocks))
        x, before = self._loop(x, by_kind, kinds[:first], caches, deterministic)
        kinds, caches = ([of_layers[first:][j :: len(blocks)] for j in period] for of_layers in (kinds, caches))
        possible = [sorted(set(found)) for found in kinds]  # a layer's kind is a number in this list of its block
        rng = self.make_rng("dropout") if self.config.dropout and not deterministic else None
        collected = ["router"] if self.is_mutable_collection("router") else []

        def body(x, layer):
            i, number, params, caches = layer
            new = []
            for j in period:
                rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, i + j)}

                def run(kind, x=x, j=j, rngs=rngs):
                    arguments = {"params": params[j]}, x, by_kind[kind], caches[j], deterministic
                    return lambda: blocks[j].apply(*arguments, rngs=rngs, mutable=collected)

                (x, cache), sums = jax.lax.switch(number[j], [run(kind) for kind in possible[j]])
                new.append((cache, sums))
            return x, tuple(zip(*new, strict=True))

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        numbers = [jnp.array([possible[j].index(kind) for kind in kinds[j]]) for j in period]
        cache = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches[j]) for j in period]
        layers = jnp.arange(first, self.layers, len(blocks))
        x, (cache, sums) = jax.lax.scan(body, x, (layers, numbers, stacked, cache))
        self.sow("router", "blocks", sums)
        return x, before + _layers(cache, len(layers))

    def _stacked(self):
        """(the number of blocks before the stacked ones, the blocks of a period, their parameters [R, ...])."""
        groups = parallel.stacked_groups(self.get_variable("params", "blocks"))
        blocks = [Block(self.config, self.causal, self.cross, i, parent=None) for i, _ in groups]
        return min(groups)[0], blocks, [*groups.values()]


def _layers(period, count):
    """The tree of each layer, from the trees of a period's blocks, of leaves [count, ...]."""
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(count) for tree in period]
