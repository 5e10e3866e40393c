"""The losses of routers, against those that Transformers adds with output_router_logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.nllb_moe import modeling_nllb_moe
from transformers.models.switch_transformers import modeling_switch_transformers

from nanoflax import alignment, hf, parallel, peft, train
from nanoflax import config as configs
from nanoflax.nn import build
from nanoflax.nn.moe import Router
from tests.hf.cases import CASES

CASES_WITH_A_LOSS = ["mixtral", "mixtral-top1", "qwen3_moe-renormalised", "qwen3_moe-top1", "olmoe", "gpt_oss"]


@pytest.mark.parametrize(
    "case", [*CASES_WITH_A_LOSS, "qwen2_moe", "granitemoe-tied", "flex_olmo", "ernie4_5_moe-bias", "qwen3-next"]
)
def test_the_balance_loss_and_its_gradient_equal_transformers(case, tmp_path):
    name, fields = CASES[case]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = cls(cls.config_class(**fields | dict(router_aux_loss_coef=0.5), attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "e_score_correction" not in name:  # Transformers' loss is of the choices without the correction
                # Through the recurrent layers, larger weights lose more digits.
                p.add_((0.1 if case == "qwen3-next" else 0.2) * torch.randn_like(p))
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

    (loss, logged), grads = jax.jit(jax.value_and_grad(router_loss, has_aux=True))(params)
    np.testing.assert_allclose(logged, out.aux_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * out.aux_loss.item(), rtol=1e-4)
    expected = 0.5 * theirs.get_input_embeddings().weight.grad.numpy()
    error = np.linalg.norm(grads["embed"]["embedding"] - expected) / np.linalg.norm(expected)
    assert error < 1e-4


SMALL = configs.preset("nano-1m", vocab_size=67, dim=32, heads=4, layers=2, mlp_dim=24)
MOE = configs.MoEConfig(experts=8, active=3, balance_loss=0.5, z_loss=0.25)
S, T = np.array([[10], [6], [3]]), np.array([[7], [4], [1]])  # the real tokens of sources and targets


def padded_batches():
    """{name: (the objective, changes of the model, the batch, the real tokens of each stack)}."""
    rng = np.random.default_rng(0)
    source, targets = rng.integers(0, 67, (3, 10)).astype(np.int32), rng.integers(0, 67, (3, 9)).astype(np.int32)
    of_source, of_targets = np.arange(10) < S, np.arange(9) < T
    weights, first = of_targets.astype(np.float32), np.ones(3, np.int32)
    text = {"targets": targets, "weights": weights, "first": first}
    answers = text | {"weights": weights * (np.arange(9) >= T - 1)}  # the tokens of a prompt have no weight
    pairs = {"chosen": targets, "rejected": targets[:, ::-1], "chosen_weights": weights, "rejected_weights": weights}
    pairs |= {"first": first, "weights": np.ones(3, np.float32)}
    masked = {"tokens": source, "padding_mask": of_source, "targets": source, "weights": of_source.astype(np.float32)}
    classes = {"tokens": source, "padding_mask": of_source, "label": first, "weights": np.ones(3, np.float32)}
    both = {"source": source, "source_mask": of_source, "targets": targets, "weights": weights}
    encoder = {"architecture": "encoder", "positions": "learned"}
    return {
        "causal_lm": (train.causal_lm, {}, text, {"decoder": of_targets}),
        "answers": (train.causal_lm, {}, answers, {"decoder": of_targets}),
        "preference": (alignment.preference, {}, pairs, {"decoder": of_targets.repeat(2, 0)}),
        "classify": (train.classify, {"head": "classify"}, classes, {"decoder": of_source}),
        "masked_lm": (train.masked_lm, encoder | {"head": "mlm"}, masked, {"encoder": of_source}),
        "encoder-classify": (train.classify, encoder | {"head": "classify"}, classes, {"encoder": of_source}),
        "seq2seq": (
            train.seq2seq,
            {"architecture": "encoder_decoder", "decoder_layers": 1},
            both,
            {"encoder": of_source, "decoder": of_targets},
        ),
    }


@pytest.mark.parametrize("name", padded_batches())
def test_padding_does_not_count_in_any_architecture(name):
    """The losses equal those of NLLB-MoE and Switch Transformers, from the logits of the same routers."""
    objective, changes, batch, real = padded_batches()[name]
    options = {"loss": "orpo"} if name == "preference" else {}
    config = dataclasses.replace(SMALL, moe=MOE, **changes)
    model = build(config)
    params = jax.tree.map(lambda x: x * 8, parallel.init(model, jax.random.key(0)))

    def terms(params, batch):
        sums = train.objectives.with_router(objective)(model, params, batch, **options)
        return (sums.objective - objective(model, params, batch, **options).objective) / sums.weight, sums

    def router_logits(params):
        recorded = []

        def apply(*arguments, **named):
            found = model.apply(*arguments, **named, capture_intermediates=lambda module, _: isinstance(module, Router))
            recorded.append(found[1].get("intermediates", {}))
            return found[0]

        recorder = model.clone()
        object.__setattr__(recorder, "apply", apply)
        objective(recorder, params, batch, **options)
        (found,) = [x for x in recorded if jax.tree.leaves(x)]
        return {stack: [x for x in jax.tree.leaves(found[stack]) if x.shape[-1] == 8] for stack in real}

    def direct(params):
        total, found = 0.0, router_logits(params)
        for stack, logits in found.items():
            kept = jnp.concatenate([x[real[stack]] for x in logits])
            scores = jax.nn.softmax(kept)
            chosen = (scores >= jnp.sort(scores)[:, -3:-2]).mean(0)
            total += 0.5 * 8 * (chosen * scores.mean(0)).sum() + 0.25 * (jax.nn.logsumexp(kept, -1) ** 2).mean()
        return total, found

    ours = jax.jit(jax.value_and_grad(terms, has_aux=True))
    (loss, sums), grads = ours(params, batch)
    expected, logits_of = jax.jit(jax.grad(direct, has_aux=True))(params)
    balance = z = 0.0
    for stack, logits in logits_of.items():
        assert logits and all(x.shape[:2] == real[stack].shape for x in logits)
        mask, rows = torch.tensor(real[stack]).long(), [torch.tensor(np.array(x)).reshape(-1, 8) for x in logits]
        balance += modeling_nllb_moe.load_balancing_loss_func(tuple(rows), 8, 3, mask).item()
        kept = torch.cat([x[mask.flatten() > 0] for x in rows])[None]
        z += modeling_switch_transformers.router_z_loss_func(kept).item()
    np.testing.assert_allclose(sums.logged["balance_loss"] / sums.weight, balance, rtol=1e-5)
    np.testing.assert_allclose(sums.logged["router_z_loss"] / sums.weight, z, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * balance + 0.25 * z, rtol=1e-4)

    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), grads, expected)
    assert np.abs(grads["embed"]["embedding"]).max() > 1e-3 * scale
    other = {}  # with other tokens as padding
    for key, x in batch.items():
        kept = real["encoder" if key == "source" else [*real][-1]]
        kept = {"chosen": kept[::2], "rejected": kept[1::2]}.get(key, kept)
        other[key] = np.where(kept, x, 5) if x.dtype == np.int32 and x.shape == kept.shape else x
    assert any((np.asarray(other[key]) != x).any() for key, x in batch.items())
    found = ours(params, other)[0][1].logged
    for metric in ("balance_loss", "router_z_loss", "expert_load"):
        np.testing.assert_allclose(found[metric], sums.logged[metric], rtol=1e-5)


def test_rows_without_tokens_do_not_count_beside_a_trained_prompt():
    model = build(dataclasses.replace(SMALL, moe=MOE))
    params = peft.add(
        parallel.init(model, jax.random.key(0)), configs.PromptTuning(virtual_tokens=4), jax.random.key(1)
    )
    text = padded_batches()["causal_lm"][2]
    more = {name: np.concatenate([x, np.zeros_like(x[:2])]) for name, x in text.items()}
    terms = jax.jit(lambda batch: train.objectives.with_router(train.causal_lm)(model, params, batch).logged)
    for metric, expected in terms(text).items():
        np.testing.assert_allclose(terms(more)[metric], expected, rtol=1e-5)
