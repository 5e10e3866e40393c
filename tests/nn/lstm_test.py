"""The attention LSTM: PyTorch's LSTM, its attention in NumPy, padding, causality, caches."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanoflax import generate
from nanoflax.config import LSTM_ATTENTIONS, LSTM_STARTS, ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.nn import attention_weights, build, lstm, shift_right, token_losses
from nanoflax.parallel import init
from nanoflax.planning import flops_per_token
from tests.closeness import assert_trees_close
from tests.compiled import apply

TINY = dict(architecture="lstm", vocab_size=23, context=32, layers=2, dim=12, heads=1)
KINDS = [dict(lstm_attention=a, lstm_start=s) for a, s in itertools.product(LSTM_ATTENTIONS, LSTM_STARTS)]


def make(seed=0, **fields):
    """A model, and parameters large enough that every part of it shows in the logits."""
    model = build(ModelConfig(**TINY | fields))
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(
        lambda p: jnp.asarray((5 if p.shape[0] == 23 else 1.5) * p + 0.2 * rng.normal(size=p.shape), jnp.float32),
        jax.device_get(init(model, jax.random.PRNGKey(seed))),
    )


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, targets_in, source, mask=None):
    return model.apply({"params": params}, targets_in, source, mask)[0]


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 23, shape).astype(np.int32)


def padded(rows, width, side):
    """Rows of tokens and their mask, with padding (a token like any other) on a side."""
    tokens, mask = np.full((len(rows), width), 7, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[i, at], mask[i, at] = row, True
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_encoder_equals_torch_on_packed_sequences(side):
    torch = pytest.importorskip("torch")
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    D, lengths = 5, [7, 3, 1, 6]
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(D, D, num_layers=2, bidirectional=True, batch_first=True)
    x = np.random.default_rng(0).normal(size=(4, 7, D)).astype(np.float32)
    packed = pack_padded_sequence(torch.tensor(x), lengths, batch_first=True, enforce_sorted=False)
    out, (h, c) = theirs(packed)
    expected, _ = pad_packed_sequence(out, batch_first=True)

    # The same rows, pushed to the right for padding on the left, and noise where there is none.
    mask = np.arange(7) < np.array(lengths)[:, None]
    states = np.where(mask[..., None], x, 9.0)
    if side == "left":
        mask = mask[:, ::-1]
        states = np.stack([np.roll(row, 7 - n, axis=0) for row, n in zip(states, lengths, strict=True)])
    for layer in range(2):
        params = {}
        for name, suffix in (("forward", ""), ("backward", "_reverse")):
            of = lambda kind: getattr(theirs, f"{kind}_l{layer}{suffix}").detach().numpy()
            params[f"{name}_input"] = {"kernel": of("weight_ih").T}
            params[name] = {"kernel": of("weight_hh").T, "bias": of("bias_ih") + of("bias_hh")}
        states, last_h, last_c = apply(lstm.BiLSTM(D), params, states, mask)
        for ours, theirs_ in ((last_h, h), (last_c, c)):
            both = theirs_[2 * layer : 2 * layer + 2].detach().numpy()
            np.testing.assert_allclose(ours, np.concatenate([*both], -1), atol=1e-6)
    for row, n in enumerate(lengths):
        at = slice(7 - n, None) if side == "left" else slice(n)
        np.testing.assert_allclose(states[row, at], expected[row, :n].detach(), atol=1e-6)


def test_attention_equals_its_formulas():
    rng = np.random.default_rng(0)
    B, S, D = 3, 5, 4
    query, keys, values, score = (rng.normal(size=s) for s in [(B, D), (B, S, D), (B, S, 6), (D,)])
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    for vector in (None, score):
        found, _ = lstm.attend(*map(jnp.float32, (query, keys, values)), mask, vector)
        for b in range(B):
            weights = []
            for s in range(S):
                e = (
                    query[b] @ keys[b, s]
                    if vector is None
                    else sum(vector[d] * np.tanh(query[b, d] + keys[b, s, d]) for d in range(D))
                )
                weights.append(np.exp(e) if mask[b, s] else 0)
            expected = sum(w * v for w, v in zip(weights, values[b], strict=True)) / sum(weights)
            np.testing.assert_allclose(found[b], expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_the_decoder_equals_torch_cells_step_by_step(kind):
    # The whole model again, from torch.nn.LSTMCell and the papers' formulas, one token at a time.
    torch = pytest.importorskip("torch")
    model, params = make(**kind)
    D, source, targets = 12, tokens_of(1, 1, 6), tokens_of(2, 1, 5)
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
    cache = jax.jit(partial(model.apply, method="read"))({"params": params}, source)
    states = torch.tensor(np.asarray(cache["values"]))[0]  # the encoder: tested above

    ends = []  # of each encoder layer: (h, c) of both directions
    x = np.asarray(params["embed"]["embedding"])[source] / 0.02
    for i in range(2):
        x, h, c = apply(lstm.BiLSTM(D), params[f"encoder_{i}"], x, np.ones((1, 6), bool))
        ends.append(torch.tensor(np.concatenate([h, c], -1)))
    cells, state = [], []
    for i in range(2):
        kernel, bias = p[f"decoder_{i}"]["kernel"], p[f"decoder_{i}"]["bias"]
        cell = torch.nn.LSTMCell(2 * D if i == 0 else D, D)
        inputs = [p["input"]["kernel"], kernel[:D]] if i == 0 else [kernel[:D]]
        cell.weight_ih.data, cell.weight_hh.data = torch.cat(inputs).T, kernel[D:].T
        cell.bias_ih.data, cell.bias_hh.data = bias, torch.zeros_like(bias)
        cells.append(cell)
        if kind["lstm_start"] == "encoder":
            h, c = torch.chunk(ends[i] @ p[f"start_{i}"]["kernel"] + p[f"start_{i}"]["bias"], 2, -1)
            state.append((torch.tanh(h), c))
        else:
            state.append((torch.zeros(1, D), torch.zeros(1, D)))
    output, expected, seen = torch.zeros(1, D), [], []
    for token in targets[0]:
        x = torch.cat([p["embed"]["embedding"][int(token)][None] / 0.02, output], -1)
        for i in range(2):
            state[i] = cells[i](x, state[i])
            x = state[i][0]
        if kind["lstm_attention"] == "additive":
            scores = torch.tanh(x @ p["query"]["kernel"] + states @ p["key"]["kernel"]) @ p["score"]
        else:
            scores = (states @ p["key"]["kernel"]) @ x[0]
        seen.append(torch.softmax(scores, 0))
        context = seen[-1] @ states
        output = torch.tanh(torch.cat([x, context[None]], -1) @ p["combine"]["kernel"])
        expected.append(output @ p["embed"]["embedding"].T)
    np.testing.assert_allclose(logits_of(model, params, targets, source)[0], torch.cat(expected).detach(), atol=1e-5)
    [found], _ = attention_weights(model, params, targets, source)
    found = found[0, 0]
    np.testing.assert_allclose(found, torch.stack(seen).detach(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_cached_decoding_equals_teacher_forcing(kind):
    model, params = make(**kind)
    rows, targets = [tokens_of(i, n) for i, n in enumerate((9, 4, 1))], tokens_of(5, 3, 8)
    source, mask = padded(rows, 9, "left")
    prefill = jax.jit(model.prefill, static_argnums=3)
    _, cache = prefill(params, source, np.array([9, 4, 1]), 8)
    decode, parts = jax.jit(model.decode), []
    for piece in (targets[:, :3], *(targets[:, i : i + 1] for i in range(3, 8))):
        logits, cache = decode(params, piece, cache)
        parts.append(logits)
    whole = logits_of(model, params, targets, source, mask)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_padding_on_either_side_changes_nothing(kind):
    model, params = make(**kind)
    rows, targets = [tokens_of(i, n) for i, n in enumerate((6, 3, 1))], tokens_of(5, 3, 5)
    alone = np.concatenate([logits_of(model, params, t[None], row[None]) for row, t in zip(rows, targets, strict=True)])
    for side in ("left", "right"):
        found = logits_of(model, params, targets, *padded(rows, 9, side))
        np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))
def test_causality_by_gradient(kind):
    # Each token reads a row of the table of its own: source 0 .. 5, targets 6 .. 11.
    model, params = make(**kind, tied=False)
    t = 3

    def mix(table):
        params_ = params | {"embed": {"embedding": table}}
        logits, _ = model.apply(
            {"params": params_}, jnp.arange(6, 12)[None], jnp.arange(6)[None], jnp.arange(6)[None] != 4
        )
        return logits[0, t] @ np.random.default_rng(0).normal(size=23)

    reach = np.abs(jax.jit(jax.grad(mix))(params["embed"]["embedding"])).max(1)
    assert (reach[[0, 1, 2, 3, 5]] > 1e-6).all() and reach[4] == 0  # the source, its padding
    assert (reach[6 : 6 + t + 1] > 1e-6).all() and (reach[6 + t + 1 :] == 0).all()


def test_the_kinds_differ_and_the_first_state_is_what_it_says():
    source, targets, seen = tokens_of(1, 2, 6), tokens_of(2, 2, 5), []
    for kind in KINDS:
        model, params = make(**kind)
        seen.append(logits_of(model, params, targets, source))
        cache = jax.jit(partial(model.apply, method="read"))({"params": params}, source)
        zeros = all((np.asarray(x) == 0).all() for x in jax.tree.leaves(cache["layers"]))
        assert zeros == (kind["lstm_start"] == "zeros")
    for a, b in itertools.combinations(seen, 2):
        assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_remat_changes_no_gradient_and_every_parameter_has_one(remat):
    model, params = make()
    source, targets = tokens_of(1, 2, 6), tokens_of(2, 2, 5)

    def loss(params, model):
        logits, _ = model.apply({"params": params}, shift_right(targets, 0), source)
        return token_losses(logits, targets)[0].sum()

    grads = jax.jit(jax.grad(loss), static_argnums=1)(params, build(model.config, remat))
    plain = jax.jit(jax.grad(loss), static_argnums=1)(params, model)
    assert_trees_close(grads, plain, 5e-6)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))


def test_dropout_is_off_by_default_and_follows_its_key():
    (model, params), (plain, _) = make(dropout=0.3), make()
    source, targets = tokens_of(1, 2, 6), tokens_of(2, 2, 5)

    @jax.jit
    def dropped(key):
        return model.apply(
            {"params": params}, targets, source, deterministic=False, rngs={"dropout": jax.random.PRNGKey(key)}
        )[0]

    np.testing.assert_array_equal(logits_of(model, params, targets, source), logits_of(plain, params, targets, source))
    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 0.01


def test_bfloat16_computes_close_to_float32():
    (model, params), (half, _) = make(), make(dtype="bfloat16")
    source, targets = tokens_of(1, 2, 6), tokens_of(2, 2, 5)
    whole, found = (logits_of(m, params, targets, source) for m in (model, half))
    assert found.dtype == jnp.float32
    assert 1e-4 < np.abs(found - whole).mean() < 0.05 * np.abs(whole).mean()


STEPS = 400


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=lambda k: "-".join(k.values()))
def test_it_learns_to_reverse(kind):
    # Sources of one to four digits, backwards and closed by 1; then the sampler does it alone.
    model = build(ModelConfig(**TINY | kind | dict(layers=1, dim=32, tied=False)))
    rng = np.random.default_rng(0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS), b2=0.99))

    def batch(n):
        rows = [rng.integers(2, 8, rng.integers(1, 5)) for _ in range(n)]
        source, mask = padded(rows, 4, "left")
        targets, weights = padded([[*row[::-1], 1] for row in rows], 5, "right")
        return rows, (source, mask, targets, weights)

    @jax.jit
    def train(params, batches):
        def step(carry, batch):
            source, mask, targets, weights = batch

            def loss(params):
                inputs = shift_right(targets, 0)
                logits, _ = model.apply({"params": params}, inputs, source, mask)
                return (token_losses(logits, targets)[0] * weights).sum() / weights.sum()

            value, grads = jax.value_and_grad(loss)(carry[0])
            updates, state = tx.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params, losses

    batches = [batch(32)[1] for _ in range(STEPS)]
    params, losses = train(init(model, jax.random.PRNGKey(0)), [np.stack(x) for x in zip(*batches, strict=True)])
    assert losses[-10:].mean() < 0.02 * losses[0]
    rows, _ = batch(50)
    found = generate.sample(model, params, [row.tolist() for row in rows], 5, temperature=0, eos_id=1)
    right = sum(new == row[::-1].tolist() for new, row in zip(found, rows, strict=True))
    assert right >= 47


def test_flops_count_every_matrix():
    for fields in (*KINDS, dict(layers=3)):
        model, params = make(**fields)
        c = model.config
        matrices = [
            p
            for path, p in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "kernel" and "start" not in path[0].key
        ]  # once a sequence
        weights = sum(p.size for p in matrices) + c.dim * c.vocab_size
        assert flops_per_token(c, 10) == 6 * weights + 18 * c.dim * 10


def test_layers_of_the_two_halves_must_pair():
    with pytest.raises(UserError, match="decoder_layers=3 must equal model.layers=2"):
        validate(ModelConfig(**TINY, decoder_layers=3))
