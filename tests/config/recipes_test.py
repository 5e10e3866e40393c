"""Defaults of the optimizer: what a run trains decides them, a flag changes each."""

import dataclasses

import pytest

from nanoflax import config as cfg
from nanoflax.config import Config, FullFineTuning, LoRA, ModelConfig, OptimConfig, PrefixTuning, TrainConfig
from nanoflax.errors import UserError
from nanoflax.peft.adalora import adalora_budget
from tests import processes

PUBLISHED = ModelConfig(init_from="a", dim=384)


@pytest.mark.parametrize(
    "model, adapter, recipe",
    [
        (ModelConfig(), FullFineTuning(), "scratch"),
        (ModelConfig(), LoRA(trained="all"), "scratch"),
        (PUBLISHED, FullFineTuning(), "published"),
        (PUBLISHED, FullFineTuning(trained="last:2"), "published"),
        (PUBLISHED, FullFineTuning(trained="head"), "head"),
        (PUBLISHED, FullFineTuning(trained="biases"), "adapters"),
        (PUBLISHED, LoRA(), "adapters"),
        (PUBLISHED, LoRA(trained="adapters,head"), "adapters"),
        (PUBLISHED, PrefixTuning(), "prompts"),
    ],
)
def test_what_is_trained_decides_the_open_fields(model, adapter, recipe):
    config = Config(model=model, peft=adapter, train=TrainConfig(steps=200))
    assert cfg.recipe_of(config) is cfg.RECIPES[recipe]
    filled, line = cfg.with_recipe(config)
    expected = cfg.RECIPES[recipe]
    assert filled.optim.learning_rate == expected.learning_rate
    assert (filled.optim.name, filled.optim.schedule) == (expected.name, expected.schedule)
    assert filled.optim.warmup_steps == 20 and filled.train.batch_size == expected.batch_size
    assert expected.trains in line and f"optim.learning_rate={expected.learning_rate}" in line
    cfg.validate(filled)
    assert cfg.with_recipe(filled) == (filled, "")  # nothing is open any more


def test_the_chosen_batch_is_a_multiple_of_the_micro_batches():
    config = cfg.with_recipe(Config(model=PUBLISHED, train=TrainConfig(accumulate=3)))[0]
    assert config.train.batch_size == 18
    cfg.validate(config)


def test_given_values_stay():
    given = OptimConfig(name="lion", learning_rate=0.0, schedule="wsd", warmup_steps=0, end_factor=0.0)
    config = Config(model=PUBLISHED, optim=given, train=TrainConfig(batch_size=3))
    assert cfg.with_recipe(config) == (config, "")


def test_rates_of_published_models_fall_with_the_width():
    rates = [
        cfg.with_recipe(Config(model=dataclasses.replace(PUBLISHED, dim=dim)))[0].optim.learning_rate
        for dim in (384, 768, 4096)
    ]
    assert rates[0] == 2 * rates[1] and 1e-5 < rates[2] < 3e-5


@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 1), (5, 1), (50, 5), (10**6, 100)])
def test_the_chosen_warmup_is_shorter_than_the_run(steps, warmup):
    config = cfg.with_recipe(Config(train=TrainConfig(steps=steps)))[0]
    assert config.optim.warmup_steps == warmup
    cfg.validate(config)


@pytest.mark.parametrize(
    "steps, given, expected",
    [
        (1, {}, (0, 0)),
        (2, {}, (0, 0)),
        (5, {}, (2, 2)),
        (5, dict(warmup_steps=3), (3, 1)),
        (5, dict(final_steps=0), (4, 0)),
        (201, {}, (100, 100)),
        (5000, {}, (100, 100)),
        (5000, dict(warmup_steps=700, final_steps=0), (700, 0)),
    ],
)
def test_adalora_prunes_in_short_runs_too(steps, given, expected):
    config = Config(model=PUBLISHED, peft=cfg.AdaLoRA(**given), train=TrainConfig(steps=steps))
    cfg.validate(config)
    filled, line = cfg.with_recipe(config)
    assert (filled.peft.warmup_steps, filled.peft.final_steps) == expected
    chosen = [f"peft.{name}={n}" in line for name, n in zip(("warmup_steps", "final_steps"), expected, strict=True)]
    assert chosen == ["warmup_steps" not in given, "final_steps" not in given]
    cfg.validate(filled)
    assert cfg.with_recipe(filled) == (filled, "")
    budget = [int(adalora_budget(step, steps, 80, 10, filled.peft)) for step in range(1, steps + 1)]
    assert budget[-1] == 40 and sorted(budget, reverse=True) == budget


def test_a_given_schedule_of_adalora_that_is_too_long_is_refused():
    config = Config(model=PUBLISHED, peft=cfg.AdaLoRA(warmup_steps=5), train=TrainConfig(steps=5))
    with pytest.raises(UserError, match="peft.warmup_steps=5 and peft.final_steps=0 must leave some of train.steps=5"):
        cfg.validate(config)


PROGRAM = """
from experiments.flags import launch, parsed_config
def main():
    c = parsed_config()
    print(c.optim.name, c.optim.learning_rate, c.optim.warmup_steps, c.train.batch_size)
launch(main, "classify")
"""


def parsed(*flags):
    """What `parsed_config` makes of flags: optimizer, learning rate, warmup and batch size, or the error."""
    done = processes.run(["-c", PROGRAM, *flags])
    return done.stdout.split() or done.stderr


def test_flags_that_change_what_is_trained_open_the_rates_of_the_file():
    assert parsed() == ["None", "0.002", "30", "32"]
    source = "--config.model.init_from=somewhere"
    assert parsed(source) == ["None", "None", "None", "0"]
    assert parsed(source, "--config.optim.learning_rate=3e-4", "--config.train.batch_size=7") == [
        "None", "0.0003", "None", "7"]  # fmt: skip
    assert parsed("--config=tag", source)[0] == "None"  # not muon


def test_a_warmup_of_the_file_is_cut_for_a_short_run_and_one_of_a_flag_is_refused():
    assert parsed("--config.train.steps=5") == ["None", "0.002", "None", "32"]
    assert "optim.warmup_steps=30 must be less than train.steps=5" in parsed(
        "--config.train.steps=5", "--config.optim.warmup_steps=30"
    )


def test_preferences_are_learned_with_a_third_of_the_rate():
    rate = lambda task: cfg.with_recipe(Config(model=PUBLISHED, task=task))[0].optim.learning_rate
    assert rate(cfg.Prefer()) == pytest.approx(rate(cfg.RewardModel()) / 3, rel=0.02)
    assert (
        "preferences, by the parameters of a published model"
        in cfg.with_recipe(Config(model=PUBLISHED, task=cfg.Prefer()))[1]
    )
