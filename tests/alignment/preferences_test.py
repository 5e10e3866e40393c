"""Preference losses and reward models, against trl on the same tiny models and pairs."""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from nanoflax import alignment, hf, parallel, tasks, tokenizers
from nanoflax.alignment import preferences
from nanoflax.config import ModelConfig
from nanoflax.nn import build
from nanoflax.tasks import Preference
from tests.closeness import assert_trees_close

BYTES = tokenizers.ByteTokenizer()
SIZES = dict(vocab_size=BYTES.vocab_size, context=32, layers=2, dim=16, heads=2)
LM = ModelConfig(norm="rmsnorm", activation="silu", gated=True, positions="rotary", bias=False, tied=False, **SIZES)
SCORE = ModelConfig(head="classify", labels=1, class_names=("reward",), **SIZES)
PAIRS = [
    Preference("1+1=", "2", "three", "f:1"),
    Preference("the sky is ", "blue", "a", "f:2", margin=0.5),
    Preference("long prompt, ", "yes", "no", "f:3", margin=1.5),
]
SETTINGS = [
    ("dpo", {"beta": 0.7}, {"loss_type": "sigmoid", "beta": 0.7}),
    ("dpo_norm", {}, {"loss_type": "sigmoid_norm", "beta": 5.0}),
    ("ipo", {"beta": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
    ("robust", {"label_noise": 0.2}, {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.2}),
]


def randomized(config, seed):
    params = parallel.init(build(config), jax.random.PRNGKey(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


def batch_of(scored=False, pad=1):
    """The pairs with rows of padding."""
    rows = tasks.encode(PAIRS, BYTES, 32, scored=scored)
    return rows.batch(range(len(PAIRS) + pad))


def trl_batch(batch):
    """The same without padding rows, in the layout of trl."""
    n, ids = len(PAIRS), {}
    for side in ("chosen", "rejected"):
        ids[side] = np.concatenate([batch["first"][:n, None], batch[side][:n]], 1)
        ids[f"{side}_mask"] = np.concatenate([np.zeros((n, 1)), batch[f"{side}_weights"][:n]], 1)
    both = {name: torch.tensor(np.concatenate([ids[f"chosen{end}"], ids[f"rejected{end}"]])).long()
            for name, end in (("input_ids", ""), ("completion_mask", "_mask"))}  # fmt: skip
    last = both["completion_mask"].cumsum(1) == both["completion_mask"].sum(1, keepdim=True)
    real = ~(last & (both["completion_mask"] == 0))
    return both | {"attention_mask": real.long()}


def published(directory, config, params, kind):
    hf.save(directory, config, params, BYTES)
    return kind.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(our parameters, the model of Transformers) of a policy and of a reference."""
    found = []
    for seed in (0, 1):
        params = randomized(LM, seed)
        path = tmp_path_factory.mktemp("lm")
        found.append((params, published(path, LM, params, transformers.AutoModelForCausalLM)))
    return found


@pytest.fixture(scope="module")
def trainer(models, tmp_path_factory):
    return dpo_trainer(models, tmp_path_factory.mktemp("trl"))


def dpo_trainer(models, directory):
    import datasets
    import trl

    args = trl.DPOConfig(directory, report_to=[], use_cpu=True, max_length=None, bf16=False, disable_dropout=False)
    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[0][1].name_or_path)
    return trl.DPOTrainer(models[0][1], models[1][1], args, train_dataset=data, processing_class=tokenizer)


def with_reference(batch, params):
    found, _ = alignment.answer_log_probabilities(build(LM), params, batch)
    return batch | {"reference_chosen": found[:, 0], "reference_rejected": found[:, 1]}


def torch_gradients(model):
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def our_gradients(grads, config, directory):
    """Our gradients under the names of Transformers."""
    hf.save(directory, config, grads)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("loss, ours, theirs", SETTINGS, ids=lambda x: x if isinstance(x, str) else "")
def test_losses_rewards_and_gradients_are_trls(models, trainer, loss, ours, theirs, tmp_path):
    (params, policy), (reference, _) = models
    batch = with_reference(batch_of(), reference)
    options = {"label_smoothing": 0.0} | theirs
    trainer.loss_types, trainer.beta = [options["loss_type"]], options["beta"]
    trainer.label_smoothing = options["label_smoothing"]
    trainer._metrics["train"].clear()
    policy.train()
    policy.zero_grad()
    expected = trainer._compute_loss(policy, trl_batch(batch), return_outputs=False)
    expected.backward()
    model = build(LM)

    def mean(params):
        sums = alignment.preference(model, params, batch, loss=loss, **ours)
        return sums.objective / sums.weight, sums

    grads, sums = jax.jit(jax.grad(mean, has_aux=True))(params)
    assert sums.loss / sums.weight == pytest.approx(expected.item(), rel=1e-5) and sums.weight == len(PAIRS)
    assert sums.loss == sums.objective
    names = {
        "preference_accuracy": "rewards/accuracies",
        "reward_margin": "rewards/margins",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "log_probability_chosen": "logps/chosen",
        "log_probability_rejected": "logps/rejected",
    }
    assert sums.logged.keys() == names.keys()
    for name, theirs_name in names.items():
        value = trainer._metrics["train"][theirs_name][-1]
        assert sums.logged[name] / sums.weight == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert_trees_close(our_gradients(grads, LM, tmp_path), torch_gradients(policy), 1e-5)


# The losses that trl's DPOTrainer does not have. trl has their formulas in other trainers.


def mean_log_probabilities(policy, rows):
    """[chosen], [rejected]: the mean log-probability of an answer's tokens, by trl."""
    from trl.experimental.orpo import ORPOTrainer

    labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
    logits = policy(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)


def theirs_orpo(policy, rows, beta):
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = mean_log_probabilities(policy, rows)
    return (-chosen - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]).mean()


def theirs_simpo(policy, rows, beta, gamma, noise):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=noise, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, *mean_log_probabilities(policy, rows))[0].mean()


def theirs_conservative(policy, rows, reference, noise):
    """Mitchell 2023, equation 4, and the mean cross entropy of Pang et al. 2024, equation 1."""
    means = torch.stack(mean_log_probabilities(policy, rows), 1)
    counts = torch.stack(rows["completion_mask"].sum(1).chunk(2), 1)
    h = 0.1 * (means * counts - torch.tensor(np.asarray(reference)))
    h = h[:, 0] - h[:, 1]
    right, wrong = torch.nn.functional.logsigmoid(h), torch.nn.functional.logsigmoid(-h)
    return (-(1 - noise) * right - noise * wrong - 0.3 * means[:, 0]).mean()


@pytest.mark.parametrize("loss", ["orpo", "simpo", "dpo"])
def test_losses_that_trl_has_elsewhere(models, loss, tmp_path):
    (params, policy), (reference, _) = models
    batch = with_reference(batch_of(), reference)
    known = np.stack([batch["reference_chosen"], batch["reference_rejected"]], 1)[: len(PAIRS)]
    theirs, ours = {
        "orpo": (lambda rows: theirs_orpo(policy, rows, 0.4), {"beta": 0.4}),
        "simpo": (
            lambda rows: theirs_simpo(policy, rows, 2.5, 0.8, 0.1),
            {"beta": 2.5, "margin": 0.8, "label_noise": 0.1},
        ),
        "dpo": (lambda rows: theirs_conservative(policy, rows, known, 0.15), {"label_noise": 0.15, "nll_weight": 0.3}),
    }[loss]
    policy.zero_grad()
    expected = theirs(trl_batch(batch))
    expected.backward()
    model = build(LM)

    def mean(params):
        sums = alignment.preference(model, params, batch, loss=loss, **ours)
        return sums.objective / sums.weight

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert_trees_close(our_gradients(grads, LM, tmp_path), torch_gradients(policy), 1e-5)


def test_at_its_own_reference_dpo_is_ln_2_and_a_certain_answer_has_finite_odds(models):
    params = models[0][0]
    batch = with_reference(batch_of(), params)
    sums = alignment.preference(build(LM), params, batch)
    assert sums.loss / sums.weight == pytest.approx(np.log(2), abs=1e-6)
    certain = jnp.array([[0.0, -3.0], [-3.0, 0.0]])
    odds = lambda log_p: preferences._pair_losses("orpo", log_p, 0.0, jnp.ones((2, 2)), 0.1, 0.0, 0.0).sum()
    assert all(np.isfinite(x).all() for x in jax.value_and_grad(odds)(certain))


# Reward models.


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_a_reward_model_has_trls_loss_and_gradients(center, tmp_path):
    from trl import RewardTrainer

    params, batch, n = randomized(SCORE, 2), batch_of(scored=True), len(PAIRS)
    model = published(tmp_path / "model", SCORE, params, transformers.AutoModelForSequenceClassification)
    rows = {
        name: torch.tensor(np.concatenate([batch[f"chosen{end}"][:n], batch[f"rejected{end}"][:n]])).long()
        for name, end in (("input_ids", ""), ("attention_mask", "_mask"))
    } | {"margin": torch.tensor(batch["margin"][:n])}
    same = lambda x: x
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    # With a margin the padded texts must have the scores of the single ones, or trl's loss is another.
    without = {name: x for name, x in rows.items() if name != "margin"}
    forward = lambda **inputs: model(**{name: x for name, x in inputs.items() if name != "margin"})
    expected = RewardTrainer.compute_loss(trainer, forward, rows)
    expected.backward()
    assert RewardTrainer.compute_loss(trainer, model, without) != expected

    def mean(params):
        sums = alignment.bradley_terry(build(SCORE), params, batch, center=center)
        return sums.objective / sums.weight, sums

    grads, sums = jax.jit(jax.grad(mean, has_aux=True))(params)
    assert sums.loss / sums.weight == pytest.approx(expected.item(), rel=1e-5) and sums.weight == n
    for name, theirs in {"preference_accuracy": "accuracy", "reward_margin": "margin"}.items():
        assert sums.logged[name] / n == pytest.approx(trainer._metrics["eval"][theirs][0], rel=1e-4)
    mean_reward = (sums.logged["reward_chosen"] + sums.logged["reward_rejected"]) / n / 2
    assert mean_reward == pytest.approx(trainer._metrics["eval"]["mean_reward"][0], rel=1e-4)
    assert_trees_close(our_gradients(grads, SCORE, tmp_path / "grads"), torch_gradients(model), 1e-5)
