"""GRPO's objective against trl and against REINFORCE by hand; its advantages and normalisations."""

import collections
import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import alignment, hf, nn, parallel
from nanoflax.alignment import policy
from nanoflax.config import ModelConfig
from nanoflax.tokenizers import pad_left

GROUP, NEW = 4, 7
CONFIG = ModelConfig(
    vocab_size=31, context=32, layers=2, dim=16, heads=2, norm="rmsnorm", gated=True, bias=False, positions="rotary",
    tied=False, norm_eps=1e-6,
)  # fmt: skip
REWARDS = np.array([1, 0, 0.5, 1, 0, 0, 0, 0.25])


@pytest.fixture(scope="module")
def drawn():
    """(model, params, prompts, lengths, completions): two groups of four, drawn by our sampler."""
    model = nn.build(CONFIG)
    params = parallel.init(model, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, params)  # far from uniform
    tokens, lengths = pad_left([[5, 6, 7]] * GROUP + [[8, 9, 10, 11, 12]] * GROUP)
    found = alignment.sample_completions(
        model, params, tokens, lengths, jax.random.PRNGKey(1), max_new_tokens=NEW, eos_ids=(1, 2, 3, 4), temperature=0.9
    )
    assert 0 < found.ended.sum() and len({*found.mask.sum(1).tolist()}) > 1
    return model, params, tokens, lengths, found


def batch_of(drawn, normalization="grpo", scale="group"):
    _, _, tokens, lengths, found = drawn
    return alignment.training_rows(tokens, lengths, found) | {
        "advantages": policy.advantages(REWARDS, GROUP, scale)[0],
        "scale": policy.row_scales(found.mask.sum(1), normalization, NEW),
    }


def value_and_gradient(model, params, batch, **options):
    def mean(params):
        sums = policy.policy_gradient(model, params, batch, temperature=0.9, **options)
        return sums.objective / sums.weight, {name: x / sums.weight for name, x in sums.logged.items()}

    (value, logged), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, logged, gradient


def assert_close(a, b, tolerance=1e-5):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * scale)


@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo"])
def test_the_first_update_is_reinforce_with_the_group_baseline(drawn, normalization):
    """The gradient with respect to the logits is (p - onehot) A w, written in numpy."""
    model, params, tokens, lengths, found = drawn
    value, logged, gradient = value_and_gradient(model, params, batch_of(drawn, normalization, "none"))
    np.testing.assert_allclose(logged["ratio"], 1, atol=1e-5)
    assert logged["mismatch"] < 1e-5 and logged["clipped"] == 0

    ids = np.zeros((len(tokens), 12), np.int32)  # padded on the right
    for i, n in enumerate(lengths):
        ids[i, :n], ids[i, n : n + NEW] = tokens[i, -n:], found.tokens[i]
    logits, back = jax.vjp(jax.jit(lambda p: model.apply({"params": p}, ids)[0]), params)
    x = np.asarray(logits, np.float64) / 0.9
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    cotangent, total = np.zeros_like(x), found.mask.sum()
    for i in range(len(tokens)):
        n, group = int(found.mask[i].sum()), REWARDS.reshape(-1, GROUP)[i // GROUP]
        w = {"grpo": 1 / n / len(tokens), "dr_grpo": 1 / NEW / len(tokens), "dapo": 1 / total}[normalization]
        for t in range(n):
            at = lengths[i] - 1 + t
            cotangent[i, at] = w * (REWARDS[i] - group.mean()) * (p[i, at] - np.eye(31)[found.tokens[i, t]]) / 0.9
    (expected,) = back(jnp.asarray(cotangent, jnp.float32))
    assert_close(gradient, expected)


@pytest.mark.parametrize(
    "normalization, loss_type, beta",
    [("grpo", "grpo", 0.0), ("dr_grpo", "dr_grpo", 0.3), ("dapo", "dapo", 0.0), ("dapo", "bnpo", 0.3)],
)
def test_equals_trl(drawn, tmp_path, normalization, loss_type, beta):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from trl import GRPOTrainer
    from trl.trainer import add_fused_lm_head

    model, params, tokens, lengths, found = drawn
    rng = np.random.default_rng(2)
    mask = found.mask.astype(np.float32)
    old, reference = (
        (found.log_probabilities + s * rng.normal(size=mask.shape).astype(np.float32)) * mask for s in (0.4, 0.2)
    )
    batch = batch_of(drawn, normalization)
    completions = found._replace(log_probabilities=old)
    batch["old"] = alignment.training_rows(tokens, lengths, completions)["old"]
    if beta:
        completions = found._replace(log_probabilities=reference)
        batch["reference"] = alignment.training_rows(tokens, lengths, completions)["old"]
    value, logged, gradient = value_and_gradient(model, params, batch, beta=beta, clip_low=0.2, clip_high=0.28)
    assert 0 < logged["clipped"] < 1

    hf.save(tmp_path / "model", CONFIG, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    add_fused_lm_head(theirs, temperature=0.9, outputs=("log_probs", "entropy"))
    trainer = object.__new__(GRPOTrainer)  # only its loss
    args = types.SimpleNamespace(delta=None, use_bias_correction_kl=False, report_to=[], steps_per_generation=1)
    accelerator = types.SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        is_main_process=True,
        autocast=contextlib.nullcontext,
    )
    vars(trainer).update(
        args=args, accelerator=accelerator, model=theirs.train(), beta=beta, loss_type=loss_type, temperature=0.9,
        epsilon_low=0.2, epsilon_high=0.28, max_completion_length=NEW, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, model_kwarg_keys=set(),
        _metrics={"train": collections.defaultdict(list)}, use_liger_kernel=False,
    )  # fmt: skip
    real = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    tensor = lambda x, kind: torch.tensor(np.asarray(x), dtype=kind)
    loss = trainer._compute_loss(
        theirs,
        {
            "prompt_ids": tensor(tokens, torch.long),
            "prompt_mask": tensor(real, torch.long),
            "completion_ids": tensor(found.tokens, torch.long),
            "completion_mask": tensor(found.mask, torch.long),
            "advantages": tensor(policy.advantages(REWARDS, GROUP)[0], torch.float32),
            "old_per_token_logps": tensor(old, torch.float32),
            "ref_per_token_logps": tensor(reference, torch.float32),
            "num_items_in_batch": tensor(found.mask.sum(), torch.float32),
        },
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5, atol=1e-6)
    if beta:
        np.testing.assert_allclose(logged["kl"], trainer._metrics["train"]["kl"][0], rtol=1e-5)
    np.testing.assert_allclose(logged["entropy"], trainer._metrics["train"]["entropy"][0], rtol=1e-5)
    np.testing.assert_allclose(logged["clipped"], trainer._metrics["train"]["clip_ratio/region_mean"][0], rtol=1e-5)
    loss.backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path / "gradient")
    assert_close(gradient, hf.load(tmp_path / "gradient")[1])


def test_advantages_equal_torch():
    torch = pytest.importorskip("torch")
    grouped = torch.tensor(REWARDS).view(-1, GROUP)
    centred = grouped - grouped.mean(1, keepdim=True)
    expected = {
        "none": centred,
        "group": centred / (grouped.std(1, keepdim=True) + 1e-4),
        "batch": centred / (torch.tensor(REWARDS).std() + 1e-4),
    }
    for scale, values in expected.items():
        got, std = policy.advantages(REWARDS, GROUP, scale)
        np.testing.assert_allclose(got, values.reshape(-1), rtol=1e-6)
        np.testing.assert_allclose(std, grouped.std(1), rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_and_unknown_rewards(scale):
    rewards = np.array([0.1] * 3 + [1, np.nan, 0] + [np.nan, np.nan, 2] + [np.nan] * 3)
    got, std = policy.advantages(rewards, 3, scale)
    assert got[:3].tolist() == [0, 0, 0] and std[0] == 0  # the mean of 0.1, 0.1, 0.1 is rounded
    assert got[4] == 0 and got[3] == -got[5] > 0
    assert not got[6:].any()


def test_a_row_without_weight_counts_in_the_mean_of_rows_only(drawn):
    model, params, *_ = drawn
    batch = batch_of(drawn)
    lengths = batch["weights"].sum(1) * np.array([1, 0, 1, 1, 1, 1, 1, 1])
    batch["weights"] = batch["weights"] * (lengths > 0)[:, None]
    batch["scale"] = policy.row_scales(lengths, "grpo", NEW)
    value, _, _ = value_and_gradient(model, params, batch)
    A = policy.advantages(REWARDS, GROUP)[0]
    np.testing.assert_allclose(value, -(A.sum() - A[1]) / 8, rtol=1e-5)
    nothing = batch | {"weights": np.zeros_like(batch["weights"]), "scale": policy.row_scales(lengths * 0, "grpo", NEW)}
    sums = jax.jit(lambda params: policy.policy_gradient(model, params, nothing))(params)
    assert float(sums.objective) == float(sums.weight) == 0
