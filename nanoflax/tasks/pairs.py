"""Rows and batches of pairs of answers, and their encoding.

A pair for a preference: the ids of prompt and answer, whose answer is trained; see alignment.preference.
A pair for a reward model: both whole texts, of which the last state is scored; see alignment.bradley_terry.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanoflax import tokenizers
from nanoflax.data import DataReport
from nanoflax.errors import UserError
from nanoflax.tasks.kinds import Chat, Preference, Text
from nanoflax.tasks.preferences import common_length
from nanoflax.tasks.rows import SHORTEST, Row, Rows

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PairRows(Rows):
    """Rows with a chosen and a rejected text each."""

    def n_tokens(self, i: int) -> int:
        return sum(len(self.rows[i][side]) for side in SIDES)

    def lengths(self, indices: Sequence[int]) -> dict[str, int]:
        """The padded length of a batch of these rows, the same for both sides."""
        longest = max(len(self.rows[i][side]) for i in indices if i < len(self) for side in SIDES)
        return dict.fromkeys(SIDES, min(self.length, tokenizers.bucket(longest, SHORTEST)))

    def batch(self, indices: Sequence[int], lengths: dict[str, int] | None = None) -> dict[str, np.ndarray]:
        """A batch of the rows with these numbers [B]. A number after the last row gives only padding.

        chosen, rejected [B, T] int32; weights [B] float32, 0 for padding. For a preference also first [B] int32, the
        token before both, chosen_weights, rejected_weights [B, T] float32, 1 at the answer, and if there is a
        reference reference_chosen, reference_rejected [B] float32. For a reward model also chosen_mask, rejected_mask
        [B, T] bool, and margin [B] float32.
        """
        lengths = lengths or self.lengths(indices)
        empty = {name: array[:0] if array.ndim else np.zeros_like(array) for name, array in self.rows[0].items()}
        rows = [self.rows[i] if i < len(self) else empty for i in indices]
        batch: dict[str, Any] = {"weights": (np.asarray(indices) < len(self)).astype(np.float32)}
        for name, array in empty.items():
            if not array.ndim:
                batch[name] = np.stack([row[name] for row in rows])
                continue
            side = name.removesuffix("_weights")
            batch[name] = np.full((len(rows), lengths[side]), self.pad_id if name == side else 0, array.dtype)
            for line, row in zip(batch[name], rows, strict=True):
                line[: len(row[name])] = row[name]
            if "first" not in empty:
                sizes = np.asarray([len(row[name]) for row in rows])
                batch[f"{side}_mask"] = np.arange(lengths[side]) < sizes[:, None]
        return batch


def with_reference(rows: Any) -> PairRows:
    """The rows with a place for the log-probabilities of the reference: `reference_chosen` and `reference_rejected`
    are NaN until they are known."""
    unknown = {f"reference_{side}": np.asarray(np.nan, np.float32) for side in SIDES}
    return dataclasses.replace(rows, rows=[row | unknown for row in rows.rows])


def as_chat(pair: Preference) -> Preference:
    """The pair as chats: a text becomes the message of a user, and its answers become replies."""
    if isinstance(pair.prompt, tuple):
        return pair
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = {name: ({"role": role, "content": getattr(pair, name).strip()},) for name, role in roles.items()}
    return dataclasses.replace(pair, **messages)


class PairEncoder:
    """Encodes preferences, and texts and chats for a reward model. It counts what is left out and yields nothing then.

    length: the largest number of tokens. cut: cut longer answers, or count a longer pair as `too_long`.
    scored: for a reward model. chat: texts become chats, see `as_chat`.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        cut: bool,
        scored: bool,
        chat: bool | None,
        report: DataReport,
        too_long: DataReport,
    ):
        self.tokenizer, self.length, self.cut, self.scored, self.as_chats = tokenizer, length, cut, scored, chat
        self.report, self.too_long = report, too_long
        names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}
        self._end = names.get(tokenizer.eos_id, "")

    def pair(self, example: Preference) -> Iterator[tuple[Row, Preference]]:
        try:
            example = self._in_form(example)
            row = self._scored_pair(example) if self.scored else self._answers(example)
        except UserError as error:
            self.report.add(f"pairs left out: {error}", example.place)
            return
        longest = max(len(row[side]) for side in SIDES) + (not self.scored)
        if longest > self.length:
            if not self.cut:
                self.too_long.add(f"pairs longer than {self.length} tokens, refused", example.place)
                return
            if self.scored:  # the score belongs to the end of the text
                self.report.add(f"pairs longer than {self.length} tokens, left out", example.place)
                return
            self.report.add(f"pairs longer than {self.length} tokens, their answers cut", example.place)
            row = {name: array[: self.length - 1] if array.ndim else array for name, array in row.items()}
            if not all(row[f"{side}_weights"].any() for side in SIDES) or _equal(row):
                problem = f"pairs whose answers are equal or empty in the first {self.length} tokens, left out"
                self.report.add(problem, example.place)
                return
        if not self.scored and not all(row[f"{side}_weights"].any() for side in SIDES):
            self.report.add("pairs without an answer to train, left out", example.place)
            return
        if _equal(row):
            self.report.add("pairs with equal ids of both answers, left out", example.place)
            return
        yield row, example

    def text(self, example: Text) -> Iterator[tuple[Row, Text]]:
        yield {"tokens": self._shortened(self._whole(example.text), example.place)}, example

    def chat(self, example: Chat) -> Iterator[tuple[Row, Chat]]:
        ids = self._whole_chat(example.messages, example.tools)
        yield {"tokens": self._shortened(ids, example.place)}, example

    def _shortened(self, ids, place):
        if len(ids) > self.length:
            (self.report if self.cut else self.too_long).add(f"texts longer than {self.length} tokens, cut", place)
        return np.asarray(ids[: self.length], np.int32)

    def _in_form(self, example: Preference) -> Preference:
        """The example in the form of task.chat. Raises: UserError."""
        if isinstance(example.prompt, tuple):
            if self.as_chats is False:
                raise UserError("they have messages, and task.chat=false reads texts")
            return example
        if self.as_chats and (example.found_prompt or not example.prompt.strip()):
            raise UserError("they have no prompt of their own, which task.chat=true needs")
        example = self._without_written_end(example)
        return as_chat(example) if self.as_chats else example

    def _without_written_end(self, example: Preference) -> Preference:
        """The example, without the name of the end token at the end of its texts: this token follows anyway."""
        texts = {side: getattr(example, side) for side in SIDES}
        ended = {side: text.removesuffix(self._end) for side, text in texts.items()}
        if texts != ended:
            self.report.add(f"answers that end with the text {self._end!r}, read as the end", example.place)
        return dataclasses.replace(example, **ended)

    # Whole texts, as Transformers gives them to a model that classifies texts.

    def _whole(self, text: str) -> list[int]:
        return self.tokenizer.framing.target(self.tokenizer.encode(text))

    def _whole_chat(self, messages, tools) -> list[int]:
        if self.tokenizer.chat_template is None:
            return tokenizers.chat_ids(self.tokenizer, messages, tools)[0]
        return self.tokenizer.apply_chat(list(messages), False, tools=tools)

    def _scored_pair(self, example: Preference) -> Row:
        texts = [example.prompt + getattr(example, side) for side in SIDES]
        if isinstance(example.prompt, str):
            ids = [self._whole(text) for text in texts]
        else:
            ids = [self._whole_chat(messages, example.tools) for messages in texts]
        row = {side: np.asarray(side_ids, np.int32) for side, side_ids in zip(SIDES, ids, strict=True)}
        return row | {"margin": np.asarray(example.margin, np.float32)}

    # Prompts and answers.

    def _answers(self, example: Preference) -> Row:
        if isinstance(example.prompt, tuple):
            both = [self._reply(example, side) for side in SIDES]
        elif not example.prompt.strip():
            raise UserError("their prompt is empty")
        elif example.found_prompt:
            both = self._from_shared(example)
        else:
            both = [self._answer(example.prompt, getattr(example, side)) for side in SIDES]
        row: Row = {"first": np.asarray(both[0][0][0], np.int32)}
        for side, (ids, weights) in zip(SIDES, both, strict=True):
            row[side] = np.asarray(ids[1:], np.int32)
            row[f"{side}_weights"] = np.asarray(weights[1:], np.float32)
        return row

    def _answer(self, prompt: str, answer: str) -> tuple[list[int], list[float]]:
        before, after = tokenizers.continuation_ids(self.tokenizer, prompt, answer)
        after = [*after, self.tokenizer.eos_id]
        return before + after, [0.0] * len(before) + [1.0] * len(after)

    def _from_shared(self, example: Preference) -> list[tuple[list[int], list[float]]]:
        """The answers begin where the ids of the whole texts differ from those of the prompt."""
        encode, framing = self.tokenizer.encode, self.tokenizer.framing
        wholes = [framing.text(encode(example.prompt + getattr(example, side))) for side in SIDES]
        prompt = framing.prompt(encode(example.prompt))
        shared = min(common_length(prompt, ids) for ids in wholes)
        if not shared:
            raise UserError("their prompt is empty")
        return [(ids, [0.0] * shared + [1.0] * (len(ids) - shared)) for ids in wholes]

    def _reply(self, example: Preference, side: str) -> tuple[list[int], list[float]]:
        """Only replies after the prompt are trained. What the template writes after the last of them is left out."""
        prompt = tokenizers.chat_prompt(self.tokenizer, example.prompt, example.tools)
        ids, weights = tokenizers.chat_ids(self.tokenizer, example.prompt + getattr(example, side), example.tools)
        start = common_length(prompt, ids)
        weights = [0.0] * start + weights[start:]
        end = max((i + 1 for i, weight in enumerate(weights) if weight), default=0)
        if end < 2:
            raise UserError("they have no reply to train")
        return ids[:end], weights[:end]


def _equal(row: Row) -> bool:
    return np.array_equal(row["chosen"], row["rejected"])
