"""Chunked layers (Llama 4): a token sees only its own part of the text, with a cache and in packed rows too."""

from functools import partial

import jax
import numpy as np

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.nn import build, masking
from tests.compiled import prefill

MODEL = ModelConfig(
    vocab_size=23, context=16, layers=1, dim=16, heads=2, positions="rotary", window=4, layer_types=("chunked",),
    dtype="float32")  # fmt: skip


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def run(model, params, tokens, segments=None, cache=None):
    return model.apply({"params": params}, tokens, segments, cache=cache)


def weights_and_tokens():
    params = parallel.init(build(MODEL), jax.random.PRNGKey(0))
    tokens = np.random.default_rng(0).integers(0, 23, (1, 12)).astype(np.int32)
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params), tokens


def test_the_mask_is_that_of_numpy():
    t = np.arange(11)
    expected = (t[None] <= t[:, None]) & (t[None] // 4 == t[:, None] // 4)
    found = masking.chunk(t, t, 4) & masking.causal(t, t)
    np.testing.assert_array_equal(found[0, 0], expected)


def test_each_part_is_as_if_it_were_alone_with_and_without_a_cache():
    model, (params, tokens) = build(MODEL), weights_and_tokens()
    whole = run(model, params, tokens)[0]
    # Rotary positions are relative and there is one layer: a part alone has the logits that it has in the text.
    parts = np.concatenate([run(model, params, tokens[:, i : i + 4])[0] for i in (0, 4, 8)], 1)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    _, cache = prefill(model, params, tokens[:, :6], np.array([6]), 8)
    for t in range(5, 12):
        logits, cache = run(model, params, tokens[:, t : t + 1], None, cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-5)


def test_parts_begin_at_the_first_token_of_a_text_or_document():
    model, (params, tokens) = build(MODEL), weights_and_tokens()
    # Documents of 6 tokens in a row, which begin where no part of the row begins.
    segments = np.repeat([[1, 2]], [6, 6], axis=1).astype(np.int32)
    packed = run(model, params, tokens, segments)[0]
    for part in (slice(0, 6), slice(6, 12)):
        np.testing.assert_allclose(packed[:, part], run(model, params, tokens[:, part])[0], atol=1e-5)
    # Prompts of 6 and 3 tokens, padded on the left, then six more tokens of each.
    rows = np.concatenate([tokens[:, :6], np.pad(tokens[:, 6:9], [(0, 0), (3, 0)])])
    texts = [tokens[:, :12], np.concatenate([tokens[:, 6:9], tokens[:, 6:12]], 1)]
    last, cache = prefill(model, params, rows, np.array([6, 3]), 8)
    following = np.concatenate([np.asarray(last)[:, None], np.repeat(tokens[:, 6:12], 2, 0)], 1).astype(np.int32)
    for t in range(7):
        logits, cache = run(model, params, following[:, t : t + 1], None, cache)
        for row, (text, length) in enumerate(zip(texts, (6, 3), strict=True)):
            expected = run(model, params, text)[0][0, length - 1 + t]
            np.testing.assert_allclose(logits[row, 0], expected, atol=1e-5)


def test_the_mask_is_that_of_transformers_with_padding_on_the_left():
    import torch
    from transformers import LlamaConfig
    from transformers.masking_utils import create_chunked_causal_mask

    config = LlamaConfig(attention_chunk_size=4, attn_implementation="eager")
    real = torch.arange(11)[None] >= torch.tensor([[0], [3]])
    expected = create_chunked_causal_mask(config, torch.zeros(2, 11, 8), real, None)
    t, start = np.arange(11), np.array([[0], [3]])
    found = masking.chunk(t - start, t - start, 4) & masking.causal(t, t) & np.asarray(real)[:, None, None]
    seen = np.asarray(real)
    np.testing.assert_array_equal(np.asarray(found)[:, 0][seen], (expected[:, 0].numpy() == 0)[seen])
