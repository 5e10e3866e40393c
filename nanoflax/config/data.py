"""Where text and examples come from."""

import dataclasses
from typing import ClassVar

from nanoflax.config.fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What pretrain and finetune both read."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str]
    train: str = field(
        "pydocs",
        "Source of the training data: for pretrain pydocs, text:GLOB or tfds:NAME[:FIELD]; for finetune also "
        "jsonl:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE or a built-in task.",
    )
    validation: str = field(
        "", "Source of the validation data; empty: the source's own split, or else a part of the training data."
    )
    validation_fraction: float = field(
        0.05, "Share of the documents or examples, chosen by a hash of each, where data has no split.", within="(0, 1)"
    )
    tokenizer: str = field(
        "bpe:2048", "bytes, bpe:V or unigram:V (trained on the data, V pieces), a .model file or a tokenizer directory."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """A corpus that becomes windows of tokens, for pretrain."""

    kind: ClassVar[str] = "text"
    packing: str = field(
        "joined",
        "Whether attention crosses the documents of a window (joined) or not (isolated).",
        choices=("joined", "isolated"),
    )
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
    whitespace: str = field(
        "trim", "White space: trim the ends of lines and texts, collapse each run to a space, or empty: keep all."
    )
    keep_duplicates: bool = field(False, "Keep exact duplicates of a training example.")


AnyData = TextData | ExampleData
