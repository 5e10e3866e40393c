"""Where text and examples come from."""

import dataclasses
from typing import ClassVar

from nanoflax.config.fields import field

PACKINGS = ("joined", "isolated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What pretrain and finetune both read."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str]
    train: str = field(
        "pydocs",
        "Training data: pydocs, text:GLOB or tfds:NAME[:FIELD]; for finetune also jsonl:FILE, tsv:FILE, conll:FILE, "
        "pairs:SOURCES,TARGETS, dates:FROM-TO, pytags, pymodules, pychats or bible:FROM-TO.",
    )
    validation: str = field("", "Another source; empty: the split of the data, or else a part of the training data.")
    validation_fraction: float = field(0.05, "Share of documents held out, by a hash of each.", within="(0, 1)")
    tokenizer: str = field("bpe:2048", "bytes, bpe:V, unigram:V, a .model file or a tokenizer directory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """A corpus that becomes windows of tokens, for pretrain."""

    kind: ClassVar[str] = "text"
    window: int = field(0, "Tokens of a training window; 0: model.context.", unit="tokens", at_least=0)
    packing: str = field("joined", "isolated: documents of a window cannot see each other.", choices=PACKINGS)
    workers: int = field(0, "Processes that tokenize; 0: one per core.", at_least=0)
    cache: str = field("", "Directory of the token files; empty: the user's cache directory.")
    # The last, because it hides the function of this name in the class body.
    field: str = field("text", "Field of a JSON line that holds the text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleData(DataConfig):
    """Examples of a task, held in memory, for finetune."""

    kind: ClassVar[str] = "examples"
    fields: str = field("", "What the data calls our fields, as text=sentence,label=stars.")
    limit: int = field(0, "Examples read of a split; 0: all.", unit="examples", at_least=0)
    unicode: str = field("NFC", "Unicode normalisation: NFC, NFKC, or empty for none.")
    whitespace: str = field("trim", "trim the ends of lines and texts, collapse each run to a space, or empty.")
    keep_duplicates: bool = field(False, "Keep exact duplicates of a training example.")


AnyData = TextData | ExampleData
