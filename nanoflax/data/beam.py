"""Tokenizing on a cluster: Apache Beam runs `tokenize_part` on any engine that it knows.

The engine gives the numbers of the parts to its workers. They read the source and write the shards themselves, so both
must have the same names on all machines. A part that is tokenized again, after a failure or twice at the same time,
gives the same bytes.
"""

import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nanoflax.data.building import Engine
from nanoflax.data.folders import Folder
from nanoflax.data.parts import Plan
from nanoflax.data.tokenizing import missing_parts, record_name, tokenize_part
from nanoflax.errors import UserError
from nanoflax.report import ProgressBar, to_json
from nanoflax.untrusted import json_object


def beam_engine(runner: str, options: Sequence[str] = (), title: str = "") -> Engine:
    """An Engine that tokenizes the missing parts by a pipeline of Apache Beam, https://beam.apache.org.

    runner: a name that Beam knows, such as DirectRunner, FlinkRunner or DataflowRunner. options: of Beam, as on a
    command line: --direct_num_workers=2. title: of the progress bar; empty: no bar.
    Raises: UserError for a runner or options that cannot be used.
    """
    checked = _pipeline_options(runner, options)

    def tokenize_parts(directory: str | os.PathLike, plan: Plan, tokenizer: Any) -> None:
        import apache_beam as beam

        numbers = missing_parts(directory, plan, tokenizer)
        try:
            with _bar(directory, plan, tokenizer, title), beam.Pipeline(options=checked) as pipeline:
                found = pipeline | "parts" >> beam.Create(numbers) | "to all workers" >> beam.Reshuffle()
                _ = found | "tokenize" >> beam.Map(_tokenize, os.fspath(directory), plan, tokenizer)
        except Exception as error:
            raise UserError(f"Beam's {runner} failed: {_last_line(error)}") from error
        if missing := missing_parts(directory, plan, tokenizer):
            record = json_object(Folder(directory).read(record_name(missing[0])), record_name(missing[0]))
            raise UserError(str(record["error"]))

    return tokenize_parts


def _tokenize(number: int, directory: str, plan: Plan, tokenizer: Any) -> None:
    try:
        tokenize_part(directory, plan, number, tokenizer)
    except UserError as error:  # engines try again if an error leaves here; this one would return
        Folder(directory).write(record_name(number), to_json({"error": str(error)}).encode())


def _pipeline_options(runner: str, options: Sequence[str]) -> Any:
    if not importlib.util.find_spec("apache_beam"):
        raise UserError('Beam is not installed; run: pip install "nanoflax[beam]"')
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import create_runner

    if runner.lower() == "daskrunner":  # its short name is unknown to Beam, and it would give 128 parts to one worker
        runner = "apache_beam.runners.dask.dask_runner.DaskRunner"
        options = [*options, *["--dask_partition_size=1"] * ("--dask_npartitions" not in " ".join(options))]
    try:
        found = create_runner(runner)
        made = PipelineOptions([f"--runner={runner}", *options])
        unknown = set(made.get_all_options(retain_unknown_options=True)) - set(made.get_all_options())
    except Exception as error:
        raise UserError(f"Beam has no runner {runner!r} here: {_last_line(error)}") from error
    except SystemExit as error:  # of argparse, which has printed why
        raise UserError(f"Beam refuses its options {' '.join(options)}") from error
    if unknown and any(name in type(found).__module__ for name in (".direct.", ".dask.")):  # others send them on
        raise UserError(f"Beam's {runner} has no option {', '.join(sorted(unknown))}")
    return made


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@contextmanager
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
