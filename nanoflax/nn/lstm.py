"""The attention LSTM: a bidirectional encoder, and a decoder that attends to its states.

Encoder: Bahdanau et al. 2015. Decoder: Luong et al. 2015 with input feeding. Attention scores: Luong's
`general` or Bahdanau's additive scores. Modules own the weights; a scan over time calls only functions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from nanoflax import parallel
from nanoflax.kernels import Array, Source, SourceMask, States, Tokens
from nanoflax.nn.blocks import REMAT_POLICIES
from nanoflax.nn.language_model import SourceModel, empty_delay
from nanoflax.nn.layers import Linear


def lstm_cell(
    gates: Float[Array, "B _gates"], c: Float[Array, "B D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997; forget gates of Gers et al. 2000).

    gates: input, forget, candidate and output before their nonlinearities; c: the cell's memory,
    float32. Returns (h in gates' dtype, the new c).
    """
    i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(gates.dtype), c


def lstm(
    x: Float[Array, "B S _gates"], kernel: Float[Array, "D _gates"], mask: SourceMask, reverse: bool = False
) -> tuple[Float[Array, "B S D"], Float[Array, "B D"], Float[Array, "B D"]]:
    """An LSTM over a sequence, from a state of zeros. Padding leaves the state unchanged.

    The gates of a step are x + h @ kernel. mask: True at real tokens; reverse: from the last token to
    the first. Returns (h of every token, the last h, the last c float32).
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


def attend(
    query: Float[Array, "B D"],
    keys: Float[Array, "B S D"],
    values: Float[Array, "B S E"],
    mask: SourceMask,
    score: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B E"], Float[Array, "B S"]]:
    """(the mean of the values, weighted by the softmax over S of the scores; the float32 weights).

    The scores are score . tanh(query + key) (additive, Bahdanau et al. 2015), or without `score`
    query . key (multiplicative, Luong et al. 2015).
    """
    if score is None:
        scores = jnp.einsum("bd,bsd->bs", query, keys, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("bsd,d->bs", jnp.tanh(query[:, None] + keys), score, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bs,bse->be", weights.astype(values.dtype), values), weights


class Matrix(nn.Module):
    """A kernel [rows, columns] for use inside a scan, where Linen modules cannot be called."""

    rows: int
    columns: int
    gates: bool = False  # with a bias, 1 for the forget gates (Jozefowicz et al. 2015)

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(self.rows**-0.5), (self.rows, self.columns))
        if self.gates:
            self.bias = self.param("bias", lambda _: jnp.repeat(jnp.array([0.0, 1, 0, 0]), self.columns // 4))

    def gathered(self, dtype: DTypeLike) -> Float[Array, "I O"]:
        """The kernel in a dtype, gathered from all devices once, before the scan."""
        return parallel.replicate(self.kernel.astype(dtype))


class BiLSTM(nn.Module):
    """An LSTM in each direction, concatenated."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S I"], mask: SourceMask) -> list[Array]:
        """[h of every token [B, S, 2D], the last h [B, 2D], the last c [B, 2D]]; the backward LSTM's
        last state is that of the first token."""
        outputs = []
        for name in ("forward", "backward"):
            cell = Matrix(self.dim, 4 * self.dim, gates=True, name=name)
            gates = Linear(4 * self.dim, False, x.shape[-1] ** -0.5, name=f"{name}_input")(x)
            gates += cell.bias.astype(x.dtype)
            outputs.append(lstm(gates, cell.gathered(x.dtype), mask, reverse=name == "backward"))
        return [jnp.concatenate(pair, axis=-1) for pair in zip(*outputs, strict=True)]


class AttentionLSTM(SourceModel):
    """L bidirectional LSTM layers encode a source, and L LSTM layers generate the target.

    Called like an EncoderDecoder. The cache holds the decoder's state, the source's states and their
    keys; the size of the cache does not depend on the number of generated tokens.
    """

    def setup(self):
        super().setup()
        c, D = self.config, self.config.dim
        self.encoder = [BiLSTM(D, name=f"encoder_{i}") for i in range(c.layers)]
        if c.lstm_start == "encoder":
            width = 4 * D if c.bottleneck == "none" else 2 * D
            self.start = [Linear(2 * D, stddev=width**-0.5, name=f"start_{i}") for i in range(c.layers)]
        self.input = Linear(4 * D, False, D**-0.5)
        # The first D rows of each kernel multiply the layer's input, the other rows its own h.
        self.decoder = [Matrix(2 * D, 4 * D, gates=True, name=f"decoder_{i}") for i in range(c.layers)]
        self.key = Linear(D, False, (2 * D) ** -0.5)
        if c.lstm_attention == "additive":
            self.query = Matrix(D, D)
            self.score = self.param("score", nn.initializers.normal(D**-0.5), (D,))
        self.combine = Matrix(3 * D, D)

    def embed(self, tokens: Tokens) -> States:
        """Embeddings of initial variance 1, which suits the gates."""
        return super().embed(tokens) / 0.02

    def hidden(
        self,
        targets_in: Tokens,
        source: Source | None = None,
        source_mask: SourceMask | None = None,
        cache: dict | None = None,
        deterministic: bool = True,
    ) -> tuple[States, dict | None]:
        """(the states that `head` reads, in the compute dtype; the new cache)."""
        return self._decoded(targets_in, source, source_mask, cache, deterministic)[:2]

    def _decoded(self, targets_in, source=None, source_mask=None, cache=None, deterministic=True):
        """The result of `hidden`, and the float32 attention weights [B, T, S] of each prediction."""
        c, (B, T) = self.config, targets_in.shape
        state = cache or self.read(source, source_mask, deterministic)  # type: ignore  # one of the two is given
        x = self.drop(self.embed(targets_in), deterministic=deterministic)
        inputs = self.input(x).swapaxes(0, 1)
        dropped = self.drop(jnp.ones((T, c.layers, B, c.dim), x.dtype), deterministic=deterministic)
        weights = [(cell.gathered(x.dtype), cell.bias.astype(x.dtype)) for cell in self.decoder]
        combine, query, score = self.combine.gathered(x.dtype), None, None
        if c.lstm_attention == "additive":
            query, score = self.query.gathered(x.dtype), self.score.astype(x.dtype)
        keys, values, mask = state["keys"], state["values"], state["source_mask"]

        def step(carry, now):
            (x, layers), (inputs, dropped) = carry, now  # x: the last output (input feeding)
            new = []
            for (kernel, bias), (h, memory), kept in zip(weights, layers, dropped, strict=True):
                gates = jnp.concatenate([x * kept, h], -1) @ kernel + bias + inputs
                x, memory = lstm_cell(gates, memory)
                new.append((x, memory))
                inputs = 0  # only the first layer reads the embeddings
            context, attention = attend(x if query is None else x @ query, keys, values, mask, score)
            x = jnp.tanh(jnp.concatenate([x, context], -1) @ combine)
            return (x, new), (x, attention)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat])
        (last, layers), (x, attention) = jax.lax.scan(step, (state["last"], state["layers"]), (inputs, dropped))
        x = self.drop(x.swapaxes(0, 1), deterministic=deterministic)
        x, cache = self.output(x, cache=None if cache is None else cache | {"last": last, "layers": layers})
        return x, cache, attention.swapaxes(0, 1)

    def encode(
        self, source: Source, source_mask: SourceMask | None = None, deterministic: bool = True
    ) -> Float[Array, "B S _width"]:
        """The states of the last encoder layer."""
        return self._encode(source, source_mask, deterministic)[0]

    def read(self, source: Source, source_mask: SourceMask | None = None, deterministic: bool = True) -> dict:
        """The cache before the first target of a source."""
        mask = jnp.ones(source.shape, bool) if source_mask is None else source_mask
        x, ends = self._encode(source, mask, deterministic)
        x, mask = self.through_bottleneck(x, mask)
        layers = []
        for i, end in enumerate(ends):
            if self.config.lstm_start == "encoder":
                end = end if self.config.bottleneck == "none" else x[:, 0]
                h, memory = jnp.split(self.start[i](end), 2, axis=-1)
                h = jnp.tanh(h)
            else:
                h = memory = jnp.zeros_like(x[:, 0, : self.config.dim])
            layers.append((h, memory.astype(jnp.float32)))
        state = {"last": jnp.zeros_like(h), "layers": layers, "keys": self.key(x), "values": x, "source_mask": mask}
        return state | empty_delay(self, len(x))

    def _encode(self, source, source_mask, deterministic):
        """(the states [B, S, 2D] of the last layer, a list with the last h and c [B, 4D] of each layer)."""
        mask = jnp.ones(source.shape, bool) if source_mask is None else source_mask
        x, ends = self.embed(source), []
        for encoder in self.encoder:
            x, h, memory = encoder(self.drop(x, deterministic=deterministic), mask)
            ends.append(jnp.concatenate([h, memory.astype(h.dtype)], axis=-1))
        return x, ends

    def prefill(
        self, params: dict, tokens: Source, lengths: Int[Array, " B"], new_tokens: int
    ) -> tuple[Int[Array, " B"], dict]:
        """Read sources that are padded on the left. Returns (config.start_id of each row, the cache)."""
        B, S = tokens.shape
        mask = jnp.arange(S)[None] >= S - lengths[:, None]
        cache = self.apply({"params": params}, tokens, mask, method="read")
        return jnp.full(B, self.config.start_id, jnp.int32), cache  # type: ignore  # Linen's apply has no type
