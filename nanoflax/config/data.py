"""Where text and examples come from."""

import dataclasses
from typing import ClassVar

from nanoflax.config.fields import field

PACKINGS = ("joined", "isolated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of pretrain and finetune."""

    section: ClassVar[str] = "data"
    kind: ClassVar[str]
    train: str = field(
        "pydocs",
        "Training data: pydocs, text:GLOB (.txt, .md, .jsonl, .csv, .tsv, .parquet or .array_record; also .gz, .zst, "
        "gs:// and s3://), hub:OWNER/NAME[:CONFIG][:SPLIT] or tfds:NAME[:FIELD]; for finetune also jsonl:FILE, "
        "parquet:FILE, csv:FILE, tsv:FILE, conll:FILE, pairs:SOURCES,TARGETS, preferences:FILE, problems:FILE, "
        "dates:FROM-TO, pytags, pymodules, pychats, wrong_dates:FROM-TO, bible:FROM-TO or arithmetic:DIGITS. pretrain "
        "also takes tokens:DIRECTORY, several sources, NAME=SOURCE; NAME=SOURCE, and mixture:FILE.",
    )
    validation: str = field("", "Validation data; empty: the data's own split, or else a part of the training data.")
    validation_fraction: float = field(0.05, "That part: a share of the texts, chosen by hash.", within="(0, 1)")
    tokenizer: str = field("bpe:2048", "bytes, bpe:V, unigram:V, a .model file or a tokenizer directory.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Settings of pretrain: a corpus is cut into windows of tokens."""

    kind: ClassVar[str] = "text"
    mixture: str = field(
        "",
        "Weights of several sources by stage, as 0: web=0.8,code=0.2; 8000: web=0.5,code=0.5 (the numbers are steps); "
        "empty: by their sizes.",
    )
    window: int = field(0, "Length of a training window; 0: model.context.", unit="tokens", at_least=0)
    packing: str = field("joined", "isolated: documents of a window cannot see each other.", choices=PACKINGS)
    min_chars: int = field(0, "Leave shorter documents out; 0: none.", unit="characters", at_least=0)
    max_chars: int = field(0, "Leave longer documents out; 0: none.", unit="characters", at_least=0)
    languages: str = field("", "Keep documents in these languages, as in en,de; empty: all.")
    dedup: str = field("", "Leave duplicates in a source out: exact, or minhash:0.8 for similar ones too; empty: none.")
    decontaminate: int = field(
        0,
        "Leave out documents that share so many words in a row with the validation text of their "
        "source; 13 is usual, 0: none.",
        unit="words",
        at_least=0,
    )
    segmentations: int = field(
        0,
        "How many times each training document is also tokenized into random pieces, each time into other ones, for a "
        "small corpus that is read in many epochs; 0: only the best pieces are read. It needs unigram:V.",
        within="[0, 1000]",
    )
    segmentation_alpha: float = field(
        0.3,
        "The power of a segmentation's probability with data.segmentations, 0.1 to 0.5; less is more random.",
        within="(0, 1]",
    )
    segmentation_until: float = field(
        0.8,
        "The share of the steps that read random pieces with data.segmentations; the last steps read the best ones, as "
        "validation does.",
        within="(0, 1]",
    )
    evaluation: str = field("", "More text for data.decontaminate: sources as in data.train, separated by ;.")
    workers: int = field(0, "Processes that tokenize; 0: one per core.", at_least=0)
    cache: str = field("", "Directory of token files and trained tokenizers; empty: the user's cache directory.")
    # This attribute is last: it hides the function `field` in the class body.
    field: str = field(
        "text", "Name of the JSON field or of the column that holds the text; of several sources: text; code=content."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleData(DataConfig):
    """Settings of finetune: the examples of a task stay in memory."""

    kind: ClassVar[str] = "examples"
    fields: str = field("", "Names of our fields in the data, as text=sentence,label=stars.")
    limit: int = field(0, "Largest number of examples from a split; 0: all.", unit="examples", at_least=0)
    unicode: str = field("NFC", "Unicode normalisation; empty: none.", choices=("NFC", "NFKC", ""))
    whitespace: str = field(
        "trim",
        "trim: at the ends of lines and texts; collapse: each run to one space; empty: none.",
        choices=("trim", "collapse", ""),
    )
    keep_duplicates: bool = field(False, "Keep exact duplicates of a training example.")


AnyData = TextData | ExampleData
