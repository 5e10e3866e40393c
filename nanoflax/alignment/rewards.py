"""Rewards of completions: exact matches, patterns, a program's tests, functions of the user.

reward = open_reward("exact")
values, failures = reward(completions, problems)
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import runpy
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflax.errors import UserError
from nanoflax.report import printable

Function = Callable[[Any, Any], Any]  # (completion, problem with prompt, answer and extra) -> a finite number
MAX_PROGRAM = 2**20  # bytes of a program and of its tests
MAX_MEMORY = 2**30  # bytes of the process of a program


class Failure(Exception):
    """Why a completion has no reward. late: the function took too long."""

    def __init__(self, message: str, late: bool = False):
        super().__init__(message)
        self.late = late


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function with a time limit.

    Calling it returns (rewards float64, NaN where the function failed; a line for each failure). It fails if it
    raises, returns no finite number, or takes longer than `seconds`.
    Raises: UserError, with the first failure, if it fails for all completions, or takes too long for the first three.
    """

    name: str
    function: Function
    seconds: float = 10.0
    threads: int = 1  # above 1: the function waits for a process with a limit of its own
    takes_all: bool = False  # the function gets lists of all completions and problems, without a time limit
    needs_answer: bool = False  # it has no meaning for a problem without an answer
    continues_prompt: bool = False  # the prompt must be a text

    def __call__(
        self, completions: Sequence[str], problems: Sequence[Any]
    ) -> tuple[Float[np.ndarray, " B"], list[str]]:
        pairs = list(zip(completions, problems, strict=True))
        if self.takes_all:
            found = self.function(list(completions), list(problems))
            found = [
                x if math.isfinite(x) else self._failure(f"returned {x}", *p) for x, p in zip(found, pairs, strict=True)
            ]
        elif self.threads > 1:
            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                found = list(pool.map(lambda pair: self._result(*pair), pairs))
        else:
            found = []
            for pair in pairs:
                found.append(self._result(*pair))
                if len(found) == 3 and all(isinstance(x, Failure) and x.late for x in found):
                    raise UserError(f"{found[0]}, and for the next two; raise task.reward_seconds, or repair it")
        failures = [str(x) for x in found if isinstance(x, Failure)]
        if pairs and len(failures) == len(pairs):
            raise UserError(f"{failures[0]}; it gave none of {len(pairs)} completions a reward")
        return np.array([math.nan if isinstance(x, Failure) else x for x in found], np.float64), failures

    def _result(self, completion: str, problem: Any) -> float | Failure:
        try:
            with contextlib.nullcontext() if self.threads > 1 else time_limit(self.seconds):
                value = self.function(completion, problem)
        except TooLong:
            return self._failure(f"takes more than {self.seconds:g} s", completion, problem, late=True)
        except (Exception, SystemExit) as error:  # of the user's function
            return self._failure(f"raised {type(error).__name__}: {error}", completion, problem)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        return number if math.isfinite(number) else self._failure(f"returned {value!r:.60}", completion, problem)

    def _failure(self, what: str, completion: str, problem: Any, late: bool = False) -> Failure:
        where = f"the prompt {_shortened(problem.prompt)} and the completion {_shortened(completion)}"
        return Failure(f"the reward {self.name} {what} for {where}".replace("\n", " "), late)


def _shortened(value: Any) -> str:
    return printable(repr(value if len(str(value)) <= 80 else str(value)[:80] + "..."))


class TooLong(BaseException):
    """A function took too long. Not an Exception, so that the function's own handlers let it through."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises TooLong after this time. In the main thread only: elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TooLong

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def open_reward(name: str, seconds: float = 10.0) -> Reward:
    """The reward that a configuration names:

    exact: 1 if completion and answer are equal without spaces at their ends, else 0.
    regex:PATTERN: 1 if the last match of the pattern (its first group, if it has groups) is the answer; 1 for any match
      if the problem has no answer.
    tests: 1 if the program in the completion (its last ``` block, or all of it) passes the tests, which are the answer:
      Python statements that raise nothing. tests:prompt: the completion continues the program in the prompt.
    python:MODULE:FUNCTION, python:FILE.py:FUNCTION: the function (completion, problem) -> number.
    Raises: UserError for an unknown name, a bad pattern, or a function that cannot be imported.
    """
    kind, _, rest = name.partition(":")
    if name == "exact":
        return Reward(name, exact, seconds, needs_answer=True)
    if kind == "regex" and rest:
        return Reward(name, of_pattern(rest), seconds)
    if name in ("tests", "tests:prompt"):
        run = lambda completion, problem: passes_tests(completion, problem, seconds, continues=bool(rest))
        threads = max(2, os.cpu_count() or 1)
        return Reward(name, run, seconds, threads, needs_answer=True, continues_prompt=bool(rest))
    if kind == "python" and ":" in rest:
        return Reward(name, _imported(*rest.rsplit(":", 1)), seconds)
    hint = "; it was given from Python: give finetune the function again" if kind == "function" else ""
    raise UserError(
        f"task.reward={name!r} is not known{hint}; choose exact, regex:PATTERN, tests, tests:prompt, "
        "python:MODULE:FUNCTION, python:FILE.py:FUNCTION or model:SOURCE"
    )


def name_of(function: Function) -> str:
    """The name of a function for task.reward: one that `open_reward` finds again, if there is one."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__)
    with contextlib.suppress(Exception):
        if module != "__main__" and getattr(importlib.import_module(module), name) is function:
            return f"python:{module}:{name}"
    return f"function:{name}"


def _imported(place: str, name: str) -> Function:
    try:
        found = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
    except Exception as error:  # any mistake in the user's file
        raise UserError(f"task.reward=python:{place}:{name}: {type(error).__name__}: {error}") from error
    if not callable(found.get(name)):
        known = ", ".join(key for key, value in found.items() if callable(value) and not key.startswith("_"))
        raise UserError(f"task.reward=python:{place}:{name}: there is no function {name!r}, only {known or 'none'}")
    return found[name]


# Rewards.


def exact(completion: str, problem: Any) -> float:
    return float(completion.strip() == problem.answer.strip())


def of_pattern(pattern: str) -> Function:
    """The reward regex:PATTERN. Raises: UserError for a bad pattern."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"task.reward='regex:{pattern}': {error}") from error

    def reward(completion, problem):
        found = [match[1 if compiled.groups else 0] for match in compiled.finditer(completion)]
        if not found:
            return 0.0
        return float(not problem.answer or (found[-1] or "").strip() == problem.answer.strip())

    return reward


_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def passes_tests(completion: str, problem: Any, seconds: float = 10.0, continues: bool = False) -> float:
    """1.0 if the tests in problem.answer pass after the program in the completion has run, else 0.0.

    They run in a process of `alignment.program_process`, with limits of time and memory; it cannot open sockets, start
    programs or write files, and its output is dropped. A program that ends the process early has not passed.
    """
    blocks = _BLOCK.findall(completion)
    program = problem.prompt + completion if continues else blocks[-1] if blocks else completion
    mark = secrets.token_hex(16)
    request = {"program": program, "tests": problem.answer, "mark": mark, "seconds": seconds, "memory": MAX_MEMORY}
    if max(len(program), len(problem.answer)) > MAX_PROGRAM:
        return 0.0
    path = os.path.join(os.path.dirname(__file__), "program_process.py")
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=empty, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            answer, _ = process.communicate(
                json.dumps(request, allow_nan=False).encode("utf-8", "replace"), timeout=seconds + 2
            )
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
    return float(answer == mark.encode())
