"""The train step as a function, and the loop around it with everything else faked."""

import contextlib
import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import parallel, train
from nanoflax.config import OPTIMIZERS, AdaLoRA, Config, ModelConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.train import loop, step
from nanoflax.train.loop import Outcome
from tests.closeness import assert_trees_close

B, T, V = 8, 12, 23


def config_of(model=None, optimizer=None, **fields):
    return Config(
        model=ModelConfig(**dict(vocab_size=V, context=T, layers=1, dim=16, heads=2) | (model or {})),
        optim=OptimConfig(**dict(name="sgd", learning_rate=0.1, warmup_steps=0, b1=0.9) | (optimizer or {})),
        train=TrainConfig(**dict(steps=4, batch_size=B) | fields),
    )


def batch_of(i=0, rows=B):
    """Targets of a simple rule, so that training lowers the loss; uneven weights."""
    rng = np.random.default_rng(i)
    start = rng.integers(0, V, rows)
    tokens = (start[:, None] + np.arange(T + 1)[None] * rng.integers(1, 3, (rows, 1))) % V
    lengths = rng.integers(1, T + 1, rows)
    return {
        "targets": tokens[:, 1:].astype(np.int32),
        "first": tokens[:, 0].astype(np.int32),
        "weights": (np.arange(T)[None] < lengths[:, None]).astype(np.float32),
    }


def prepare(config, objective=train.causal_lm):
    """(compiled step, fresh state, mesh) of a configuration."""
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    model = build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state = train.init_state(model, optimizer, config, mesh)
    batch = parallel.put_batch(batch_of(rows=config.train.batch_size), mesh)
    step = train.compile_step(train.make_train_step(model, optimizer, config, objective), state, batch, mesh)
    return step, state, mesh


def run(config, batches, objective=train.causal_lm):
    """(the metrics of each step, the last state), on the host."""
    step, state, mesh = prepare(config, objective)
    metrics = []
    for batch in batches:
        state, m = step(state, parallel.put_batch(batch, mesh))
        metrics.append(jax.device_get(m))
    return metrics, jax.device_get(state)


def assert_metrics_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), a, b)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_accumulation_changes_nothing(pieces):
    options = dict(z_loss=1e-3, label_smoothing=0.1)
    whole, state = run(config_of(**options), map(batch_of, range(2)))
    parts, other = run(config_of(accumulate=pieces, **options), map(batch_of, range(2)))
    assert_metrics_close(whole, parts)
    assert_trees_close(other.params, state.params)
    assert np.abs(state.params["decoder"]["norm"]["scale"] - 1).max() > 1e-4


@pytest.mark.filterwarnings("error:.*deprecated")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_calls_nothing_deprecated(name):
    config = config_of(optimizer={"name": name})
    model = build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 4)
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    jax.eval_shape(
        train.make_train_step(model, optimizer, config),
        train.abstract_state(model, optimizer, config, mesh),
        batch_of(),
    )


def test_the_loss_is_a_mean_over_target_tokens():
    batch = batch_of()
    (metrics,), _ = run(config_of(), [batch])
    assert metrics["tokens"] == batch["weights"].sum()
    # Uniform guessing at the start, whatever the weights are.
    assert metrics["loss"] == pytest.approx(np.log(V), abs=0.1)


def test_rows_of_weight_0_change_nothing():
    batch, config = batch_of(), config_of(accumulate=2)
    batch["weights"][[1, 4]] = 0
    other = {k: v.copy() for k, v in batch.items()}
    other["targets"][[1, 4]] = 0
    other["first"][[1, 4]] = 5
    (a,), state = run(config, [batch])
    (b,), changed = run(config, [other])
    assert_same_bits((a, state), (b, changed))
    # And a batch without those rows is the same step.
    without = {k: np.delete(v, [1, 4], 0) for k, v in batch.items()}
    (c,), fewer = run(config_of(batch_size=6), [without])
    assert_metrics_close(a, c)
    assert_trees_close(fewer.params, state.params)


def test_a_batch_of_padding_alone_is_harmless():
    batch = batch_of() | {"weights": np.zeros((B, T), np.float32)}
    (metrics,), state = run(config_of(optimizer={"weight_decay": 0.0}), [batch])
    assert metrics["loss"] == 0 and metrics["skipped"] == 0
    assert_same_bits(state.params, jax.device_get(prepare(config_of())[1]).params)


def spoiled(where):
    """causal_lm, but a batch whose first token is 22 has a NaN loss, or only a NaN gradient."""

    def objective(model, params, batch, rng=None, **options):
        sums = train.causal_lm(model, params, batch, rng, **options)
        bad = batch["first"][0] == 22
        if where == "loss":
            return sums._replace(objective=jnp.where(bad, jnp.inf, sums.objective))
        # sqrt(0 * x) is 0 and its gradient NaN: the loss alone would not show it.
        root = jnp.sqrt(jnp.where(bad, 0.0, 1.0) * params["decoder"]["norm"]["scale"][0])
        return sums._replace(objective=sums.objective + root)

    return objective


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_non_finite_step_is_skipped_to_the_bit_and_counted(where, name):
    config = config_of(optimizer={"name": name, "ema": 0.9})
    good, bad = batch_of(1), batch_of(2)
    good["first"][0], bad["first"][0] = 3, 22
    step, state, mesh = prepare(config, spoiled(where))
    skipped = []
    for i, batch in enumerate([good, bad, bad, good, bad]):
        before = jax.device_get(state)
        state, metrics = step(state, parallel.put_batch(batch, mesh))
        after = jax.device_get(state)
        skipped.append(int(metrics["skipped"]))
        assert after.step == i + 1 and after.skipped == skipped[-1]
        kept = lambda s: (s.params, s.opt_state, s.ema, s.rng)
        if batch is bad:
            assert_same_bits(kept(before), kept(after))
        else:
            assert (
                np.abs(before.params["decoder"]["norm"]["scale"] - after.params["decoder"]["norm"]["scale"]).max() > 0
            )
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
    assert skipped == [0, 1, 2, 0, 1]


def test_the_same_seed_gives_the_same_run_to_the_bit():
    config = config_of({"dropout": 0.2}, {"name": "adamw"}, accumulate=2)
    batches = lambda: map(batch_of, range(3))
    a, b = run(config, batches()), run(config, batches())
    assert_same_bits(a, b)
    reseeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert run(reseeded, batches())[0][0]["loss"] != a[0][0]["loss"]


def test_dropout_differs_by_step_and_by_micro_batch():
    # With a learning rate of 0 and one batch, only the dropout key can change the loss.
    frozen = {"learning_rate": 0.0}
    same = batch_of()
    metrics, _ = run(config_of({"dropout": 0.3}, frozen), [same] * 3)
    assert len({float(m["loss"]) for m in metrics}) == 3
    metrics, _ = run(config_of({}, frozen), [same] * 3)
    assert len({float(m["loss"]) for m in metrics}) == 1
    # What each micro-batch draws, by giving the others no weight.
    draw = lambda params, micro, rng: jax.random.uniform(rng) * micro["on"].sum()
    drawn = {
        float(step.accumulate(draw, {}, {"on": (np.arange(4) == row) * 1.0}, jax.random.PRNGKey(0), 4))
        for row in range(4)
    }
    assert len(drawn) == 4


def test_ema_is_the_average_of_the_parameters():
    config = config_of(optimizer={"ema": 0.5})
    step, state, mesh = prepare(config)
    expected = jax.device_get(state.params)
    for i in range(4):
        state, _ = step(state, parallel.put_batch(batch_of(i), mesh))
        decay = min(0.5, (1 + i) / (10 + i))  # short runs forget the initial values sooner
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, jax.device_get(state.params))
        assert_trees_close(jax.device_get(state.ema), expected)


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_remat_changes_no_number(remat):
    metrics, state = run(config_of({"dropout": 0.2}), [batch_of()])
    found, other = run(config_of({"dropout": 0.2}, remat=remat), [batch_of()])
    assert_metrics_close(found, metrics)
    assert_trees_close(other, state)


def test_remat_recomputes():
    def products(remat):
        model = build(config_of().model, remat)
        params = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))
        loss = lambda p: model.apply(p, jnp.zeros((2, T), jnp.int32), deterministic=True)[0].sum()
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") < products("dots") <= products("blocks")


def test_training_lowers_the_loss_and_evaluation_sees_it():
    config = config_of(optimizer={"name": "adamw", "learning_rate": 0.01}, steps=40)
    metrics, _ = run(config, map(batch_of, range(40)))
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]


class FakeWindows:
    """Windows 0 .. n, as windows.Windows gives them: beyond the last is padding."""

    def __init__(self, n):
        self.rows = batch_of(7, rows=n)

    def __len__(self):
        return len(self.rows["first"])

    def batch(self, indices):
        real = np.asarray(indices) < len(self)
        taken = np.minimum(indices, len(self) - 1)
        rows = {k: v[taken] for k, v in self.rows.items()}
        return rows | {"weights": rows["weights"] * real[:, None]}


def test_evaluation_counts_every_window_once_whatever_the_batch(compilations):
    windows = FakeWindows(11)
    found = []
    for batch_size in (2, 4, 8):
        config = config_of(batch_size=batch_size)
        _, state, mesh = prepare(config)
        evaluate = train.make_evaluation(build(config.model), config, mesh)
        with compilations() as names:
            found.append(evaluate(state.params, windows))
            evaluate(state.params, windows)
        assert sum("step" in name for name in names) == 1
    np.testing.assert_allclose(found, found[:1] * 3, rtol=1e-6)
    assert found[0][1] == windows.rows["weights"].sum()
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate_batches=1))
    assert (
        train.make_evaluation(build(config.model), few, mesh)(state.params, windows)[1]
        == windows.rows["weights"][:8].sum()
    )


# The loop. `Run` stands for everything around it and remembers what it was told.


class Run:
    tokens_per_second = None

    def __init__(self, validation=()):
        self.validation, self.evaluated, self.seen = list(validation), [], []
        self.saved, self.logged, self.waited, self.losses, self.lost = [], [], False, [], set()
        self.name = "validation_loss"

    def __getitem__(self, step):
        return batch_of(step)

    def describe(self, step):
        return f"windows of step {step}"

    def step(self, state, batch):
        """A fake compiled step: its loss is that of `losses`, if given; None is a NaN."""
        i = int(state.step)
        self.seen.append(i)
        loss = self.losses[i] if i < len(self.losses) else 1.0
        skipped = jnp.int32(0) if loss is not None else state.skipped + 1
        return (
            state._replace(step=state.step + 1, skipped=skipped),
            {"loss": jnp.float32(np.nan if loss is None else loss), "skipped": skipped},
        )

    def evaluate(self, params, step):
        self.evaluated.append(step)
        return {self.name: self.validation.pop(0) if self.validation else 1.0}, "text"

    def save(self, step, state, meta, metric=None):
        assert int(state["step"]) == step == meta["step"]
        self.saved.append((step, meta["position"], meta["tracking"], metric))

    def finish_previous(self, step):
        pass

    def steps(self):
        return [step for step in range(1000) if step not in self.lost]

    def metric(self, step):
        return {step: metric for step, *_, metric in self.saved}.get(step)

    def wait(self):
        self.waited = True

    def log(self, step, **values):
        self.logged.append((step, values))

    def update(self, step, loss, **metrics):
        pass

    def write(self, text):
        pass

    @contextlib.contextmanager
    def pause(self):
        yield

    def fit(self, config, start=0, **options):
        state = train.TrainState(jnp.int32(start), {"x": jnp.zeros(1)}, (), None, jax.random.PRNGKey(0), jnp.int32(0))
        mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
        options = {"step": self.step} | options
        return train.fit(
            state,
            options.pop("step"),
            self,
            config,
            mesh,
            evaluate=self.evaluate,
            checkpoints=self,
            log=self,
            progress=self,
            meta={"who": "me"},
            **options,
        )


def test_the_loop_takes_every_step_and_logs_it_once():
    loop = Run()
    state, tracking, outcome = loop.fit(
        config_of(steps=7, evaluate_every=3, checkpoint_every=2), schedule=lambda step: step / 10
    )
    assert outcome == Outcome("finished", 7) and int(state.step) == 7 and loop.waited
    assert loop.seen == list(range(7))
    assert loop.evaluated == [3, 6, 7]
    trained = [(step, v["learning_rate"]) for step, v in loop.logged if "loss" in v]
    assert trained == [(i + 1, pytest.approx(i / 10)) for i in range(7)]
    assert [step for step, v in loop.logged if "validation_loss" in v] == [3, 6, 7]
    assert [step for step, *_ in loop.saved] == [2, 3, 4, 6, 7]  # 3 is the best so far
    assert [position for _, position, *_ in loop.saved] == [8 * s for s, *_ in loop.saved]
    assert [m for *_, m in loop.saved] == [None, 1.0, None, 1.0, 1.0]


def test_the_loop_goes_on_from_the_step_of_the_state():
    loop = Run()
    before = train.Tracking(0.5, 2, 1)
    _, tracking, outcome = loop.fit(config_of(steps=6, evaluate_every=100), start=4, tracking=before)
    assert loop.seen == [4, 5] and outcome.step == 6
    assert tracking == train.Tracking(0.5, 2, 2)  # 1.0 is not better than 0.5


def test_early_stopping_waits_its_patience_and_names_the_best():
    loop = Run(validation=[3.0, 2.0, 2.5, 1.5, 1.6, 1.7, 0.1])
    _, tracking, outcome = loop.fit(config_of(steps=100, evaluate_every=5, checkpoint_every=1000, patience=2))
    assert outcome == Outcome("early stop", 30)
    assert tracking == train.Tracking(1.5, 20, 2)
    assert [(step, metric) for step, _, _, metric in loop.saved] == [(5, 3.0), (10, 2.0), (20, 1.5), (30, 1.7)]
    assert loop.saved[-1][2] == tracking._asdict()


def test_the_best_step_is_of_the_chosen_metric():
    loop = Run(validation=[0.5, 0.9, 0.7, 0.9])
    loop.name = "accuracy"
    _, tracking, _ = loop.fit(config_of(steps=4, evaluate_every=1, checkpoint_every=1000, metric="accuracy"))
    assert tracking == train.Tracking(-0.9, 2, 2)
    assert [(step, metric) for step, _, _, metric in loop.saved] == [(1, -0.5), (2, -0.9), (4, -0.9)]
    loop = Run(validation=[0.5, 0.9, 0.7, 0.9])
    loop.name = "accuracy"
    assert loop.fit(config_of(steps=4, evaluate_every=1, patience=1, metric="accuracy"))[2] == ("early stop", 3, 0)


def test_adaloras_best_step_has_the_ranks_of_its_budget():
    loop = Run(validation=[1.0, 2.0, 4.0, 3.0])
    config = dataclasses.replace(
        config_of(steps=8, evaluate_every=2, checkpoint_every=1000, patience=1),
        peft=AdaLoRA(final_steps=2, warmup_steps=1),
    )
    _, tracking, outcome = loop.fit(config)
    assert outcome.step == 8 and tracking == train.Tracking(3.0, 8, 0)
    assert [(step, metric) for step, _, _, metric in loop.saved] == [(6, 4.0), (8, 3.0)]


def test_what_earlier_checkpoints_tracked_is_read():
    for tracking in (train.Tracking(-0.5, 3, 2), train.Tracking(-0.5, 3, 2, True)):
        assert train.Tracking.read(tracking._asdict()) == tracking
    pending = train.Tracking(1.0, 3, 2, evaluation_pending=True)._asdict()  # and made since, as its metric says
    assert train.Tracking.read(pending, 5, 0.5) == train.Tracking(0.5, 5)
    assert train.Tracking.read(pending, 5, 2.0) == train.Tracking(1.0, 3, 3)


def test_too_many_non_finite_steps_stop_and_name_the_batch():
    loop = Run()
    loop.losses = [1.0, None, None, 1.0, 1.0, None, None, None, None, 1.0]
    with pytest.raises(UserError) as caught:
        loop.fit(config_of(steps=50, max_skipped=3, checkpoint_every=50, evaluate_every=50))
    assert "3 steps in a row had a non-finite loss" in str(caught.value)
    assert "step 8, read windows of step 7" in str(caught.value)  # steps count from 1
    assert [np.isnan(v["loss"]) for _, v in loop.logged] == [False, True, True, False, False, True, True, True]


def test_fewer_non_finite_steps_go_on():
    loop = Run()
    loop.losses = [None, None, 1.0] * 4
    assert loop.fit(config_of(steps=12, max_skipped=3))[2].reason == "finished"


def test_a_diverged_validation_loss_is_never_the_best():
    loop = Run(validation=[float("nan"), 2.0, float("nan")])
    _, tracking, _ = loop.fit(config_of(steps=3, evaluate_every=1))
    assert tracking == train.Tracking(2.0, 2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(number):
    loop = Run()

    def step(state, batch):
        if int(state.step) == 4:
            os.kill(os.getpid(), number)
        return loop.step(state, batch)

    before = signal.getsignal(number)
    _, _, outcome = loop.fit(config_of(steps=50), step=step)
    assert outcome == Outcome(number.name, 5, number)
    assert [s for s, *_ in loop.saved] == [5] and loop.waited and not loop.evaluated
    assert [s for s, _ in loop.logged] == [1, 2, 3, 4, 5]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("at", [4, 8])
def test_an_evaluation_that_a_signal_came_before_is_done_first(at):
    config = config_of(steps=8, evaluate_every=2, checkpoint_every=1000)
    found = {2: 3.0, 4: 1.0, 6: 2.0, 8: 0.5 if at == 8 else 2.5}
    whole = Run(validation=list(found.values()))
    expected = whole.fit(config)[1]
    assert expected.best_step == at and not expected.evaluation_pending
    before = Run(validation=list(found.values()))

    def step(state, batch):
        if int(state.step) == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before.step(state, batch)

    _, tracking, outcome = before.fit(config, step=step)
    assert outcome.step == at and before.evaluated == [s for s in found if s < at]
    assert tracking.evaluation_pending and before.saved[-1][0::3] == (at, None)
    after = Run(validation=[value for s, value in found.items() if s >= at])
    _, tracking, outcome = after.fit(config, start=at, tracking=train.Tracking.read(before.saved[-1][2]))
    assert tracking == expected and outcome == loop.Outcome("finished", 8)
    assert before.evaluated + after.evaluated == whole.evaluated
    assert before.seen + after.seen == whole.seen
    assert after.saved[0][0::3] == (at, found[at])  # a checkpoint there gets its metric
    assert [s for s, v in after.logged if "validation_loss" in v] == after.evaluated


def test_a_second_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), parallel.Signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("later", [0, 1])
def test_a_second_sigterm_does_not_stop_the_save(later):
    real = os.kill

    class Saving(Run):
        def wait(self):  # the last save is written in the background
            real(os.getpid(), signal.SIGTERM)
            super().wait()

    loop = Saving() if later else Run()

    def step(state, batch):
        if int(state.step) == 4:
            for _ in range(2 - later):
                real(os.getpid(), signal.SIGTERM)
        return loop.step(state, batch)

    _, _, outcome = loop.fit(config_of(steps=50), step=step)
    assert outcome == Outcome("SIGTERM", 5, signal.SIGTERM)
    assert [s for s, *_ in loop.saved] == [5] and loop.waited


def test_an_error_in_the_data_comes_through():
    class Broken(Run):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("disk gone")
            return super().__getitem__(step)

    with pytest.raises(OSError, match="disk gone"):
        Broken().fit(config_of(steps=6))


def test_the_best_step_is_one_that_could_be_saved():
    loop = Run([0.5, 0.1, 0.4, 0.3])
    loop.lost = {2}  # the disk was full
    _, tracking, _ = loop.fit(config_of(steps=4, evaluate_every=1, checkpoint_every=1))
    assert [(saved[2]["best_step"], saved[2]["best"]) for saved in loop.saved] == [
        (1, 0.5),
        (2, 0.1),
        (3, 0.4),
        (4, 0.3),
    ]
    assert tracking.best_step == 4


def test_steps_compile_once(compilations):
    config = config_of({"dropout": 0.1}, {"ema": 0.9}, steps=6, evaluate_every=100)
    step, state, mesh = prepare(config)
    loop = Run()
    options = dict(evaluate=loop.evaluate, checkpoints=loop, log=loop, progress=loop, meta={})
    state, _ = step(state, parallel.put_batch(batch_of(), mesh))
    with compilations() as names:
        state, _, outcome = train.fit(state, step, loop, config, mesh, **options)
    assert outcome.step == 6 and names == []


def test_given_parameters_are_trained_on_and_may_be_bound_to_the_mesh():
    config = config_of(optimizer={"ema": 0.9})
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    model = build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 4)
    params = jax.tree.map(lambda p: p + 1, parallel.init(model, jax.random.PRNGKey(9), mesh))
    expected = jax.device_get(params)
    state = train.init_state(model, optimizer, config, mesh, params)
    assert_same_bits(jax.device_get((state.params, state.ema)), (expected, expected))


def test_abstract_state_is_the_states_shape():
    config = config_of(optimizer={"name": "adamw", "ema": 0.9})
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    optimizer, _ = train.make_optimizer(config.optim, 4)
    model = build(config.model)
    state = train.init_state(model, optimizer, config, mesh)
    abstract = train.abstract_state(model, optimizer, config, mesh)
    described = lambda x: (x.shape, x.dtype, x.sharding)
    assert jax.tree.map(described, abstract) == jax.tree.map(described, state)


SPOILED = (1, 2, 5)  # steps whose gradients are NaN


def moves(optimizer, torch_optimizer=None, **fields):
    """(learning rate of each step, parameters after each step) with gradients that do not depend on the parameters."""
    config = config_of(optimizer=dict(schedule="linear", end_factor=0.1, clip=0.0) | optimizer, steps=8, **fields)
    mesh, model = parallel.make_mesh("1,1,1", jax.devices()[:1]), build(config.model)
    transformation, schedule = train.make_optimizer(config.optim, config.train.steps)
    state = train.init_state(model, transformation, config, mesh)
    draw = lambda path, x: np.random.default_rng(len(str(path))).normal(size=x.shape).astype(np.float32)
    direction = jax.tree_util.tree_map_with_path(draw, jax.device_get(state.params))

    def linear(model, params, batch, rng=None, **_):
        total = sum(jnp.vdot(p, d) for p, d in zip(*map(jax.tree.leaves, (params, direction)), strict=True))
        return train.Sums(total * batch["factor"].sum(), jnp.float32(0), jnp.float32(len(batch["factor"])))

    step = jax.jit(train.make_train_step(model, transformation, config, linear))
    leaves = lambda: [np.array(p) for p in jax.tree.leaves(state.params)]
    found, rates, oracle = [leaves()], [], None
    if torch_optimizer:
        import torch

        theirs = [torch.nn.Parameter(torch.tensor(p)) for p in found[0]]
        oracle = torch_optimizer(theirs)
        decay = torch.optim.lr_scheduler.LambdaLR(oracle, lambda i: float(schedule(i) / schedule(0)))
    for i in range(8):
        factor = np.nan if i in SPOILED else 1 + 0.3 * i
        state, _ = step(state, {"factor": np.full(2, factor, np.float32)})
        found.append(leaves())
        rates.append(float(schedule(i)))
        if oracle:  # as torch.amp.GradScaler: no step of the optimizer, but one of the schedule
            for p, d in zip(theirs, jax.tree.leaves(direction), strict=True):
                p.grad = factor * torch.tensor(d)
            if np.isfinite(factor):
                oracle.step()
            decay.step()
            for p, q in zip(theirs, found[-1], strict=True):
                np.testing.assert_allclose(q, p.detach(), rtol=1e-4, atol=1e-6)
    return rates, found


def test_after_skipped_steps_training_equals_torch_with_its_schedule():
    torch = pytest.importorskip("torch")
    rate = {"learning_rate": 0.1, "weight_decay": 0.0}
    moves({"name": "sgd", "b1": 0.9} | rate, lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True))
    adam = lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.95), 1e-8)
    moves({"name": "adamw", "b1": 0.9, "b2": 0.95, "eps": 1e-8} | rate, adam)


@pytest.mark.parametrize("name, scan_layers", [*((name, False) for name in OPTIMIZERS), ("muon", True)])
def test_the_rate_that_is_logged_moves_the_parameters(name, scan_layers):
    # Updates are proportional to the rate: the same gradients at a constant rate of 1 tell the rate that was used.
    settings = {"name": name, "learning_rate": 1.0, "muon_learning_rate": 1.0, "weight_decay": 0.0, "layer_decay": 0.5}
    fields = {"accumulate": 2, "scan_layers": scan_layers}
    rates, found = moves(settings, **fields)
    _, unit = moves(settings | {"schedule": "constant"}, **fields)
    for i, rate in enumerate(rates):
        for before, after, start, end in zip(found[i], found[i + 1], unit[i], unit[i + 1], strict=True):
            np.testing.assert_allclose(after - before, rate * (end - start), rtol=1e-3, atol=1e-4)
            assert (i in SPOILED) == np.array_equal(before, after)
