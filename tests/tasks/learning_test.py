"""What each task teaches, from examples to the train step: its loss is the published one, no label
is seen before it is asked for, and how a batch is cut changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.utils import class_weight

from nanoflax import parallel, tasks, train
from nanoflax.config import AnyTask, Classify, Config, ModelConfig, OptimConfig, TrainConfig, from_dict, validate
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.tasks import Classification, Tagging
from nanoflax.tasks.kinds import Chat, Pair
from nanoflax.tokenizers import trained
from nanoflax.train import make_optimizer
from tests.compiled import apply

BYTES = trained.ByteTokenizer()
NAMES = ("O", "B-X", "I-X")
RNG = np.random.default_rng(0)
EXAMPLES = {
    "classify": [Classification("text " * (i % 4 + 1), (NAMES[i % 5 % 3],), f"f:{i}") for i in range(24)],
    "tag": [Tagging(("word", "é", "x")[: i % 3 + 1], ("O", "B-X", "I-X")[: i % 3 + 1], f"f:{i}") for i in range(24)],
    "translate": [Pair("ab" * (i % 5 + 1), "t" * (i % 7 + 1), f"f:{i}") for i in range(24)],
    "instruct": [
        Chat(
            ({"role": "user", "content": "q" * (i % 7 + 1)}, {"role": "assistant", "content": "a" * (i % 4 + 1)}),
            f"f:{i}",
        )
        for i in range(24)
    ],
}
SIZES = dict(vocab_size=260, context=48, layers=1, dim=16, heads=2)
MODELS = {
    "classify": ModelConfig(architecture="encoder", head="classify", labels=3, **SIZES),
    "last token": ModelConfig(head="classify", labels=3, **SIZES),
    "tag": ModelConfig(architecture="encoder", head="tag", labels=3, **SIZES),
    "translate": ModelConfig(architecture="encoder_decoder", **SIZES),
    "lstm": ModelConfig(architecture="lstm", **SIZES),
    "instruct": ModelConfig(**SIZES),
}
KIND = {"last token": "classify", "lstm": "translate"}
OBJECTIVES = {"classify": train.classify, "tag": train.tag, "translate": train.seq2seq, "instruct": train.causal_lm}


def rows_of(kind, class_weights=""):
    rows = tasks.encode(EXAMPLES[kind], BYTES, 48, NAMES)
    return tasks.weigh_classes(rows, NAMES, class_weights) if class_weights else rows


def started(name):
    """(objective, model, parameters far from zero)."""
    model = build(MODELS[name])
    params = jax.tree.map(
        lambda x: x + 0.2 * RNG.normal(size=x.shape).astype(np.float32), parallel.init(model, jax.random.PRNGKey(0))
    )
    return OBJECTIVES[KIND.get(name, name)], model, params


@pytest.mark.parametrize("name", ["classify", "last token", "tag"])
@pytest.mark.parametrize("weights", ["O=0.25,I-X=3", "balanced"])
def test_weighted_classes_have_torchs_loss(name, weights):
    kind = KIND.get(name, name)
    rows, plain = rows_of(kind, weights), rows_of(kind)
    objective, model, params = started(name)
    batch, labels = rows.batch(range(20)), plain.batch(range(20))
    logits = apply(model, params, batch["tokens"], batch["padding_mask"])
    targets = np.where(labels["weights"] > 0, labels["label" if kind == "classify" else "tags"], -1)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.array(logits).reshape(-1, 3)),
        torch.tensor(targets.reshape(-1)).long(),
        weight=torch.tensor(rows.class_weights),
        ignore_index=-1,
    )
    sums = objective(model, params, batch)
    np.testing.assert_allclose(sums.objective / sums.weight, expected, rtol=1e-5)
    assert sums.objective == sums.loss and rows.class_weights.std() > 0.1


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_balanced_classes_have_scikit_learns_weights(kind):
    found = [name for e in EXAMPLES[kind] for name in (e.labels if kind == "classify" else e.tags)]
    expected = class_weight.compute_class_weight("balanced", classes=np.array(NAMES), y=found)
    np.testing.assert_allclose(rows_of(kind, "balanced").class_weights, expected, rtol=1e-6)


def test_bad_class_weights_are_named():
    with pytest.raises(UserError, match="class_weights names B-Y; the classes are O, B-X, I-X"):
        rows_of("tag", "B-Y=2")
    several = tasks.encode([Classification("a", ("O", "B-X"), "f:1")], BYTES, 48, NAMES, True)
    with pytest.raises(UserError, match="does not work with several labels"):
        tasks.weigh_classes(several, NAMES, "balanced")
    for text in ("cat", "cat=", "=2", "cat=-1", "cat=nan", "cat=inf", "cat=1,"):
        with pytest.raises(UserError, match="task.class_weights=.* must be empty, balanced, or"):
            validate(Config(task=Classify(class_weights=text)))
    with pytest.raises(UserError, match="class_weights is a field of task.kind=classify or tag, not of translate"):
        from_dict(AnyTask, {"kind": "translate", "class_weights": "balanced"}, "task")


def test_an_example_is_shown_where_a_mask_is_not_everything():
    assert tasks.show_row(rows_of("instruct"), BYTES) == ("user:\nq<eos>assistant:\n⟦a<eos>⟧")
    assert tasks.show_row(rows_of("tag"), BYTES).startswith("⟦w⟧ord")
    assert tasks.show_row(rows_of("translate"), BYTES) is None
    assert tasks.show_row(rows_of("classify"), BYTES) is None


@pytest.mark.parametrize("name", ["translate", "lstm", "instruct"])
def test_a_prediction_knows_the_tokens_before_it_alone(name):
    objective, model, params = started(name)
    batch = rows_of(KIND.get(name, name)).batch(range(4))
    T = batch["targets"].shape[1]
    at = T // 2
    batch["weights"] = np.zeros_like(batch["weights"])
    batch["weights"][:, at] = 1

    @jax.jit
    def loss(targets):
        return objective(model, params, batch | {"targets": targets})[0]

    first = loss(batch["targets"])
    for t in range(T):
        changed = batch["targets"].copy()
        changed[:, t] = (changed[:, t] + 7) % 250
        assert (loss(changed) != first) == (t <= at), t


def test_a_tag_is_no_input():
    """Neither its own nor its neighbours' tags reach the logits: the loss is linear in them."""
    objective, model, params = started("tag")
    batch = rows_of("tag").batch(range(3))
    logits = apply(model, params, batch["tokens"], batch["padding_mask"])
    for tags in (batch["tags"], (batch["tags"] + 1) % 3):
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits), tags[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            objective(model, params, batch | {"tags": tags})[0], -(logs * batch["weights"]).sum(), rtol=1e-5
        )


def stepped(name, batches, steps, accumulate=1, learning_rate=0.01, optimizer="adamw"):
    """The losses of a run on batches(step), and its last parameters."""
    objective = OBJECTIVES[KIND.get(name, name)]
    B = len(batches(0)["weights"])
    config = Config(
        model=MODELS[name],
        train=TrainConfig(steps=steps, batch_size=B, accumulate=accumulate, sample_tokens=0),
        optim=OptimConfig(
            name=optimizer, learning_rate=learning_rate, warmup_steps=0, schedule="constant", weight_decay=0.0
        ),
    )
    model, mesh = build(config.model), parallel.make_mesh("1,1,1", jax.devices()[:1])
    tx, _ = make_optimizer(config.optim, steps)
    state = train.init_state(model, tx, config, mesh)
    step = train.jit_step(train.make_train_step(model, tx, config, objective), state, mesh)
    losses = []
    for i in range(steps):
        state, metrics = step(state, batches(i))
        losses.append(float(metrics["loss"]))
    return losses, state.params


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_equals_the_whole_batch(name):
    kind = KIND.get(name, name)
    rows = rows_of(kind, "O=0.25,I-X=3" if kind in ("classify", "tag") else "")
    batch = rows.batch([1, 2, 3, 4, 5, 6, 10**6, 10**6])  # the last micro-batch has no weight
    assert len(set(batch["weights"].reshape(8, -1).sum(1))) > 2
    whole, parts = (stepped(name, lambda i: batch, 2, n, 0.5, "sgd") for n in (1, 4))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole[1], parts[1])


LETTERS, LENGTH = 4, 8


def sequences(name, rule):
    """A function from a step to a batch of new sequences of a few letters, whose labels follow from
    their inputs by a rule, or are drawn."""

    def batch(step):
        rng = np.random.default_rng(step)
        drawn = rng.integers(0, LETTERS, (2, 16, LENGTH)).astype(np.int32)
        source, ones = drawn[0], np.ones((16, LENGTH), np.float32)
        labels = (source + 1) % LETTERS if rule else drawn[1]
        if name == "tag":
            return {"tokens": source, "padding_mask": ones > 0, "tags": labels % 3, "weights": ones}
        if rule:  # each token is the one before it and one
            labels = (source[:, :1] + np.arange(1, LENGTH + 1, dtype=np.int32)) % LETTERS
        if name == "instruct":
            return {"first": source[:, 0], "targets": labels, "weights": ones}
        source = np.repeat(source[:, :1], LENGTH, axis=1)
        return {"source": source, "source_mask": ones > 0, "targets": labels, "weights": ones}

    return batch


@pytest.mark.parametrize("name", ["tag", "translate", "instruct"])
def test_what_follows_is_learnt_and_what_does_not_is_not(name):
    steps, least = 150, np.log(3 if name == "tag" else LETTERS)
    learnt, _ = stepped(name, sequences(name, True), steps)
    assert np.mean(learnt[-10:]) < 0.1
    drawn, _ = stepped(name, sequences(name, False), steps)
    # 4 letters over 3 tags: one of them is drawn half of the time.
    least = -(0.5 * np.log(0.5) + 0.5 * np.log(0.25)) if name == "tag" else least
    assert np.mean(drawn[-50:]) > least - 0.02
