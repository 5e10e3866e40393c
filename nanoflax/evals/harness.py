"""Runs tasks of lm-eval on a model, and writes their results as lm-eval does.

result = run_tasks(nanoflax.open("model.gguf"), ["lambada_openai"], limit=100)
"""

import contextlib
import functools
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from nanoflax import storage
from nanoflax.errors import UserError
from nanoflax.evals.adapter import Adapter

# What short messages of lm-eval mean.
_HINTS = {
    "KeyError: None": "a metric of metric_list is unknown to lm-eval",
    "Sample larger than population": "fewer documents than --num_fewshot needs",
}


def as_lm(run: Any, batch_size: int = 16, progress: bool = True) -> Any:
    """A Run as an lm_eval.api.model.LM, for lm_eval.simple_evaluate(model=...).

    Raises: UserError if lm-eval is not installed, or the model writes no text or has no tokenizer.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval ({error}): pip install 'nanoflax[evals]'") from error
    return type("NanoflaxLM", (Adapter, TemplateLM), {})(run, batch_size, progress)


def run_tasks(
    run: Any,
    names: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int = 16,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The result of lm_eval.simple_evaluate for a Run: a dict with `results`, `configs`, `versions`, `n-shot`, ...

    names: tasks, groups or tags of lm-eval, or of the YAML files below include_path. (Such a file may name Python
    functions, which lm-eval runs.) num_fewshot: examples before each question; None: as many as the task says. limit:
    at most this number of documents of each task, or below 1 this share. apply_chat_template, system_instruction: ask
    as a user in a chat. out: a directory for lm-eval's own files, MODEL/results_DATE.json and samples_TASK_DATE.jsonl.
    Raises: UserError for a task that does not exist, cannot be read or is not for text, or for a wrong setting.
    """
    names = [name.strip() for name in names if name.strip()]
    problems = []
    if not names:
        problems.append("--tasks is empty; give names of tasks, separated by commas")
    if include_path is not None and not os.path.isdir(include_path):
        problems.append(f"--include_path={include_path} is not a directory with the YAML files of tasks")
    if num_fewshot is not None and num_fewshot < 0:
        problems.append(f"--num_fewshot={num_fewshot} must be at least 0")
    if limit is not None and not (0 < limit < 1 or limit >= 1 and limit == int(limit)):
        problems.append(f"--limit={limit} must be a number of documents, or a share above 0 and below 1")
    if apply_chat_template and not getattr(run.tokenizer, "chat_template", None):
        problems.append(f"--apply_chat_template: the tokenizer of {run.source} has no chat template")
    if out is not None and storage.is_remote(out):
        problems.append(f"--out={out}: lm-eval writes its files only to a local directory")
    if problems:
        raise UserError("; ".join(problems))
    lm = as_lm(run, batch_size, progress)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=os.fspath(out)) if out else None
    with _quietly(), _mistakes_of_tasks(names):
        result: Any = simple_evaluate(
            model=lm,
            model_args={"path": run.source},
            tasks=[*names],
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit if limit is None or limit < 1 else int(limit),
            log_samples=out is not None,
            evaluation_tracker=tracker,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            task_manager=_task_manager(names, include_path),
        )
    if lm.n_cut:
        print(
            f"{lm.n_cut} contexts were longer than the model's {lm.max_length} tokens: cut on the left", file=sys.stderr
        )
    samples = result.pop("samples", {})
    if out:
        _save(tracker, result, samples, pathlib.Path(out))
    return result


def table(result: dict[str, Any]) -> str:
    """The results of `run_tasks` as lm-eval's table of tasks, and of groups if there are some."""
    from lm_eval.utils import make_table

    return "\n".join([make_table(result), *([make_table(result, "groups")] if result.get("groups") else [])])


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's TaskManager, which refuses a task with one line. Only if lm-eval's own tasks are needed are their
    thousands of files read, which takes seconds."""
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def load(self, names: Any) -> Any:
            if unknown := [name for name in names if name not in self.all_tasks and not {*"*?["} & {*name}]:
                where = (
                    f"--include_path={include_path} nor in lm-eval" if include_path else "lm-eval; see --include_path"
                )
                raise UserError(f"--tasks: {', '.join(unknown)}: not in {where} (`lm-eval ls tasks` lists those)")
            try:
                loaded = super().load(names)
            except Exception as error:  # a YAML file may hold any mistake, and its data set may be out of reach
                raise _mistake(error, names) from error
            for name, task in loaded["tasks"].items():
                if getattr(task, "MULTIMODAL", False):
                    raise UserError(f"--tasks: {name} shows pictures or sounds; nanoflax has models of text")
                if getattr(task, "UNSAFE_CODE", False):
                    raise UserError(f"--tasks: {name} runs code that the model writes, which nanoflax does not do")
            return loaded

    if include_path:
        own = Tasks(include_path=include_path, include_defaults=False)
        if {*names} <= {*own.all_subtasks}:
            return own
    return Tasks(include_path=include_path)


@contextlib.contextmanager
def _mistakes_of_tasks(names: Sequence[str]) -> Iterator[None]:
    """A context in which an error of lm-eval or of a task's templates, columns, metrics and functions becomes one line
    that names the task. An error in nanoflax's own functions, which lm-eval calls, stays as it is.
    Raises: UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
        if any(name.startswith("nanoflax.") and name != __name__ for name in modules):
            raise
        raise _mistake(error, names) from error


def _mistake(error: Exception, names: Sequence[str]) -> UserError:
    """An error of a task in one line with the task's name, or with `names` if no task had been made."""
    from lm_eval.api.task import Task

    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [x.config.task for f in frames for x in (f.get("self"), f.get("task")) if isinstance(x, Task)]
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    hint = next((f" ({hint})" for words, hint in _HINTS.items() if words in said), "")
    return UserError(f"--tasks={[*found, ','.join(names)][0]}: {said}{hint}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A context in which lm-eval shows no bars (it draws one for each small step, and ours shows the time left), prints
    nothing to stdout, and forks no process, which is not safe after JAX has started."""
    from tqdm import tqdm

    draw, forks = tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")
    tqdm.__init__ = functools.partialmethod(draw, disable=True)  # type: ignore  # the same signature
    os.environ["DISABLE_MULTIPROC"] = "1"
    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = draw
        logging.getLogger("lm_eval").setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if forks is not None:
            os.environ["DISABLE_MULTIPROC"] = forks


def _save(tracker: Any, result: dict[str, Any], samples: dict[str, Any], out: pathlib.Path) -> None:
    tracker.save_results_aggregated(results=result, samples=samples)
    for name, found in samples.items():
        tracker.save_results_samples(task_name=name, samples=found)
    folder = out.parent if out.suffix == ".json" else out / str(tracker.general_config_tracker.model_name_sanitized)
    if not any(folder.glob(f"*{tracker.date_id}.json")):  # lm-eval only logs why
        raise UserError(f"--out={out}: the results cannot be written there")
