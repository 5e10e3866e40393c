"""Flags of the configuration: kinds, their fields in any order, and help."""

import dataclasses
import os
import pathlib
import re
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
        (
            ["--config.task.beams=2"],
            "config.task.beams is a field of task.kind=translate, denoise or grpo, not of classify",
        ),
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


def leaf_fields(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from leaf_fields(type(field.default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def test_every_field_says_what_it_is_with_its_choices_and_default():
    done = run("-m", "experiments.pretrain", "--helpfull")
    entries = re.findall(r"^  --(config\.[\w.]+=.*)\n((?: {8}.*\n)+)", done.stdout, re.M)
    entries = [(name, " ".join(text.split())) for name, text in entries]
    for section, hint in fields.field_types(cfg.Config).items():
        for cls in fields.kinds(hint).values() or [hint]:
            for path, field in leaf_fields(cls):
                name, meta = f"config.{section}.{path}=", field.metadata
                found = [(flag, text) for flag, text in entries if flag.startswith(name)]
                (flag, text), *_ = [(flag, text) for flag, text in found if meta["help"] in text]
                assert len(meta["help"]) > 3 and all(str(choice) or "empty" in text for choice in meta["choices"])
                own = section in ("model", "data", "optim", "train") and (
                    cls is not cfg.ExampleData or path in {f.name for f in dataclasses.fields(cfg.TextData)}
                )
                value = "none" if field.default is None else str(field.default)
                if not own and not isinstance(field.default, (bool, tuple)):  # own ones have the file's values
                    assert flag == name + value, flag
                assert "()" not in flag and "(None" not in flag


def test_output_that_nobody_reads_ends_no_program(tmp_path):
    code = (
        "import sys\n"
        "from experiments.flags import launch\n"
        "def main():\n"
        "    for i in range(50_000):\n"
        "        print(i, flush=i % 100 == 0)\n"
        "        print(i, file=sys.stderr)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "launch(main)\n"
    )
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {tmp_path}/program.py 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "") and (tmp_path / "end").exists()


@pytest.mark.parametrize(
    "program, flag, words",
    [
        ("pretrain", "--steps=5", "--config.train.steps?"),
        ("pretrain", "--config.trian.steps=5", "--config.train.steps?"),
        ("sample", "--max-new-tokens=5", "--max_new_tokens?"),
        ("finetune", "", "--workdir is missing: directory of the run"),
        ("convert", "", "--from is missing: "),
        ("finetune", "--workdir=x --config.data.unicode=NFD", "data.unicode='NFD' is not one of NFC, NFKC, empty"),
    ],
)
def test_a_wrong_or_missing_flag_is_one_line_with_the_nearest(program, flag, words):
    done = run("-m", f"experiments.{program}", *flag.split())
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


INTERRUPTED = {
    "in a callback of the garbage collector": """
def main():
    import gc, time
    def callback(*_):
        gc.callbacks.remove(callback)
        raise KeyboardInterrupt
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)
""",
    "while a module is imported": """
def main():
    import pathlib, sys, tempfile
    with tempfile.TemporaryDirectory() as directory:
        text = "import os, signal\\ntry:\\n os.kill(os.getpid(), signal.SIGINT)\\n for i in range(99): pass\\nexcept: 0"
        pathlib.Path(directory, "swallows.py").write_text(text)
        sys.path.insert(0, directory)
        import swallows
""",
}


def interrupted(code, handler):
    at_start = f"import signal; signal.signal(signal.SIGINT, signal.{handler})"
    code = f"from experiments.flags import launch\n{at_start}\n{code}\nlaunch(main)"
    return processes.run(["-c", code], env=ENVIRONMENT)


@pytest.mark.parametrize("code", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_is_never_lost(code):
    done = interrupted(code, "default_int_handler")
    assert done.returncode == 130 and done.stderr == "\ninterrupted\n"


def test_a_job_in_the_background_of_a_script_is_not_interrupted():
    done = interrupted("def main():\n import os\n os.kill(os.getpid(), signal.SIGINT)", "SIG_IGN")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_is_told_without_jax():
    code = "import runpy, sys; sys.modules['jax'] = None; runpy.run_module('experiments.pretrain', None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--stepss=3"], env=ENVIRONMENT, cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and b"flag --stepss does not exist" in done.stderr and done.stderr.count(b"\n") == 1
