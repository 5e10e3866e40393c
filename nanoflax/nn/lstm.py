"""The attention LSTM: a bidirectional encoder and a decoder that attends to its states.

The decoder is that of Luong et al. 2015 with input feeding; its scores are their `general` ones, or
the additive ones of Bahdanau et al. 2015, whose encoder this is. Modules own the weights; all that
runs inside a scan over time is a function.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax import parallel
from nanoflax.nn.blocks import REMAT_POLICIES
from nanoflax.nn.language_model import SourceModel, empty_delay
from nanoflax.nn.layers import Linear


def lstm_cell(gates, c):
    """One step of an LSTM (Hochreiter and Schmidhuber 1997; forget gates of Gers et al. 2000).

    gates: [B, 4D], input, forget, candidate and output before their nonlinearities; c: [B, D]
    float32, the cell's memory. Returns (h [B, D] in gates' dtype, the new c).
    """
    i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(gates.dtype), c


def lstm(x, kernel, mask, reverse=False):
    """An LSTM over a sequence, from zeros. Padding leaves the state as it is.

    x: [B, S, 4D], the inputs' part of the gates; kernel: [D, 4D], of the state's part; mask: [B, S]
    bool, True at real tokens; reverse: from the last token to the first.
    Returns (h of every token [B, S, D], the last h [B, D], the last c [B, D] float32).
    """

    def step(state, now):
        (h, c), (x, real) = state, now
        new = lstm_cell(x + h @ kernel, c)
        state = jax.tree.map(lambda new, old: jnp.where(real[:, None], new, old), new, state)
        return state, state[0]

    B, D = x.shape[0], kernel.shape[0]
    zeros = jnp.zeros((B, D), x.dtype), jnp.zeros((B, D), jnp.float32)
    (h, c), states = jax.lax.scan(step, zeros, (x.swapaxes(0, 1), mask.T), reverse=reverse)
    return states.swapaxes(0, 1), h, c


def attend(query, keys, values, mask, score=None):
    """The mean of a source's values, weighted by the softmax over S of query and keys' scores.

    query: [B, D]; keys: [B, S, D]; values: [B, S, E]; mask: [B, S] bool; score: [D], for additive
    scores score . tanh(query + key) (Bahdanau et al. 2015), or None for multiplicative ones,
    query . key (Luong et al. 2015). Returns ([B, E] in values' dtype, the weights [B, S] float32).
    """
    if score is None:
        scores = jnp.einsum("bd,bsd->bs", query, keys, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("bsd,d->bs", jnp.tanh(query[:, None] + keys), score, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bs,bse->be", weights.astype(values.dtype), values), weights


class Matrix(nn.Module):
    """Owns a kernel [rows, columns] that a scan reads: in one, Linen allows no call of a module."""

    rows: int
    columns: int
    gates: bool = False  # of an LSTM: has a bias, 1 for the forget gates (Jozefowicz et al. 2015)

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(self.rows**-0.5), (self.rows, self.columns))
        if self.gates:
            self.bias = self.param("bias", lambda _: jnp.repeat(jnp.array([0.0, 1, 0, 0]), self.columns // 4))

    def whole(self, dtype):
        """The kernel in a dtype, put together once, before the scan."""
        return parallel.replicate(self.kernel.astype(dtype))


class BiLSTM(nn.Module):
    """An LSTM in each direction. x: [B, S, ...] and mask [B, S] bool to (states [B, S, 2D], the
    last h [B, 2D] and c [B, 2D] of both: at the end forward, at the beginning backward)."""

    dim: int

    @nn.compact
    def __call__(self, x, mask):
        outputs = []
        for name in ("forward", "backward"):
            cell = Matrix(self.dim, 4 * self.dim, gates=True, name=name)
            gates = Linear(4 * self.dim, False, x.shape[-1] ** -0.5, name=f"{name}_input")(x)
            outputs.append(
                lstm(gates + cell.bias.astype(x.dtype), cell.whole(x.dtype), mask, reverse=name == "backward")
            )
        return [jnp.concatenate(pair, axis=-1) for pair in zip(*outputs)]


class AttentionLSTM(SourceModel):
    """L bidirectional LSTM layers that read a source, and L that write the target.

    Called as an EncoderDecoder is. Its cache is the decoder's state, the source's states and their
    keys: of one size, however many tokens are written.
    """

    def setup(self):
        super().setup()
        c, D = self.config, self.config.dim
        self.encoder = [BiLSTM(D, name=f"encoder_{i}") for i in range(c.layers)]
        if c.lstm_start == "encoder":
            width = 4 * D if c.bottleneck == "none" else 2 * D
            self.start = [Linear(2 * D, stddev=width**-0.5, name=f"start_{i}") for i in range(c.layers)]
        self.input = Linear(4 * D, False, D**-0.5)
        # Of each layer's kernel the first D rows read what is below, the others its own h.
        self.decoder = [Matrix(2 * D, 4 * D, gates=True, name=f"decoder_{i}") for i in range(c.layers)]
        self.key = Linear(D, False, (2 * D) ** -0.5)
        if c.lstm_attention == "additive":
            self.query = Matrix(D, D)
            self.score = self.param("score", nn.initializers.normal(D**-0.5), (D,))
        self.combine = Matrix(3 * D, D)

    def embed(self, tokens):
        """tokens: [B, T] int32 below V -> [B, T, D]; at first of variance 1, as gates want them."""
        return super().embed(tokens) / 0.02

    def hidden(self, targets_in, source=None, source_mask=None, cache=None, deterministic=True):
        """The last states that `head` reads, [B, T, D] in the compute dtype, and the cache."""
        return self._decoded(targets_in, source, source_mask, cache, deterministic)[:2]

    def alignment(self, targets_in, source, source_mask=None):
        """The weights of attention [B, T, S] float32 with which each target was foretold."""
        return self._decoded(targets_in, source, source_mask)[2]

    def _decoded(self, targets_in, source=None, source_mask=None, cache=None, deterministic=True):
        c, (B, T) = self.config, targets_in.shape
        state = self.read(source, source_mask, deterministic) if cache is None else cache
        x = self.drop(self.embed(targets_in), deterministic=deterministic)
        inputs = self.input(x).swapaxes(0, 1)
        dropped = self.drop(jnp.ones((T, c.layers, B, c.dim), x.dtype), deterministic=deterministic)
        weights = [(cell.whole(x.dtype), cell.bias.astype(x.dtype)) for cell in self.decoder]
        combine, query, score = self.combine.whole(x.dtype), None, None
        if c.lstm_attention == "additive":
            query, score = self.query.whole(x.dtype), self.score.astype(x.dtype)
        keys, values, mask = state["keys"], state["values"], state["source_mask"]

        def step(carry, now):
            (x, layers), (inputs, dropped) = carry, now  # x: the last output, fed to this input
            new = []
            for (kernel, bias), (h, memory), kept in zip(weights, layers, dropped):
                gates = jnp.concatenate([x * kept, h], -1) @ kernel + bias + inputs
                x, memory = lstm_cell(gates, memory)
                new.append((x, memory))
                inputs = 0  # the embeddings are the first layer's alone
            context, seen = attend(x if query is None else x @ query, keys, values, mask, score)
            x = jnp.tanh(jnp.concatenate([x, context], -1) @ combine)
            return (x, new), (x, seen)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat])
        (last, layers), (x, seen) = jax.lax.scan(step, (state["last"], state["layers"]), (inputs, dropped))
        x = self.drop(x.swapaxes(0, 1), deterministic=deterministic)
        x, cache = self.output(x, cache=None if cache is None else cache | {"last": last, "layers": layers})
        return x, cache, seen.swapaxes(0, 1)

    def states(self, source, source_mask=None, deterministic=True):
        """The last encoder layer's states [B, S, 2D] of source [B, S] int32."""
        return self._encode(source, source_mask, deterministic)[0]

    def read(self, source, source_mask=None, deterministic=True):
        """The cache before the first target of a source [B, S] int32."""
        mask = jnp.ones(source.shape, bool) if source_mask is None else source_mask
        x, ends = self._encode(source, mask, deterministic)
        x, mask = self.seen(x, mask)
        layers = []
        for i, end in enumerate(ends):
            if self.config.lstm_start == "encoder":
                end = end if self.config.bottleneck == "none" else x[:, 0]
                h, memory = jnp.split(self.start[i](end), 2, axis=-1)
                h = jnp.tanh(h)
            else:
                h = memory = jnp.zeros_like(x[:, 0, : self.config.dim])
            layers.append((h, memory.astype(jnp.float32)))
        return {
            "last": jnp.zeros_like(h),
            "layers": layers,
            "keys": self.key(x),
            "values": x,
            "source_mask": mask,
            **empty_delay(self, len(x)),
        }

    def _encode(self, source, source_mask, deterministic):
        """The states [B, S, 2D] of the last layer, and of each the last h and c of both directions,
        [B, 4D]."""
        mask = jnp.ones(source.shape, bool) if source_mask is None else source_mask
        x, ends = self.embed(source), []
        for encoder in self.encoder:
            x, h, memory = encoder(self.drop(x, deterministic=deterministic), mask)
            ends.append(jnp.concatenate([h, memory.astype(h.dtype)], axis=-1))
        return x, ends

    def prefill(self, params, tokens, lengths, new_tokens):
        """Read sources [B, S] int32, padded on the left, of lengths [B] int32.
        Returns (config.start_id for each row, the cache)."""
        B, S = tokens.shape
        mask = jnp.arange(S)[None] >= S - lengths[:, None]
        cache = self.apply({"params": params}, tokens, mask, method="read")
        return jnp.full(B, self.config.start_id, jnp.int32), cache
