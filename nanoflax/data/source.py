"""Sources of text, each named by one string."""

import dataclasses
import os
import sys
from typing import Any

from nanoflax.config import TextData
from nanoflax.data.formats import FORMATS, suffix
from nanoflax.data.hub import hub_splits
from nanoflax.data.made import made_version
from nanoflax.data.quality import Quality
from nanoflax.data.remote import File, find_files
from nanoflax.data.tfds import dataset_splits, open_dataset
from nanoflax.errors import UserError

HELP = "choose pydocs, text:GLOB, hub:OWNER/NAME[:CONFIG][:SPLIT], tfds:NAME[:FIELD] or tokens:DIRECTORY"
SCHEMES = ("text", "hub", "tfds", "tokens")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of text and its splits "train" and "validation" ("all" is both).

    name: pydocs; text:GLOB of files, each plain, .gz or .zst: .txt and .md (one document per file), .jsonl and .json
      (one per line), .csv and .tsv (one per row; the first row names the columns), and of .parquet and .array_record
      (JSON objects, tf.train.Example or UTF-8 text); GLOB may begin with gs:// or s3://;
      hub:OWNER/NAME[:CONFIG][:SPLIT]; tfds:NAME[:FIELD], where NAME may include /CONFIG and :VERSION;
      tokens:DIRECTORY, which experiments.tokenize wrote.
    field: the field or column of the files that holds the text.
    validation: another source, for the validation split. If empty, the data set's own split validation, or else
      test. Without such a split, documents chosen by hash, with probability `validation_fraction`. With fewer than
      100 documents, the last `validation_fraction` of each document, cut after a paragraph, line or word.
    data_dir: of TFDS; default $TFDS_DATA_DIR, or the default of TFDS.
    quality: which documents are left out.
    segmentations: how many times the documents of the split train are tokenized into random pieces, besides the best
      ones. segmentation_alpha: see tokenizers.Segmentation.
    validation_field, evaluation_field: as `field`, of validation and of quality.evaluation; empty: `field`.
    """

    name: str
    field: str = "text"
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""
    quality: Quality = Quality()
    validation_field: str = ""
    evaluation_field: str = ""
    segmentations: int = 0
    segmentation_alpha: float = 0.3

    def __post_init__(self) -> None:
        for name in (self.name, *self.evaluation):
            scheme, _, rest = name.partition(":")
            if name != "pydocs" and not (scheme in SCHEMES and rest):
                found = next((path for path in (name, rest) if os.path.exists(path)), "")  # jsonl:FILE is of finetune
                found = os.path.join(found, "**/*.txt") if os.path.isdir(found) else found
                hint = f"write text:{found}, or " if found else ""
                raise UserError(f"data source {name!r} is not known; {hint}{HELP}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 and 1")
        if self.segmentations and self.name.startswith("tokens:"):
            raise UserError(
                f"data.segmentations is for text, but {self.name} holds tokens: set it in experiments.tokenize"
            )
        if self.segmentation_alpha != Source.segmentation_alpha and not self.segmentations:
            raise UserError(
                f"data.segmentation_alpha={self.segmentation_alpha} is not used; set data.segmentations=8 too"
            )

    def without_segmentations(self) -> "Source":
        """The same text, only in its best pieces."""
        return dataclasses.replace(self, segmentations=0, segmentation_alpha=Source.segmentation_alpha)

    @property
    def evaluation(self) -> list[str]:
        """The names of the sources of evaluation text, besides the validation split of this source."""
        return [name.strip() for name in (self.validation, *self.quality.evaluation.split(";")) if name.strip()]


def source_of(config: TextData, name: str | None = None) -> Source:
    """The Source of a TextData. name: another source, read with the same settings."""
    if name:
        return Source(name, config.field, validation_fraction=config.validation_fraction)
    no_random = not config.segmentations and not config.train.startswith("tokens:")
    if no_random and config.segmentation_until != TextData.segmentation_until:
        raise UserError(
            f"data.segmentation_until={config.segmentation_until} is not used; set data.segmentations=8 too"
        )
    return Source(
        config.train,
        config.field,
        config.validation,
        config.validation_fraction,
        quality=Quality(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Quality)}),
        segmentations=config.segmentations,
        segmentation_alpha=config.segmentation_alpha,
    )


def settings_of(source: Source) -> dict[str, Any]:
    """The fields of a Source as JSON values, for a key of what is made of it. `segmentations` is newer than the first
    keys, which stay as they were."""
    settings = dataclasses.asdict(source)
    if not source.segmentations:
        del settings["segmentations"], settings["segmentation_alpha"]
    return settings


def source_version(source: Source) -> list[Any]:
    """JSON values that change when the source changes: paths, sizes and times of files, versions of data sets and of
    Python. The text is not read. Raises: UserError for a source that does not exist."""

    def version(name: str) -> list[Any]:
        if name == "pydocs":
            return [sys.version]
        if name.startswith("tokens:"):
            return made_version(name)
        if name.startswith("tfds:"):
            builder, field = text_dataset(dataclasses.replace(source, name=name))
            return [builder.info.full_name, str(builder.data_path), field]
        return [list(file.version) for file in _files(name)["all"]]

    return [version(name) for name in (source.name, *source.evaluation)]


def source_splits(source: Source) -> dict[str, list[Any]]:
    """{split: Files, or names of splits of a TFDS data set}, of the splits train and all, and validation if the source
    has its own. Raises: UserError for a source that does not exist."""
    if source.name == "pydocs":
        return {"train": [], "all": []}
    if source.name.startswith("tokens:"):
        raise UserError(f"{source.name} holds tokens, but text is needed here")
    return dataset_splits(text_dataset(source)[0]) if source.name.startswith("tfds:") else _files(source.name)


def _files(name: str) -> dict[str, list[File]]:
    """source_splits of a source of files."""
    if name.startswith("hub:"):
        return hub_splits(name)
    files = matching_files(name)
    return {"train": files, "all": files}


def matching_files(name: str) -> list[File]:
    """The files of a text: source, sorted. Raises: UserError if there is none."""
    matches = find_files(name.removeprefix("text:"))
    found = [file for file in matches if suffix(file.path) in FORMATS]
    if not found:
        what = f"{len(matches)} files, none of them" if matches else "no file, so no"
        raise UserError(
            f"data source {name!r} matches {what} {', '.join(FORMATS)} (or .gz or .zst of these); for all files in a "
            "folder write text:FOLDER/**/*.txt"
        )
    return found


def text_dataset(source: Source) -> tuple[Any, str]:
    """(builder, field) of a tfds: source; the data set is prepared."""
    import tensorflow_datasets as tfds

    words = source.name.removeprefix("tfds:").split(":")
    # NAME, NAME:FIELD, NAME:VERSION or NAME:VERSION:FIELD; a version starts with a digit.
    name = ":".join(words[:2] if len(words) > 1 and words[1][:1].isdigit() else words[:1])
    field = ":".join(words)[len(name) + 1 :]
    builder = open_dataset(name, source.data_dir)
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if field not in texts and (field or len(texts) != 1):
        raise UserError(
            f"{source.name}: name a text feature, as in tfds:{name}:FIELD; it has {', '.join(texts) or 'none'}"
        )
    return builder, field or texts[0]
