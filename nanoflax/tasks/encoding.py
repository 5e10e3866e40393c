"""Encodes examples as rows of token ids."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from nanoflax.config import read_class_weights
from nanoflax.data import DataReport
from nanoflax.errors import UserError, listed
from nanoflax.tasks.kinds import Chat, Classification, Example, Pair, Preference, Problem, Tagging, Text
from nanoflax.tasks.noise import Noise
from nanoflax.tasks.pairs import SIDES, PairEncoder, PairRows
from nanoflax.tasks.rows import Row, Rows
from nanoflax.tokenizers import align_tags, chat_ids, chat_prompt, decode_parts, prompt_ids, show_mask


def encode(
    examples: Iterable[Example],
    tokenizer: Any,
    length: int,
    labels: Sequence[str] = (),
    multi_label: bool = False,
    truncate: bool = True,
    target_length: int | None = None,
    report: DataReport | None = None,
    noise: Noise | None = None,
    chat: bool | None = None,
    scored: bool = False,
) -> Rows:
    """Encodes examples of one kind as Rows, in order.

    A long Text is split into several rows, counted in `report`. If the label of an example is None, its row has none.

    Args:
      length: the largest number of tokens in a row, with special tokens.
      target_length: the same for the target of a Pair (default: length).
      labels: the class names, for Classification and Tagging (TaskData.labels).
      multi_label: a text may have several labels, or none.
      truncate: cut longer examples but keep special tokens, and count them in `report`; otherwise raise an error.
      noise: for Texts: Rows.with_noise corrupts their rows differently in each epoch.
      chat: for Preferences and Problems: their texts become chats. None: as they are.
      scored: rows for a reward model, of Preferences, Texts and Chats.
    Raises: UserError that names the examples that are too long, or if no row is left.
    """
    report = DataReport() if report is None else report
    encoder = _Encoder(tokenizer, length, target_length or length, labels, multi_label, truncate, report, noise)
    pairs = PairEncoder(tokenizer, length, truncate, scored, chat, report, encoder.too_long)
    encode_one: dict[type, Any] = {kind: functools.partial(method, encoder) for kind, method in _ENCODE.items()}
    encode_one[Preference] = pairs.pair
    encode_one[Problem] = functools.partial(encoder.problem, bool(chat))
    if scored:
        encode_one |= {Text: pairs.text, Chat: pairs.chat}
    encoded = [pair for example in examples for pair in encode_one[type(example)](example)]
    if encoder.too_long.counts:
        raise UserError(f"{listed(encoder.too_long.lines())}; raise the length, or ask to truncate them")
    if not encoded:
        raise UserError(f"no example is left: {listed(report.lines()) or 'there was none'}")
    framing, target_length = tokenizer.framing, encoder.target_length
    edges = len(framing.before), len(framing.after)
    if "first" in encoded[0][0]:  # the rows have targets without a source
        target_length, edges = length, (max(len(framing.start) - 1, 0), 1)
    kind = PairRows if "chosen" in encoded[0][0] else Rows
    return kind(
        [row for row, _ in encoded],
        [example for _, example in encoded],
        tokenizer.pad_id,
        length,
        noise.target_length if noise else target_length,
        noise,
        edges,
        multi_label=multi_label,
    )


class _Encoder:
    """One method for each kind of example. It yields (row, the part of the example in this row); nothing if the
    example is left out, and counts it."""

    def __init__(self, tokenizer, length, target_length, labels, multi_label, truncate, report, noise):
        self.tokenizer, self.length, self.target_length = tokenizer, length, target_length
        self.labels, self.numbers = labels, {name: i for i, name in enumerate(labels)}
        self.multi_label, self.truncate, self.report, self.noise = multi_label, truncate, report, noise
        self.too_long = DataReport()
        self.framing = tokenizer.framing
        least = len(self.framing.target(())) + 1
        if min(length, target_length) < least:
            raise UserError(
                f"length {min(length, target_length)}: must be at least {least}, for the special tokens and one more"
            )

    def _count_long(self, problem: str, done: str, place: str) -> None:
        (self.report if self.truncate else self.too_long).add(
            f"{problem}, {done if self.truncate else 'refused'}", place
        )

    def _cut(self, ids: list[int], limit: int, place: str, what: str = "texts", around: int = 0) -> list[int]:
        if len(ids) + around > limit:
            self._count_long(f"{what} longer than {limit} tokens", "cut", place)
        return ids[: limit - around]

    def _whole(self, ids: list[int], place: str, what: str = "texts") -> np.ndarray:
        ids = self._cut(ids, self.length, place, what, len(self.framing.whole(())))
        return np.asarray(self.framing.whole(ids), np.int32)

    def classification(self, example: Classification) -> Iterator[tuple[Row, Example]]:
        label = {}
        if example.labels is not None:
            if self.multi_label:
                label = {"label": np.isin(self.labels, example.labels).astype(np.float32)}
            elif len(example.labels) == 1:
                label = {"label": np.asarray(self.numbers[example.labels[0]], np.int32)}
            else:
                self.report.add("examples without exactly one label, left out", example.place)
                return
        ids = self.tokenizer.encode(example.text)
        yield {"tokens": self._whole(ids, example.place)} | label, example

    def tagging(self, example: Tagging) -> Iterator[tuple[Row, Example]]:
        tags = None if example.tags is None else [self.numbers[tag] for tag in example.tags]
        ids, tag_ids, weights = align_tags(example.tokens, tags or [0] * len(example.tokens), self.tokenizer)

        before, after = len(self.framing.before), len(self.framing.after)

        def padded(values, dtype):
            return np.asarray([*[0] * before, *values[: self.length - before - after], *[0] * after], dtype)

        row = {"tokens": self._whole(ids, example.place), "weights": padded(weights, np.float32)}
        yield row if tags is None else row | {"tags": padded(tag_ids, np.int32)}, example

    def pair(self, example: Pair) -> Iterator[tuple[Row, Example]]:
        row = {"source": self._whole(self.tokenizer.encode_source(example.source), example.place, "sources")}
        if example.target is not None:
            target, around = self.tokenizer.encode_target(example.target), len(self.framing.target(()))
            target = self._cut(target, self.target_length, example.place, "targets", around)
            row["targets"] = np.asarray(self.framing.target(target), np.int32)
        yield row, example

    def chat(self, example: Chat) -> Iterator[tuple[Row, Example]]:
        try:
            ids, weights = chat_ids(self.tokenizer, example.messages, example.tools)
        except UserError as error:
            self.report.add(f"chats left out: {error}", example.place)
            return
        ids, weights = self._cut(ids, self.length, example.place), weights[: self.length]
        if any(weights[1:]):
            yield _next_tokens(ids, weights), example
        else:
            self.report.add(f"chats without a reply in the first {self.length} tokens, left out", example.place)

    def problem(self, chat: bool, example: Problem) -> Iterator[tuple[Row, Example]]:
        """The prompt; a part of it would be another problem, so long ones are left out."""
        prompt = example.prompt
        if chat and isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt.strip()},)  # as the same source gives Chats
        try:
            is_text = isinstance(prompt, str)
            ids = prompt_ids(self.tokenizer, prompt) if is_text else chat_prompt(self.tokenizer, prompt)
        except UserError as error:
            self.report.add(f"prompts left out: {error}", example.place)
            return
        if len(ids) > self.length:
            self._count_long(f"prompts longer than {self.length} tokens", "left out", example.place)
        else:
            yield {"source": np.asarray(ids, np.int32)}, dataclasses.replace(example, prompt=prompt)

    def text(self, example: Text) -> Iterator[tuple[Row, Example]]:
        tokenizer, ids = self.tokenizer, self.tokenizer.encode(example.text)
        if self.noise:
            size, overlap = self.noise.max_ids, 0
        else:  # a part begins with the last token of the part before, as the input for its first target
            ids, size, overlap = self.framing.text(ids), self.length - 1, 1
        parts = [ids[at - overlap : at + size] for at in range(overlap, len(ids), size)]
        if not parts:
            self.report.add("texts without tokens, left out", example.place)
        if len(parts) > 1:
            self._count_long(f"texts longer than {size + overlap} tokens", "read in several rows", example.place)
        texts = decode_parts(tokenizer, (part[overlap:] for part in parts))
        for part, text in zip(parts, [example.text] if len(parts) == 1 else texts, strict=True):
            row = {"text": np.asarray(part, np.int32)} if self.noise else _next_tokens(part, [1.0] * len(part))
            yield row, dataclasses.replace(example, text=text)


_ENCODE = {
    Classification: _Encoder.classification,
    Tagging: _Encoder.tagging,
    Pair: _Encoder.pair,
    Chat: _Encoder.chat,
    Text: _Encoder.text,
}


def _next_tokens(ids: Sequence[int], weights: Sequence[float]) -> Row:
    return {
        "first": np.asarray(ids[0], np.int32),
        "targets": np.asarray(ids[1:], np.int32),
        "weights": np.asarray(weights[1:], np.float32),
    }


def weigh_classes(rows: Rows, labels: Sequence[str], class_weights: str) -> Rows:
    """The Rows with class weights, for training. The mean loss is that of torch's CrossEntropyLoss(weight).

    labels: the class names. class_weights: as in config.LabelTask; "balanced" is n / (classes * count of the class)
    for n examples or words, as in scikit-learn.
    Raises: UserError for unknown class names, or if a text may have several labels.
    """
    if rows.multi_label:
        raise UserError(f"task.class_weights={class_weights!r} does not work with several labels")
    if class_weights == "balanced":
        name = "tags" if "tags" in rows.rows[0] else "label"
        found = np.concatenate(
            [np.atleast_1d(row[name])[np.atleast_1d(row.get("weights", 1)) > 0] for row in rows.rows]
        )
        counts = np.bincount(found, minlength=len(labels))
        weights = len(found) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        given = read_class_weights(class_weights)
        if unknown := given.keys() - set(labels):
            raise UserError(
                f"task.class_weights names {', '.join(sorted(unknown))}; the classes are {', '.join(labels)}"
            )
        weights = [given.get(label, 1) for label in labels]
    return dataclasses.replace(rows, class_weights=np.asarray(weights, np.float32))


def show_row(rows: Rows, tokenizer: Any) -> str | None:
    """The first row as text, with marks at the trained tokens (tokenizers.show_mask); None if all are trained."""
    row = rows.rows[0]
    if isinstance(rows, PairRows):
        if "first" not in row:
            return None
        return "\n".join(
            show_mask(tokenizer, [int(row["first"]), *row[side]], [0, *row[f"{side}_weights"]]) for side in SIDES
        )
    if "weights" not in row or row["weights"].all():
        return None
    if "first" in row:
        return show_mask(tokenizer, [int(row["first"]), *row["targets"]], [0, *row["weights"]])
    return show_mask(tokenizer, row["tokens"], row["weights"])
