"""The default engine: the parts of a Plan are tokenized by processes of this machine."""

import collections
import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanoflax.data.parts import Plan
from nanoflax.data.tokenizing import Encoded, Progress, encode, missing_parts, tokenize_part
from nanoflax.errors import UserError
from nanoflax.report import ProgressBar, format_bytes, format_count, format_duration
from nanoflax.tokenizers import Segmentation

POOL_FROM = 4  # chunks, or parts; with less text, starting processes takes longer than tokenizing
POOL_BYTES = 4 << 20  # of the missing parts, which are small if a small source is read for many segmentations


class _StoppedError(Exception):
    """The main process wants no more results."""


def tokenize_parts(
    directory: str | os.PathLike, plan: Plan, tokenizer: Any, workers: int | None = None, title: str = ""
) -> None:
    """Writes all parts of a store that are missing, by worker processes (default: one per core).

    Each worker reads and tokenizes a whole part at a time. The parts that remain for the end, fewer than workers, are
    read by this process, and all workers tokenize their chunks. title: of the progress bar; empty: no bar.
    """
    workers, missing = workers or os.cpu_count() or 1, missing_parts(directory, plan, tokenizer)
    is_large = len(missing) >= POOL_FROM and sum(plan.parts[i].size for i in missing) >= POOL_BYTES
    whole = len(missing) - len(missing) % workers if workers > 1 and is_large else 0
    state = _State(len(plan.parts))
    with _bar(plan, missing, state, title) as bar, _Pool(directory, plan, tokenizer, workers, state) as pool:
        pool.tokenize(missing[:whole], bar)
        for number in missing[whole:]:

            def on_progress(progress: Progress, number: int = number) -> None:
                state.set(number, progress)
                bar()

            tokenize_part(directory, plan, number, tokenizer, pool.encode_all, on_progress)


class _State:
    """Numbers that the main process and its workers share without locks, so that a killed worker blocks nobody."""

    def __init__(self, n_parts: int = 0, raw: Any = None) -> None:
        import multiprocessing

        self.raw = multiprocessing.get_context("spawn").RawArray("d", 1 + 3 * n_parts) if raw is None else raw

    @property
    def parts(self) -> np.ndarray:
        """[parts, 3]: share, bytes and tokens of each part."""
        return np.frombuffer(self.raw)[1:].reshape(-1, 3)

    def set(self, number: int, progress: Progress) -> None:
        """Raises: _StoppedError after `stop`."""
        self.parts[number] = progress.share, progress.n_bytes, progress.n_tokens
        if self.raw[0]:
            raise _StoppedError

    def stop(self) -> None:
        self.raw[0] = 1


def _start_worker(directory: str | os.PathLike, plan: Plan, tokenizer: Any, raw: Any) -> None:
    import multiprocessing

    global _given, _state
    _given, _state = (directory, plan, tokenizer), _State(raw=raw)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    if parent := multiprocessing.parent_process():  # the worker exits if the parent process is killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(texts: Sequence[str], segmentation: Segmentation | None) -> Encoded:
    return encode(_given[2], texts, segmentation)


def _tokenize_in_worker(number: int) -> None:
    directory, plan, tokenizer = _given
    with contextlib.suppress(_StoppedError):
        tokenize_part(directory, plan, number, tokenizer, on_progress=lambda done: _state.set(number, done))


class _Pool:
    """Worker processes, which start with their first work. Use as a context manager."""

    def __init__(self, directory: str | os.PathLike, plan: Plan, tokenizer: Any, workers: int, state: _State) -> None:
        self._given = directory, plan, tokenizer, state.raw  # a plan can be large: each worker gets it once
        self._tokenizer, self._workers, self._state, self._started = tokenizer, workers, state, None

    def _submit(self, function: Any, *args: Any) -> Any:
        if self._started is None:
            import concurrent.futures
            import multiprocessing

            context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
            self._started = concurrent.futures.ProcessPoolExecutor(self._workers, context, _start_worker, self._given)
        return self._started.submit(function, *args)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        from concurrent.futures.process import BrokenProcessPool

        self._state.stop()
        if self._started:
            self._started.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a tokenizing process died: either there was too little memory, or the program has no "
                "`if __name__ == '__main__':`; workers=1 avoids both problems"
            ) from error

    def tokenize(self, numbers: Sequence[int], bar: Any) -> None:
        """Tokenizes whole parts. Raises what the first failing part raises."""
        import concurrent.futures

        waiting = {self._submit(_tokenize_in_worker, number) for number in numbers}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()
            bar()

    def encode_all(self, chunks: Iterator[list[str]], segmentation: Segmentation | None) -> Iterator[Encoded]:
        """Yields `encode` of each chunk, in order. Worker processes compute it if there are many chunks."""
        head = list(itertools.islice(chunks, POOL_FROM))
        chunks = itertools.chain(head, chunks)
        if self._workers == 1 or len(head) < POOL_FROM:
            yield from (encode(self._tokenizer, chunk, segmentation) for chunk in chunks)
            return
        pending = collections.deque()
        for chunk in chunks:
            pending.append(self._submit(_encode_in_worker, chunk, segmentation))
            if len(pending) > 2 * self._workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _bar(plan: Plan, missing: Sequence[int], state: _State, title: str) -> Iterator[Any]:
    """Gives a function that shows what all processes have done."""
    if not title:
        yield lambda: None
        return
    chosen = {*missing}
    sizes = np.asarray([part.size if i in chosen else 0 for i, part in enumerate(plan.parts)])
    sizes = sizes / max(sizes.sum(), 1)
    with Tokenizing(title) as bar:

        def show(done: float | None = None) -> None:
            share, bar.bytes, bar.tokens = float(sizes @ state.parts[:, 0]), *map(int, state.parts[:, 1:].sum(0))
            bar.advance(min(share, 0.99) if done is None else done)  # not 1: reading ends before tokenizing

        yield show
        show(1.0)


class Tokenizing(ProgressBar):
    """The progress bar of tokenizing. It prints no plain lines in the first ten seconds."""

    quiet = 10.0

    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(1.0, **options)
        self.what, self.bytes, self.tokens = what, 0, 0

    def title(self) -> str:
        return f"tokenizing {self.what}"

    def status(self) -> str:
        seconds = self._clock() - self._begin
        parts = [f"{format_bytes(self.bytes)}, {format_count(self.tokens)} tokens"]
        if seconds > 0 and self.bytes:
            parts.append(f"{format_bytes(self.bytes / seconds)}/s")
        if self.done >= 1:
            parts.append(f"in {format_duration(seconds)}")
        elif self.done > 0:
            parts.append(f"{format_duration(seconds * (1 - self.done) / self.done)} left")
        return "  ".join(parts)
