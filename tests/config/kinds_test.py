"""Sections of several kinds: their fields, the change from one kind to another, JSON and the differences."""

import dataclasses

import pytest

from nanoflax import config as cfg
from nanoflax.config import (
    PEFT_KINDS,
    TASK_KINDS,
    Classify,
    Config,
    Denoise,
    ExampleData,
    LoRA,
    MaskedLM,
    PrefixTuning,
    TextData,
    Translate,
    fields,
    from_dict,
    to_dict,
)  # fmt: skip
from nanoflax.errors import UserError


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_every_task_survives_json(kind):
    config = Config(task=TASK_KINDS[kind](), data=ExampleData(limit=3), peft=LoRA(rank=4))
    assert from_dict(Config, to_dict(config)) == config
    assert to_dict(config)["task"]["kind"] == kind


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_every_adapter_is_valid_by_itself(kind):
    cfg.validate(PEFT_KINDS[kind]())


def test_a_section_without_a_kind_is_of_the_default_one():
    assert from_dict(Config, {"data": {"train": "x"}}).data == TextData(train="x")
    assert from_dict(Classify, {"length": 9}, "task") == Classify(length=9)


def test_fields_that_both_kinds_have_keep_their_values():
    old = Translate(length=64, target_length=32, beams=4, max_shift=2)
    assert cfg.as_kind(Denoise, old) == Denoise(length=64, target_length=32, beams=4)
    assert cfg.as_kind(Translate, old) is old
    assert cfg.as_kind(PrefixTuning, LoRA(trained="all")) == PrefixTuning(trained="all")


def test_differences_between_kinds_are_the_kinds_and_what_both_have():
    old, new = Config(task=Classify(length=64)), Config(task=Translate(length=32, beams=2))
    assert cfg.diff(to_dict(old), to_dict(new)) == ["task.kind: 'classify' -> 'translate'", "task.length: 64 -> 32"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"kind": "dance"}, "task.kind='dance' is not one of classify, tag"),
        ({"kind": ["tag"]}, "task.kind=['tag'] is not one of classify, tag"),
        ({"kind": "tag", "beams": 2}, "task.beams is a field of task.kind=translate, denoise or grpo, not of tag"),
        ({"kind": "tag", "nois": 2}, "task.nois does not exist; did you mean task.noise (of task.kind=denoise)?"),
        ({"kind": "tag", "lenght": 2}, "task.lenght does not exist; did you mean task.length?"),
        ({"kind": "pretrain", "qqq": 2}, "task.qqq does not exist"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_kinds(values, words):
    with pytest.raises(UserError) as caught:
        from_dict(cfg.AnyTask, values, "task")
    assert str(caught.value).startswith(words)


def test_a_part_of_a_configuration_is_validated_by_its_name():
    for config, words in [
        (LoRA(rank=0), "peft.rank=0 must be at least 1"),
        (MaskedLM(noise_rate=1.0), "task.noise_rate=1.0 must be in (0, 1)"),
        (MaskedLM(length=2.0), "task.length=2.0 must be an integer"),
        (cfg.GRPO(temperature=1e-40), "task.temperature=1e-40 must be at least 1e-20"),
        (cfg.OptimConfig(clip=-1.0), "optim.clip=-1.0 must be at least 0"),
        (Config(task=LoRA()), "task=LoRA("),
    ]:
        with pytest.raises(UserError) as caught:
            cfg.validate(config)
        assert str(caught.value).startswith(words)


def test_every_field_has_a_help_text():
    for section, hint in fields.field_types(Config).items():
        for cls in fields.kinds(hint).values() or [hint]:
            for field in dataclasses.fields(cls):
                text = fields.describe(field, fields.field_types(cls)[field.name])
                assert len(text.split(" (")[0]) > 8, f"{section}.{field.name}"
