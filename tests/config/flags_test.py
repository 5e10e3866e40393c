"""Flags of the configuration: kinds, their fields in any order, and help."""

import os
import pathlib
import subprocess
import sys

import pytest

from nanoflax import config as cfg
from nanoflax.config import fields
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = [path.stem for path in sorted((ROOT / "experiments").glob("*.py")) if "def main()" in path.read_text()]
CODE = """
import sys
from experiments.flags import launch, parsed_config
from nanoflax.config import ExampleData
launch(lambda: print(parsed_config()), "classify", data=ExampleData)
"""
ENVIRONMENT = os.environ | processes.HUGE_PAGES


def run(*command):
    return processes.run(command, env=ENVIRONMENT)


def parsed(*flags):
    return run("-c", CODE, *flags)


def test_kinds_are_chosen_wherever_their_flag_stands():
    done = parsed(
        "--config.task.beams=2", "--config.peft.rank=4", "--config.task.kind=translate", "--config.peft.kind=dora"
    )
    assert done.returncode == 0, done.stderr
    # The length is that of the file; it is a field of both kinds.
    task, peft = cfg.Translate(length=128, beams=2), cfg.DoRA(rank=4)
    assert f"task={task!r}" in done.stdout and f"peft={peft!r}" in done.stdout
    assert "data=ExampleData(train='pymodules'" in done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.task.beams=2"], "config.task.beams is a field of task.kind=translate or denoise, not of classify"),
        (["--config.peft.rnk=2"], "did you mean config.peft.rank (of peft.kind=lora, dora or adalora)?"),
        (["--config.peft.kind=dance"], "peft.kind='dance' is not one of none, lora"),
        (["--config.data.kind=text"], "data.kind='text' is not one of examples"),
        (["--config.data.packing=isolated"], "config.data.packing is a field of data.kind=text, not of examples"),
    ],
)
def test_misuse_of_kinds_is_one_line(flags, words):
    done = parsed(*flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_short(program):
    done = run("-m", f"experiments.{program}", "--help")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert 5 < len(done.stdout.splitlines()) < 90 and "--config.model" not in done.stdout.split("Flags:")[1]


def test_full_help_has_every_field_of_every_kind_and_survives_a_closed_pipe():
    done = run("-m", "experiments.finetune", "--helpfull", "--config.peft.kind=lora")
    assert done.returncode == 0, done.stderr
    for section, hint in fields.field_types(cfg.Config).items():
        for cls in fields.kinds(hint).values() or [hint]:
            for name in fields.field_types(cls):
                assert f"  --config.{section}.{name}" in done.stdout
    assert "--config.peft.rank=8" in done.stdout and "--config.task.length=128" in done.stdout
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m experiments.pretrain --helpfull | head -n 1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        text=True,
        env=ENVIRONMENT,
        capture_output=True,
    )
    assert closed.returncode == 0 and closed.stderr == "" and closed.stdout.count("\n") == 1
