"""Steps that train on continuations by the student: whose they are, of what, and where their loss is."""

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import alignment, nn, parallel, tokenizers, train
from nanoflax.config import Config, Distill, DistillChat, ModelConfig, TrainConfig, validate
from nanoflax.errors import UserError
from nanoflax.runs.on_policy import OwnSamples, prompt_lengths

BYTES = tokenizers.load("bytes")
MODEL = nn.build(ModelConfig(vocab_size=260, context=32, layers=1, dim=16, heads=2, tied=False))
MESH = parallel.make_mesh("1,1,1", jax.devices()[:1])
RNG = np.random.default_rng(0)


def certain(seed):
    """Parameters of a student that is certain of every token, so that its samples are its greedy text."""
    params = parallel.init(MODEL, jax.random.PRNGKey(seed))
    return params | {"unembed": {"kernel": params["unembed"]["kernel"] * 1e5}}


def a_batch(weights):
    weights = np.array(weights, np.float32)
    targets = RNG.integers(97, 123, size=weights.shape).astype(np.int32)
    return {"targets": targets, "first": np.full(len(weights), 257, np.int32), "weights": weights}


def test_samples_come_from_the_current_student_and_only_they_are_trained():
    task = Distill(length=32, on_policy=1.0, prompt_length=4, new_tokens=8)
    samples = OwnSamples(Config(task=task, train=TrainConfig(seed=3)), MODEL, MESH, BYTES)
    batch, seen = a_batch([[1] * 12, [1] * 12, [1, 1] + [0] * 10]), []
    step = samples(lambda state, batch: (state, seen.append(jax.tree.map(np.asarray, batch)) or {}), {"teacher": {}})
    for at in (0, 1):
        state = train.TrainState(np.int32(at), certain(at), None, None, None, np.int32(0))
        assert step(state, parallel.put_batch(batch, MESH))[1] == {"on_policy": 1}
        found = seen[-1]
        np.testing.assert_array_equal(found["drawn"], [1, 1, 1])
        for i, prompt in enumerate([4, 4, 2]):  # a text has a token after its prompt
            ids = [257, *batch["targets"][i][: prompt - 1]]
            (new,) = nanoflax.sample(MODEL, certain(at), [ids], 8, temperature=0, eos_id=257, vocab_size=260)
            new += [257] * (len(new) < 8)  # the end is trained
            got = [found["first"][i], *found["targets"][i]]
            assert got[: prompt + len(new)] == ids + new
            expected = np.isin(np.arange(found["targets"].shape[1]), np.arange(prompt - 1, prompt - 1 + len(new)))
            np.testing.assert_array_equal(found["weights"][i], expected)
    assert not np.array_equal(seen[0]["targets"], seen[1]["targets"])


def test_the_share_of_steps_and_their_samples_depend_on_seed_and_step_alone():
    task = Distill(length=32, on_policy=0.4, prompt_length=2, new_tokens=2)
    params, batch = parallel.init(MODEL, jax.random.PRNGKey(0)), parallel.put_batch(a_batch([[1] * 8] * 2), MESH)

    def run(start, steps):
        samples = OwnSamples(Config(task=task, train=TrainConfig(seed=5)), MODEL, MESH, BYTES)
        step, seen = samples(lambda state, batch: (state, seen.append(batch) or {}), {}), []
        state = train.TrainState(np.int32(start), params, None, None, None, np.int32(0))
        drawn = [step(state, batch)[1]["on_policy"] for _ in range(steps)]
        return drawn, [np.asarray(x["targets"]).tolist() for x in seen]

    drawn, seen = run(0, 30)
    assert 6 <= sum(drawn) <= 18
    assert run(20, 10) == (drawn[20:], seen[20:])


def test_the_prompt_of_a_chat_is_all_before_its_last_reply_and_a_long_one_stays_as_it_is():
    task = DistillChat(length=16, on_policy=1.0, new_tokens=8)
    batch = a_batch([[0, 0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1] + [0] * 8, [0] * 8 + [1, 1]])
    np.testing.assert_array_equal(prompt_lengths(batch, None), [7, 1, 9])
    samples = OwnSamples(Config(task=task), MODEL, MESH, BYTES)
    found = samples.completed(certain(0), batch, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(found["drawn"], [1, 1, 0])
    np.testing.assert_array_equal(found["targets"][2, :10], batch["targets"][2])
    np.testing.assert_array_equal(found["weights"][2, :10], batch["weights"][2])
    np.testing.assert_array_equal(found["targets"][0, :6], batch["targets"][0, :6])
    assert not found["weights"][0, :6].any() and found["weights"][0, 6] == 1


def test_rows_by_the_student_have_no_cross_entropy_in_the_objective():
    params = parallel.init(MODEL, jax.random.PRNGKey(0))
    together = params | {"teacher": parallel.init(MODEL, jax.random.PRNGKey(1))}
    batch = a_batch([[1] * 8, [1] * 8])
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
    objective = jax.jit(lambda batch, mix: alignment.distill(MODEL, together, batch, teacher=MODEL, mix=mix).objective)
    found = objective(batch | {"drawn": np.array([1, 0], np.float32)}, 0.5)
    np.testing.assert_allclose(found, objective(rows[0], 0.0) + objective(rows[1], 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    "task, words",
    [
        (Distill(length=64, on_policy=0.5), "task.new_tokens=64 and a prompt of 32 must be at most task.length=64"),
        (DistillChat(length=64, on_policy=0.5), "task.new_tokens=64 and a prompt of 1 must be at most task.length=64"),
        (Distill(on_policy=0.5, packing="best_fit"), "task.on_policy=0.5 does not work with task.packing='best_fit'"),
        (Distill(on_policy=1.5), "task.on_policy=1.5 must be in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(task, words):
    with pytest.raises(UserError, match=words):
        validate(Config(task=task))
