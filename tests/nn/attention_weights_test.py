"""The attention weights that are shown, beside Transformers' output_attentions."""

import jax
import numpy as np
import pytest
import torch

from nanoflax import hf, nn
from tests.hf.models_test import make

# Plain, grouped queries, windows and soft caps, sinks, latent attention, layers with a state.
CASES = ("gpt2", "llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3-next-dense")


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_transformers(case, tmp_path):
    theirs = make(case, std=0.3)
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    ids = np.random.default_rng(0).integers(4, 60, (2, 20))
    with torch.no_grad():
        found = theirs(torch.tensor(ids), output_attentions=True, use_cache=False).attentions
    expected = [x.numpy() for x in found if x is not None]  # None: a layer with a state
    model = nn.build(config)
    layers = jax.jit(lambda params, ids: nn.attention_weights(model, params, ids)[0])(params, ids)
    assert len(layers) == len(expected) >= 1
    for ours, want in zip(layers, expected, strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-5)
    sums = np.stack(layers).sum(-1)
    if case == "gpt_oss":
        assert (sums < 1 + 1e-5).all() and (sums < 0.9).any()
    else:
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_long_texts_have_one_matrix():
    """Other causal attention is computed in blocks of queries from 128 tokens on."""
    rng = np.random.default_rng(1)
    q, k = (rng.normal(size=(1, heads, 130, 8)).astype(np.float32) for heads in (4, 2))
    weights = np.asarray(nn.attention.heads_first(q, k, None, causal=True))
    scores = np.einsum("bhtk,bhsk->bhts", q, k.repeat(2, 1)) / 8**0.5
    scores = np.where(np.tri(130, dtype=bool), scores, -np.inf)
    np.testing.assert_allclose(weights, jax.nn.softmax(scores, axis=-1), atol=1e-6)
