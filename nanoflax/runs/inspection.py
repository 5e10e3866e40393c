"""What the rows of a step read: their source and place in it, and the arrays that the model gets."""

import abc
import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from nanoflax import config as configs
from nanoflax import data, parallel, tasks
from nanoflax.config import Config, Pretrain
from nanoflax.runs import checkpoint, remote
from nanoflax.runs.directory import check_same_data, is_run
from nanoflax.runs.finetune import check as check_finetune
from nanoflax.runs.finetune import encode_examples, fingerprint, start_with_examples, with_arguments
from nanoflax.runs.opening import open_initial
from nanoflax.runs.pretrain import check as check_pretrain
from nanoflax.runs.pretrain import check_sources, with_mixture_file
from nanoflax.runs.start import texts_of
from nanoflax.runs.text_data import (
    prepare_split,
    reading_lines,
    store_lines,
    text_tokenizer,
    training_batches,
    training_fingerprint,
)

MOST_LENGTHS = 200_000  # documents whose lengths are read, evenly spread over a store
EXCERPT = 48  # tokens of a row whose text is shown


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What one row of a batch reads.

    row: its number in the batch of all processes. epoch: how often its source was read completely before.
    numbers: of a text its window, its first and its last document; else of the examples. place: the same for people.
    text: the beginning of what is read.
    """

    row: int
    source: str
    epoch: int
    numbers: tuple[int, ...]
    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class Inspection(abc.ABC):
    """The training data of a run: batches[step] is what training reads at this step, with the rows of all processes.

    lines: the size of the data, and what is wrong in it. labels: the names of the classes. limit: the largest number
    of tokens in a row. unit: what the numbers of rows count.
    """

    config: Config
    tokenizer: Any
    batches: Any
    lines: list[str]
    limit: int
    labels: tuple[str, ...] = ()
    unit: str = "documents"

    @abc.abstractmethod
    def rows(self, step: int) -> list[RowFacts]:
        """The facts of each row of batches[step], in order."""

    @abc.abstractmethod
    def lengths(self) -> dict[str, Int[np.ndarray, " documents"]]:
        """The lengths of documents or examples in tokens, by the name of their source."""

    def shares(self) -> tuple[list[int], dict[str, list[float]]]:
        """The shares of the rows that read each source in each stage, with the first step of each stage and, last, the
        end of the run; ([], {}) without a mixture."""
        return [], {}

    def show(self, step: int, row: int) -> list[str]:
        """Lines that show one row of batches[step] as the model gets it."""
        return tasks.show_batch_row(self.batches[step], row, self.tokenizer, self.labels)


class TextInspection(Inspection):
    """Of a pretraining."""

    def rows(self, step: int) -> list[RowFacts]:
        batches, targets, found = self.batches, self.batches[step]["targets"], []
        for row, described in enumerate(batches.describe(step)):
            if isinstance(batches, data.Mixture):
                source, window, begin, end = described
                epoch = batches.places(step)[row][1]  # `batches` has all rows
            else:
                source, (window, begin, end) = self.config.data.train, described
                epoch = batches.places(step)[row][0]
            documents = f"documents {begin:,} to {end:,}" if end > begin else f"document {begin:,}"
            text = self.tokenizer.decode(targets[row][:EXCERPT].tolist())
            place = f"window {window:,}, {documents}"
            found.append(RowFacts(row, source, epoch, (window, begin, end), place, text))
        return found

    def lengths(self) -> dict[str, Int[np.ndarray, " documents"]]:
        """Of large sources an even sample."""
        if isinstance(self.batches, data.Mixture):
            return {name: _lengths(windows.store) for name, windows in self.batches.windows.items()}
        return {self.config.data.train: _lengths(self.batches.windows.store)}

    def shares(self) -> tuple[list[int], dict[str, list[float]]]:
        if not isinstance(self.batches, data.Mixture):
            return [], {}
        stages = self.batches.stages
        steps = [*(stage.step for stage in stages), self.config.train.steps]
        return steps, {n: [stage.counts.get(n, 0) / stage.block for stage in stages] for n in self.batches.names}


class ExampleInspection(Inspection):
    """Of a fine-tuning."""

    def rows(self, step: int) -> list[RowFacts]:
        found, examples = [], self.batches.rows.examples
        for row, (epoch, numbers) in enumerate(self.batches.reads(step)):
            places = [examples[i].place or f"example {i:,}" for i in numbers]
            place = ", ".join(places[:3]) + f" and {len(places) - 3} more" * (len(places) > 3)
            text = next(texts_of([examples[numbers[0]]]), "")
            found.append(RowFacts(row, self.config.data.train, epoch, tuple(numbers), place, text))
        return found

    def lengths(self) -> dict[str, Int[np.ndarray, " documents"]]:
        rows = self.batches.rows
        return {self.config.data.train: np.array([rows.n_tokens(i) for i in range(len(rows))])}


def _lengths(store: data.TokenStore) -> Int[np.ndarray, " documents"]:
    n = store.n_documents
    documents = np.arange(n) if n <= MOST_LENGTHS else np.linspace(0, n - 1, MOST_LENGTHS).astype(np.int64)
    return store.begin(documents + 1) - store.begin(documents)


def inspect_data(config: Config, workdir: str = "") -> Inspection:
    """The training data of a Config, read as `pretrain` or `finetune` reads it in workdir; nothing is trained.

    The tokens of a text come from the cache, or are written there. A run in workdir gives its tokenizer.
    Raises: UserError for a mistake of the user, or if the data are not those that the run in workdir was trained on.
    """
    inspect = _inspect_text if isinstance(config.task, Pretrain) else _inspect_examples
    return inspect(config, remote.local_copy(workdir) if workdir else os.devnull)  # "" would be the current directory


def _inspect_text(config: Config, workdir: str) -> Inspection:
    config = with_mixture_file(config)
    check_pretrain(config)
    check_sources(config)
    if config.model.init_from:
        initial = open_initial(config.model)
        tokenizer = initial.tokenizer
        config = dataclasses.replace(config, model=dataclasses.replace(initial.config, head="lm"))
    else:
        tokenizer = text_tokenizer(config, workdir)
    config, _ = configs.with_recipe(config)
    stores = prepare_split(config, tokenizer, "train")
    batches, lines = training_batches(config, stores), store_lines(stores, "training")
    _check_same(workdir, tokenizer, training_fingerprint(batches))
    lines += reading_lines(batches, config)
    return TextInspection(config, tokenizer, batches, lines, config.window)


def _inspect_examples(config: Config, workdir: str) -> Inspection:
    config = with_arguments(config, None, None, None, None, None)
    check_finetune(config)
    # The mesh only matters for the padding of the vocabulary, which no token of the data is in.
    start, examples, _ = start_with_examples(config, workdir, parallel.make_mesh("1,1,1", jax.devices()[:1]))
    rows, _, lines = encode_examples(start.config, start.tokenizer, examples)
    _check_same(workdir, start.tokenizer, fingerprint(examples.train))
    batches = tasks.training_batches(rows, start.config)
    if isinstance(batches, tasks.PackedBatches):
        lines.append(batches.summary(start.config.train.steps))
    limit = max(tasks.length_limits(start.config.task).values())
    return ExampleInspection(start.config, start.tokenizer, batches, lines, limit, examples.labels, "examples")


def _check_same(workdir: str, tokenizer: Any, fingerprint: str) -> None:
    """Raises: UserError if the run in workdir, if any, was trained on other data."""
    checkpoints = os.path.join(workdir, "checkpoints")
    if is_run(workdir) and (saved := checkpoint.list_steps(checkpoints)):
        meta = checkpoint.read_metadata(checkpoints, saved[-1])
        identity = {"tokenizer": tokenizer.fingerprint, "data": fingerprint}
        check_same_data({name: meta.get(name, value) for name, value in identity.items()}, identity)
