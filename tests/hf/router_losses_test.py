"""The losses of routers, against those that Transformers adds with output_router_logits."""

import jax
import numpy as np
import pytest
import torch
import transformers

from nanoflax import hf, train
from nanoflax.nn import build
from tests.hf.cases import CASES


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe-renormalised", "olmoe"])
def test_the_balance_loss_and_its_gradient_equal_transformers(case, tmp_path):
    name, fields = CASES[case]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = cls(cls.config_class(**fields | dict(router_aux_loss_coef=0.5), attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    assert config.moe.balance_loss == 0.5

    ids = np.random.default_rng(0).integers(4, 60, (2, 13)).astype(np.int32)
    segments = (np.arange(12) < np.array([[12], [7]])).astype(np.int32)  # of inputs; the second row has padding
    tensor = lambda x: torch.tensor(x).long()
    out = theirs(tensor(ids[:, :-1]), attention_mask=tensor(segments), output_router_logits=True)
    out.aux_loss.backward()
    batch = {"targets": ids[:, 1:], "first": ids[:, 0], "weights": segments.astype(np.float32)}
    batch |= {"segments": segments, "start": ids[:, 0]}

    def router_loss(params):
        sums = train.objectives.with_router(train.causal_lm)(build(config), params, batch)
        without = train.causal_lm(build(config), params, batch)
        return (sums.objective - without.objective) / sums.weight, sums.logged["balance_loss"] / sums.weight

    (loss, logged), grads = jax.value_and_grad(router_loss, has_aux=True)(params)
    np.testing.assert_allclose(logged, out.aux_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * out.aux_loss.item(), rtol=1e-4)
    expected = 0.5 * theirs.get_input_embeddings().weight.grad.numpy()
    error = np.linalg.norm(grads["embed"]["embedding"] - expected) / np.linalg.norm(expected)
    assert error < 1e-4
