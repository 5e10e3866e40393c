"""The documents of a Source, in parts that processes read independently.

    Source --plan--> Plan --read(plan, number)--> the documents of one part

The parts are a function of the source alone, so any number of processes, of one machine or of a cluster, reads the same
documents in the same order.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanoflax.data import files
from nanoflax.data.cleaning import REPAIR, clean
from nanoflax.data.duplicates import Comparing, left_out
from nanoflax.data.formats import FORMATS, Range, suffix
from nanoflax.data.pydocs import pydocs
from nanoflax.data.quality import Quality, excerpt
from nanoflax.data.remote import File
from nanoflax.data.report import DataReport, FieldError, is_held_out
from nanoflax.data.source import Source, source_splits, source_version, text_dataset
from nanoflax.data.tfds import dataset_examples
from nanoflax.errors import UserError
from nanoflax.report import to_json
from nanoflax.tokenizers import Segmentation

FEW_DOCUMENTS = 100  # with fewer documents a split by hash may be empty
PYDOCS_BYTES = 2_200_000  # about; it differs a little between versions of Python
PART_BYTES = 1 << 28  # of a source; about what one process tokenizes in a minute


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a source: whole files, or a range of one file or data set.

    paths: files, read one after another. split: of a TFDS data set. begin, end: the examples of a data set, or a range
    of the only file, in the unit of its format (bytes, groups of rows, records); end 0: complete files. sizes: of each
    file or of the range, in bytes. segmentation: how it is tokenized, if not into the best pieces.
    """

    paths: tuple[str, ...] = ()
    split: str = ""
    begin: int = 0
    end: int = 0
    sizes: tuple[int, ...] = (1,)
    segmentation: Segmentation | None = None

    @property
    def size(self) -> int:
        return max(sum(self.sizes), 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a process needs to read any part of one split of a source. It can be pickled.

    choice: the split that the documents are chosen for: train or validation; "" for all documents of the parts.
    few: each document is cut in two, instead of a choice by its hash.
    left_out: for each part, {number of a document: why a comparison with other documents leaves it out}. The numbers
      count the documents that `read` yields if left_out is empty.
    """

    source: Source
    choice: str
    few: bool
    parts: tuple[Part, ...]
    left_out: tuple[dict[int, str], ...] = ()

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def segmented(self) -> "Plan":
        """The plan that reads each part once more for each random segmentation which its source asks for."""
        source = self.source
        if not source.segmentations:
            return self
        each = [None, *(Segmentation(i + 1, source.segmentation_alpha) for i in range(source.segmentations))]
        parts = tuple(dataclasses.replace(part, segmentation=of_all) for of_all in each for part in self.parts)
        return dataclasses.replace(self, parts=parts, left_out=self.left_out * len(each))


def plan(source: Source | str, split: str = "train", part_bytes: int = PART_BYTES) -> Plan:
    """The Plan of one split (train, validation or all) of a Source, or of the source with this name.

    part_bytes: about the size of a part. Raises: UserError for a source that cannot be read.
    """
    source = source if isinstance(source, Source) else Source(source)
    if split not in ("train", "validation", "all"):
        raise UserError(f"split {split!r}: choose train, validation or all")
    if split == "validation" and source.validation:
        field = source.validation_field or source.field
        return plan(Source(source.validation, field, data_dir=source.data_dir), "all", part_bytes)
    splits = source_splits(source)
    has_splits = split == "all" or source.validation or "validation" in splits
    everything = Plan(source, "", False, _parts(source, splits[split if has_splits else "train"], part_bytes))
    if has_splits:
        if split == "validation":  # its author chose it
            return dataclasses.replace(everything, source=dataclasses.replace(source, quality=Quality()))
        return _compared(everything) if split == "train" else everything
    found = itertools.chain.from_iterable(read(everything, i, DataReport()) for i in range(len(everything.parts)))
    few = sum(1 for _ in itertools.islice(found, FEW_DOCUMENTS)) < FEW_DOCUMENTS
    chosen = dataclasses.replace(everything, choice=split, few=few)
    return _compared(chosen) if split == "train" else chosen


def read(plan: Plan, number: int, report: DataReport) -> Iterator[str]:
    """Yields the non-empty documents of one part, in order. `report` counts damaged text, and its `share` is the share
    of this part that has been read."""
    part = plan.parts[number]
    if part.paths:
        texts = _read_files(part, plan.source.field, report)
    else:
        texts = _read_dataset(plan.source, part, report) if part.split else _counted(pydocs(), report)
    left_out, i = plan.left_out[number] if plan.left_out else {}, -1
    for text in _chosen(plan, texts, report):
        i += 1
        if i in left_out:
            report.add(left_out[i], excerpt(text))
        else:
            yield text


def _chosen(plan: Plan, texts: Iterable[str], report: DataReport) -> Iterator[str]:
    """The texts of the plan's split that pass the steps for single documents."""
    validation, fraction = plan.choice == "validation", plan.source.validation_fraction
    for text in texts:
        if plan.choice and not plan.few and is_held_out(text, fraction) != validation:
            continue
        if not plan.source.quality.keeps(text, report):
            continue
        if plan.few:
            begin, rest = _cut(text, fraction)
            text = rest if validation else begin
        if text:
            yield text


def _compared(plan: Plan) -> Plan:
    """The plan without the documents that a comparison with other documents leaves out. Reads all documents once."""
    if not plan.source.quality.compares:
        return plan
    return dataclasses.replace(plan, left_out=_left_out(plan, to_json(source_version(plan.source))))


@functools.lru_cache(maxsize=32)  # the tokenizer and the token store read the same documents
def _left_out(plan: Plan, version: str) -> tuple[dict[int, str], ...]:
    source = plan.source
    plain = dataclasses.replace(source, quality=dataclasses.replace(source.quality, dedup="", evaluation=""))
    names = source.evaluation[1:] if source.validation else source.evaluation  # its first is source.validation
    field = source.evaluation_field or source.field
    evaluation = [documents(plain, "validation")] if source.quality.decontaminate else []
    evaluation += [documents(Source(name, field, data_dir=source.data_dir), "all") for name in names]
    with Comparing(source.name) as bar:
        report = DataReport()
        parts = (bar.count(texts, report) for texts in _of_parts(plan, report))
        return left_out(source.quality, parts, itertools.chain.from_iterable(evaluation))


def documents(source: Source | str, split: str = "train", report: DataReport | None = None) -> Iterator[str]:
    """Yields the non-empty documents of a Source, or of the source with this name, in a fixed order.

    `report` counts damaged text. Raises: UserError for a source that cannot be read, or has no text in its field.
    """
    return _documents(plan(source, split), DataReport() if report is None else report)


def _documents(plan: Plan, report: DataReport) -> Iterator[str]:
    yield from itertools.chain.from_iterable(_of_parts(plan, report))
    check_field(plan.source, report)


def _of_parts(plan: Plan, report: DataReport) -> Iterator[Iterator[str]]:
    """Yields the documents of each part. The report is about the whole plan; it is complete after each part."""

    def read_part(number: int, before: int) -> Iterator[str]:
        of_part = DataReport()
        for text in read(plan, number, of_part):
            report.share = (before + of_part.share * plan.parts[number].size) / plan.size
            yield text
        report.merge(of_part)

    before = 0
    for number, part in enumerate(plan.parts):
        yield read_part(number, before)
        before += part.size


def check_field(source: Source, report: DataReport) -> None:
    """Raises: FieldError if a whole source, with this report, had texts only in other fields than its own."""
    if report.other_fields and not report.has_text:
        others = list(report.other_fields)
        raise FieldError(f"{report.other_fields[others[0]]}: no record has text in field {source.field!r}", others)


def _parts(source: Source, names: Sequence[Any], part_bytes: int) -> tuple[Part, ...]:
    """names: Files, or splits of a TFDS data set."""
    if source.name == "pydocs":
        return (Part(sizes=(PYDOCS_BYTES,)),)
    cut = _dataset_parts if source.name.startswith("tfds:") else _file_parts
    return tuple(cut(source, names, part_bytes))


def _counted(items: Sequence[str], report: DataReport) -> Iterator[str]:
    """Yields the items and updates report.share."""
    for i, item in enumerate(items):
        report.share = i / len(items)
        yield item


def _document(text: str | bytes, place: str, report: DataReport) -> str:
    """The text, repaired so that UTF-8 can encode it; "" for a blank text."""
    text = files.decode(text, place, report) if isinstance(text, bytes) else text
    text = clean(text, [REPAIR], place, report)
    if not text or text.isspace():
        report.add("empty documents", place)
        return ""
    return text


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """The text in two parts. The second is about `fraction` of the text and begins after a paragraph, line or word."""
    middle = int(len(text) * (1 - fraction))
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, len(text) // 2, middle) + len(end)
        if at >= len(text) // 2 + len(end):
            return text[:at], text[at:]
    return text[:middle], text[middle:]


# Files.


def _file_parts(source: Source, found: Sequence[File], part_bytes: int) -> Iterator[Part]:
    """Groups files, in order, until a group has part_bytes. A larger file is cut into ranges if its format allows."""
    group: list[File] = []
    group_bytes = 0  # not summed anew for each file: there may be millions

    def whole() -> Part:
        return Part(tuple(file.path for file in group), sizes=tuple(file.size for file in group))

    for file in found:
        large = file.size > part_bytes
        ranges = FORMATS[suffix(file.path)].cut(file.path, file.size, source.field, part_bytes) if large else []
        if group and (ranges or max(group_bytes, 1) + file.size > part_bytes):
            yield whole()
            group, group_bytes = [], 0
        for begin, end, size in ranges:
            yield Part((file.path,), begin=begin, end=end, sizes=(size,))
        if not ranges:
            group.append(file)
            group_bytes += file.size
    if group:
        yield whole()


def _read_files(part: Part, field: str, report: DataReport) -> Iterator[str]:
    before, total = 0, part.size
    for path, size in zip(part.paths, part.sizes, strict=True):
        empty, piece = True, Range(path, size, part.begin, part.end)
        for place, text, share in FORMATS[suffix(path)].read(piece, field, report):
            report.has_text, empty = True, False
            report.share = min((before + share * size) / total, 1.0)  # the last line of a range may end behind it
            if text := _document(text, place, report):
                yield text
        if empty and not part.end:
            report.add("files without a text", path)
        before += size


# TFDS.


def _dataset_parts(source: Source, splits: Sequence[str], part_bytes: int) -> Iterator[Part]:
    builder, _ = text_dataset(source)
    for name in splits:
        n, n_bytes = len(dataset_examples(builder, name)), builder.info.splits[name].num_bytes
        pieces = max(1, min(n, -(-n_bytes // part_bytes)))
        for i in range(pieces):
            begin, end = i * n // pieces, (i + 1) * n // pieces
            yield Part(split=name, begin=begin, end=end, sizes=(n_bytes * (end - begin) // max(n, 1),))


def _read_dataset(source: Source, part: Part, report: DataReport) -> Iterator[str]:
    builder, field = text_dataset(source)
    report.has_text, examples = True, dataset_examples(builder, part.split)
    for i in range(part.begin, part.end):
        report.share = (i - part.begin) / (part.end - part.begin)
        if text := _document(examples[i][field], f"{part.split} example {i}", report):
            yield text
