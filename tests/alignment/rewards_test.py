"""Rewards: their values, their failures, and what a generated program cannot do."""

import dataclasses
import math
import sys
import time

import numpy as np
import pytest

from nanoflax.alignment import rewards
from nanoflax.errors import UserError


@dataclasses.dataclass
class Problem:
    prompt: str = "2+2="
    answer: str = "4"


def value(name, completion, **fields):
    return rewards.open_reward(name)([completion], [Problem(**fields)])[0].item()


@pytest.mark.parametrize(
    "name, completion, answer, expected",
    [
        ("exact", " 4\n", "4", 1),
        ("exact", "44", "4", 0),
        (r"regex:#### (-?\d+)", "2 + 2 is\n#### 5\n#### 4", "4", 1),
        (r"regex:#### (-?\d+)", "#### 4\n#### 5", "4", 0),
        (r"regex:-?\d+", "so it is 4.", "4", 1),
        (r"regex:^<a>.*</a>$", "<a>x</a>", "", 1),
        (r"regex:^<a>.*</a>$", "x", "", 0),
    ],
)
def test_values(name, completion, answer, expected):
    assert value(name, completion, answer=answer) == expected


def test_functions_of_modules_and_files(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(completion, problem):\n    return -len(completion)\n")
    assert value(f"python:{file}:short", "abc") == -3
    assert value("python:nanoflax.alignment.rewards:exact", "4") == 1
    assert rewards.name_of(rewards.exact) == "python:nanoflax.alignment.rewards:exact"
    assert rewards.name_of(lambda c, p: 0).startswith("function:")


@pytest.mark.parametrize(
    "name, words",
    [
        ("exakt", "choose exact"),
        ("regex:(", "unterminated"),
        ("regex:", "choose"),
        ("python:no_such_module:f", "no_such_module"),
        ("python:nanoflax.alignment.rewards:missing", "no function 'missing'"),
        ("function:mine", "give finetune the function again"),
    ],
)
def test_bad_names(name, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        rewards.open_reward(name)


def test_failures_are_counted_and_name_function_prompt_and_cause():
    def moody(completion, problem):
        return {
            "raise": lambda: 1 / 0,
            "nan": lambda: math.nan,
            "none": lambda: None,
            "text": lambda: "high",
            "huge": lambda: 10**400,
            "exit": sys.exit,
        }.get(completion, lambda: np.float32(0.5))()

    reward = rewards.Reward("moody", moody)
    given = ["ok", "raise", "nan", "none", "text", "huge", "exit", "ok"]
    values, failures = reward(given, [Problem()] * 8)
    assert np.isnan(values).tolist() == [False, *[True] * 6, False] and values[0] == 0.5
    assert len(failures) == 6 and "returned 1000" in failures[4] and "raised SystemExit" in failures[5]
    assert failures[0] == (
        "the reward moody raised ZeroDivisionError: division by zero for the prompt '2+2=' and the completion 'raise'"
    )
    assert "returned nan" in failures[1] and "returned None" in failures[2] and "returned 'high'" in failures[3]
    with pytest.raises(UserError, match="raised ZeroDivisionError.*none of 2 completions"):
        reward(["raise"] * 2, [Problem()] * 2)


def test_a_function_that_hangs_is_stopped():
    def hangs(completion, problem):
        try:
            while completion == "hang":
                time.sleep(0.01)
        except Exception:
            return 1.0
        return 0.0

    reward = rewards.Reward("hangs", hangs, seconds=0.1)
    values, failures = reward(["a", "hang", "b"], [Problem()] * 3)
    assert np.isnan(values[1]) and values[2] == 0 and "takes more than 0.1 s" in failures[0]
    with pytest.raises(UserError, match="takes more than 0.1 s.*next two"):
        reward(["hang"] * 100, [Problem()] * 100)
    slow = rewards.Reward("slow", rewards.of_pattern("(a+)+$"), seconds=0.2)  # exponential
    begin = time.monotonic()
    assert "takes more" in slow(["a" * 40 + "b", "a"], [Problem()] * 2)[1][0]
    assert time.monotonic() - begin < 5


TESTS = "assert double(3) == 6\nassert double('a') == 'aa'"
GOOD = "def double(x):\n    return 2 * x"


@pytest.mark.parametrize(
    "program, passes",
    [
        (GOOD, 1),
        (f"Here it is:\n```python\n{GOOD}\n```\nDone.", 1),
        (f"import math, re, collections\nprint('x' * 10**7)\n{GOOD}", 1),
        ("def double(x):\n    return x", 0),
        ("def double(x:", 0),
        (f"{GOOD}\nimport sys; sys.exit(0)", 0),
        (f"{GOOD}\nimport os; os._exit(0)", 0),
        (f"{GOOD}\nwhile True: pass", 0),
        (f"{GOOD}\nx = [0] * 10**10", 0),
        (f"{GOOD}\nimport socket; socket.socket()", 0),
        (f"{GOOD}\nimport os; os.system('true')", 0),
        (f"{GOOD}\nopen('x', 'w')", 0),
        (f"{GOOD}\nimport ctypes; ctypes.CDLL(None)", 0),
        (f"{GOOD}\nimport os; os.kill(os.getppid(), 9)", 0),
    ],
    ids=range(14),
)
def test_programs(program, passes):
    reward = rewards.open_reward("tests", seconds=2.0)
    assert reward([program], [Problem(answer=TESTS)])[0].item() == passes


def test_a_program_that_the_completion_continues():
    reward = rewards.open_reward("tests:prompt")
    assert reward(["    return 2 * x"], [Problem("def double(x):\n", TESTS)])[0].item() == 1
