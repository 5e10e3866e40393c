"""Tokenizing on a cluster: Apache Beam runs `tokenize_part` on any engine that it knows.

The engine gives the numbers of the parts to its workers. They read the source and write the shards themselves, so both
must have the same names on all machines. A part that is tokenized again, after a failure or twice at the same time,
gives the same bytes.
"""

import contextlib
import importlib.util
import io
import logging
import os
import shlex
import threading
from collections.abc import Iterator
from typing import Any

from nanoflax.data.building import Engine
from nanoflax.data.folders import Folder
from nanoflax.data.parts import Plan
from nanoflax.data.tokenizing import missing_parts, record_name, tokenize_part
from nanoflax.errors import UserError
from nanoflax.report import ProgressBar, to_json
from nanoflax.untrusted import json_object


def beam_engine(runner: str, options: str = "", title: str = "") -> Engine:
    """An Engine that tokenizes the missing parts by a pipeline of Apache Beam, https://beam.apache.org.

    runner: a name that Beam knows, such as DirectRunner, FlinkRunner or DataflowRunner. options: of Beam, as on a
    command line: "--flink_master=HOST:8081 --parallelism=64". title: of the progress bar; empty: no bar.
    Raises: UserError for a runner or options that cannot be used.
    """
    checked = _pipeline_options(runner, options)

    def tokenize_parts(directory: str | os.PathLike, plan: Plan, tokenizer: Any) -> None:
        import apache_beam as beam

        numbers = missing_parts(directory, plan, tokenizer)
        if not Folder(directory).is_remote:
            directory = os.path.abspath(directory)  # workers may start elsewhere
        try:
            with _quiet(), _bar(directory, plan, tokenizer, title), beam.Pipeline(options=checked) as pipeline:
                found = pipeline | "parts" >> beam.Create(numbers) | "to all workers" >> beam.Reshuffle()
                _ = found | "tokenize" >> beam.Map(_tokenize, os.fspath(directory), plan, tokenizer)
        except Exception as error:
            raise UserError(f"Beam's {runner} failed: {_last_line(str(error))}") from error
        if missing := missing_parts(directory, plan, tokenizer):
            record = json_object(Folder(directory).read(record_name(missing[0])), record_name(missing[0]))
            raise UserError(str(record["error"]))

    return tokenize_parts


def _tokenize(number: int, directory: str, plan: Plan, tokenizer: Any) -> None:
    try:
        tokenize_part(directory, plan, number, tokenizer)
    except UserError as error:  # engines try again if an error leaves here; this one would return
        Folder(directory).write(record_name(number), to_json({"error": str(error)}).encode())


def _pipeline_options(runner: str, options: str) -> Any:
    if not importlib.util.find_spec("apache_beam"):
        raise UserError('Beam is not installed; run: pip install "nanoflax[beam]"')
    with _quiet(), contextlib.redirect_stderr(io.StringIO()) as printed:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import create_runner

        given = options
        if runner == "DirectRunner" and "log_level" not in options:  # its workers print what they start and stop
            options += " --default_sdk_harness_log_level=ERROR"
        if runner == "DaskRunner":  # Beam knows only its long name, and would give 128 parts to one worker
            runner = "apache_beam.runners.dask.dask_runner.DaskRunner"
            options += " --dask_partition_size=1" if "--dask_npartitions" not in options else ""
        try:
            found = create_runner(runner)
            made = PipelineOptions([f"--runner={runner}", *shlex.split(options)])
            unknown = set(made.get_all_options(retain_unknown_options=True)) - set(made.get_all_options())
        except (Exception, SystemExit) as error:  # argparse prints a mistake and exits
            why = printed.getvalue().strip() or str(error)
            with_options = f" with options {given}" if given else ""
            raise UserError(f"Beam's {runner}{with_options} cannot be used: {_last_line(why)}") from error
    if unknown and any(name in type(found).__module__ for name in (".direct.", ".dask.")):  # others send them on
        raise UserError(f"Beam's {runner} has no option {', '.join(sorted(unknown))}")
    return made


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


NOISY = ("options.pipeline_options", "runners.dask.transform_evaluator", "runners.portability.local_job_service")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of Beam that say nothing to its user, and without the log handler that importing Beam adds."""
    loggers = [logging.getLogger(name) for name in ("distributed", *(f"apache_beam.{name}" for name in NOISY))]
    root, handlers, levels = logging.getLogger(), logging.getLogger().handlers[:], [x.level for x in loggers]
    ignored = lambda record: "apitools not found" not in record.getMessage()
    for handler in handlers:
        handler.addFilter(ignored)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for handler in handlers:
            handler.removeFilter(ignored)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _bar(directory: str | os.PathLike, plan: Plan, tokenizer: Any, title: str) -> Iterator[None]:
    """Shows how many parts are in the directory, whichever engine writes them."""
    if not title:
        yield
        return
    finished = threading.Event()
    with _Parts(title, len(plan.parts)) as bar:

        def watch() -> None:
            while not finished.wait(10.0):
                bar.advance(len(plan.parts) - len(missing_parts(directory, plan, tokenizer)))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
            bar.advance(len(plan.parts))
        finally:
            finished.set()
            thread.join()


class _Parts(ProgressBar):
    quiet = 10.0

    def __init__(self, what: str, parts: int) -> None:
        super().__init__(parts)
        self.what = what

    def title(self) -> str:
        return f"tokenizing {self.what}"

    def status(self) -> str:
        return f"{self.done}/{self.total} parts"
