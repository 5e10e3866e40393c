"""A row of a batch as a person reads it: each token, and what is trained, masked and padded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanoflax.report import printable
from nanoflax.tokenizers import token_bytes

BETWEEN = "│"  # between two tokens
TRAINED = "⟦", "⟧"  # around targets that are trained, if a row has others


def token_names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text. A special token is its name in <>, and bytes that are no whole character are hexadecimal."""
    names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}
    for name in ("eos", "bos", "pad", "unk"):
        names.setdefault(getattr(tokenizer, f"{name}_id", None), f"<{name}>")
    texts = token_bytes(tokenizer)

    def name_of(i: int) -> str:
        text = texts[i] if i < len(texts) else None
        if text is None:
            return names.get(i, f"<{i}>")
        try:
            return printable(text.decode()).replace("\n", "↵")
        except UnicodeDecodeError:
            return f"<{text.hex()}>"

    return [name_of(int(i)) for i in ids]


def show_batch_row(batch: Mapping[str, np.ndarray], row: int, tokenizer: Any, labels: Sequence[str] = ()) -> list[str]:
    """Lines that show one row of a batch of any task, as the model gets it.

    batch: arrays of B rows, as data.Windows or Rows.batch make them. labels: the names of the classes.
    """
    one = {name: array[row] for name, array in batch.items()}
    if "prompts" in one:
        return _block("prompt", tokenizer, one["prompts"][len(one["prompts"]) - one["lengths"] :])
    if "chosen" in one:
        return [line for side in ("chosen", "rejected") for line in _answer(one, side, tokenizer)]
    if "first" in one:
        return _targets_of_decoder(one, tokenizer)
    lines = []
    for name, mask in (("source", "source_mask"), ("tokens", "padding_mask")):
        if name in one:
            lines += _block(name, tokenizer, one[name][one[mask]], padding=int((~one[mask]).sum()))
    if "tokens" in one and "targets" in one:
        lines.append("  predicted: " + _masked(one, tokenizer))
    elif "targets" in one:
        lines += _trained("targets", tokenizer, one["targets"], one["weights"])
    return lines + _labels(one, tokenizer, labels)


def _targets_of_decoder(one: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The targets of a decoder, one block for each document. A block of a segment names the input before it."""
    targets, weights = one["targets"], one["weights"]
    segments = one.get("segments")
    real = len(targets) - _padding(targets, weights) if segments is None else int((segments > 0).sum())
    cuts = targets[:real] == tokenizer.eos_id if segments is None else np.diff(segments[:real], append=-1) != 0
    ends = [*(np.flatnonzero(cuts) + 1).tolist()]
    ends += [real] if real and real not in ends else []
    lines, begin, given = [], 0, int(one["first"])
    for end in ends:
        text = np.s_[begin:end]
        lines += _block(f"after {token_names(tokenizer, [given])[0]!r}", tokenizer, targets[text], weights[text])
        given = int(targets[end - 1])
        if segments is not None and end < real:
            given = int(one["start"][end] if np.ndim(one["start"]) else one["start"])
        begin = end
    return lines + _padding_line(len(targets) - real)


def _answer(one: Mapping[str, Any], side: str, tokenizer: Any) -> list[str]:
    if f"{side}_mask" in one:
        mask = one[f"{side}_mask"]
        return _block(side, tokenizer, one[side][mask], padding=int((~mask).sum()))
    title = f"{side}, after {token_names(tokenizer, [one['first']])[0]!r}"
    return _trained(title, tokenizer, one[side], one[f"{side}_weights"])


def _masked(one: Mapping[str, Any], tokenizer: Any) -> str:
    """The targets of masked tokens: what the model reads -> what it predicts, with their positions."""
    at = np.flatnonzero(one["weights"])
    pairs = zip(at, token_names(tokenizer, one["tokens"][at]), token_names(tokenizer, one["targets"][at]), strict=True)
    return ", ".join(f"{i}: {read}→{predicted}" for i, read, predicted in pairs)


def _labels(one: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> list[str]:
    if "tags" in one:
        at = np.flatnonzero(one["weights"])
        names = zip(token_names(tokenizer, one["tokens"][at]), one["tags"][at], strict=True)
        return ["  tags: " + ", ".join(f"{token.strip()}→{labels[tag]}" for token, tag in names)]
    if "label" not in one:
        return []
    found = np.flatnonzero(one["label"]).tolist() if np.ndim(one["label"]) else [int(one["label"])]
    return [f"  label: {', '.join(labels[i] for i in found) or 'none'} (weight {float(one['weights']):.4g})"]


def _padding(ids: np.ndarray, weights: np.ndarray) -> int:
    """The number of equal ids of weight 0 at the end."""
    real = np.flatnonzero((weights != 0) | (ids != ids[-1]))
    return len(ids) - (int(real[-1]) + 1 if len(real) else 0)


def _padding_line(n: int) -> list[str]:
    return [f"  {n} position{'s' * (n > 1)} of padding"] if n else []


def _trained(title: str, tokenizer: Any, ids: np.ndarray, weights: np.ndarray) -> list[str]:
    """A block of tokens with weights, and their padding."""
    padding = _padding(ids, weights)
    real = slice(0, len(ids) - padding)
    return _block(title, tokenizer, ids[real], weights[real], padding)


def _block(title: str, tokenizer: Any, ids: Any, weights: Any = None, padding: int = 0) -> list[str]:
    """A title and the tokens under it; a line ends where the text has a newline."""
    trains = [False] * len(ids) if weights is None or np.all(weights) else [bool(w) for w in weights]
    text, trained = "", False
    for i, name in enumerate(token_names(tokenizer, ids)):
        text += BETWEEN if i else ""
        if trains[i] != trained:
            trained = not trained
            text += TRAINED[0] if trained else TRAINED[1]
        text += name
    text += TRAINED[1] * trained
    lines = text.replace("↵" + BETWEEN, "↵" + BETWEEN + "\n").splitlines()
    return [
        f"  {title}: {len(ids)} token{'s' * (len(ids) != 1)}",
        *(f"    {line}" for line in lines),
        *_padding_line(padding),
    ]
