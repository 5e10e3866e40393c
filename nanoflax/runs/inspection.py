"""What the rows of a step read: their source, window and documents, and the arrays that the model gets."""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax import config as configs
from nanoflax import data, tasks
from nanoflax.config import Config, TextData
from nanoflax.runs import checkpoint
from nanoflax.runs.directory import check_same_data, is_run
from nanoflax.runs.opening import open_initial
from nanoflax.runs.pretrain import check, prepare_split, store_lines, training_batches
from nanoflax.runs.vocabulary import get_tokenizer

MOST_LENGTHS = 200_000  # documents whose lengths are read, evenly spread over a store
EXCERPT = 48  # tokens of a row whose text is shown


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What one row of a batch reads.

    row: its number in the batch of all processes. epoch: how often its source was read completely before.
    window: its number in the source. documents: the numbers of the first and the last one in the window.
    text: the beginning of what the row predicts.
    """

    row: int
    source: str
    epoch: int
    window: int
    documents: tuple[int, int]
    text: str

    @property
    def place(self) -> str:
        first, last = self.documents
        documents = f"documents {first:,} to {last:,}" if last > first else f"document {first:,}"
        return f"window {self.window:,}, {documents}"


@dataclasses.dataclass(frozen=True)
class TextInspection:
    """The training data of a pretraining: batches[step] is what training reads, with all rows.

    lines: the size of the data, and what is wrong in it.
    """

    config: Config
    tokenizer: Any
    batches: data.Batches
    lines: list[str]
    labels: tuple[str, ...] = ()

    def rows(self, step: int) -> list[RowFacts]:
        """The facts of each row of batches[step], in order."""
        targets, n = self.batches[step]["targets"], len(self.batches.windows)
        first = step * self.batches.batch_size
        return [
            RowFacts(row, self.config.data.train, (first + row) // n, window, (begin, end), self._excerpt(targets[row]))
            for row, (window, begin, end) in enumerate(self.batches.describe(step))
        ]

    def lengths(self) -> dict[str, Int[np.ndarray, " documents"]]:
        """The lengths of documents in tokens, by the name of their source; of large sources an even sample."""
        return {self.config.data.train: _lengths(self.batches.windows.store)}

    def show(self, step: int, row: int) -> list[str]:
        """Lines that show one row of batches[step] as the model gets it."""
        return tasks.show_batch_row(self.batches[step], row, self.tokenizer, self.labels)

    def _excerpt(self, ids: Int[np.ndarray, " T"]) -> str:
        return self.tokenizer.decode(ids[:EXCERPT].tolist())


def _lengths(store: data.TokenStore) -> Int[np.ndarray, " documents"]:
    n = store.n_documents
    documents = np.arange(n) if n <= MOST_LENGTHS else np.linspace(0, n - 1, MOST_LENGTHS).astype(np.int64)
    return store.begin(documents + 1) - store.begin(documents)


def inspect_data(config: Config, workdir: str = "") -> TextInspection:
    """The training data of a Config, read as `pretrain` reads it in workdir; nothing is trained.

    The tokens come from the cache, or are written there. A run in workdir gives its tokenizer.
    Raises: UserError for a mistake of the user, or if the data are not those that the run in workdir was trained on.
    """
    check(config)
    assert isinstance(config.data, TextData)  # see pretrain.check
    source = data.source_of(config.data)
    data.source_version(source)  # raises UserError for missing files
    initial = open_initial(config.model) if config.model.init_from else None
    if initial:
        model = dataclasses.replace(initial.config, head="lm")
        config = dataclasses.replace(config, model=model)
        tokenizer = initial.tokenizer
    else:
        no_run = os.devnull  # "" would be the current directory
        tokenizer = get_tokenizer(config.data, workdir or no_run, lambda: data.documents(source, "train"))
    config, _ = configs.with_recipe(config)
    store = prepare_split(config, tokenizer, source, "train")
    if (
        workdir
        and is_run(workdir)
        and (saved := checkpoint.list_steps(checkpoints := os.path.join(workdir, "checkpoints")))
    ):
        meta = checkpoint.read_metadata(checkpoints, saved[-1])
        identity = {"tokenizer": tokenizer.fingerprint, "data": store.fingerprint}
        check_same_data({name: meta.get(name, value) for name, value in identity.items()}, identity)
    lines = store_lines(store, "training")
    return TextInspection(config, tokenizer, training_batches(config, store), lines)
