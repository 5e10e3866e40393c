"""Embeddings of texts: a vector of each text, by an encoder, or by an encoder-decoder with a bottleneck."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax import hf, nn, parallel, tokenizers, untrusted
from nanoflax.errors import UserError
from nanoflax.nn import Array

PART = 64  # texts of a request after which those of another one follow
_ROWS = 8  # texts that are computed together; one text alone has a program of its own


class Embedder:
    """Vectors of texts [N, D], float32, of length 1.

    pooling: "mean" of an encoder's last states, or the "first" state. A model with a bottleneck has its own vector.
    """

    def __init__(self, model: Any, params: dict, tokenizer: Any, pooling: str = "mean") -> None:
        self.config, self.tokenizer, self._params = model.config, tokenizer, params
        if not model.config.reads_source:  # without a head, `hidden` gives the last states
            model = nn.build(dataclasses.replace(model.config, head="none"))
        self._vectors = jax.jit(
            parallel.with_mesh(parallel.mesh_of(params), functools.partial(_vectors, model, pooling))
        )

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens around it."""
        t = self.tokenizer
        return t.framing.whole(t.encode_source(text) if self.config.reads_source else t.encode(text)) or [t.bos_id]

    def compile(self) -> None:
        """Compile for every length up to the context, so that no request has to wait for this."""
        length, most = 16, min(self.config.max_length, 2**16)
        while True:
            for rows in (1, _ROWS):
                self([[0] * min(length, most)] * rows)
            if length >= most:
                return
            length *= 2

    def __call__(self, texts: Sequence[Sequence[int]]) -> Float[np.ndarray, "N D"]:
        """The vectors of lists of ids, which are not longer than the context."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar lengths together
        found: list[Any] = [None] * len(texts)
        for at in range(0, len(order), _ROWS):
            part = order[at : at + _ROWS]
            rows = [texts[i] for i in part]
            rows += rows[-1:] * (_ROWS - len(rows) if len(rows) > 1 else 0)
            T = min(tokenizers.bucket(max(map(len, rows))), self.config.max_length)
            tokens, mask = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
            for row, ids in enumerate(rows):
                tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
            for i, vector in zip(part, np.asarray(self._vectors(self._params, tokens, mask)), strict=False):
                found[i] = vector
        return np.stack(found)


def _vectors(
    model: Any, pooling: str, params: dict, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    if model.config.reads_source:
        x = model.apply({"params": params}, tokens, mask, method="vector")
    else:
        x = model.apply({"params": params}, tokens, mask)
        x = nn.mean_pool(x, mask) if pooling == "mean" else x[:, 0]
    x = x.astype(np.float32)
    return x / jax.numpy.maximum(jax.numpy.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def can_embed(config: Any) -> bool:
    """Whether a model gives vectors of texts."""
    return config.bottleneck != "none" if config.reads_source else not config.is_causal


def pooling_of(source: str) -> str:
    """The pooling that a directory of Sentence Transformers names; "mean" for other sources.

    Raises: UserError for one that is not computed.
    """
    directory = hf.find_source(source)
    modules = directory / "modules.json"
    if not modules.is_file():
        return "mean"
    listed = _read(directory, "modules.json")
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise UserError(f"{modules} must hold a list of objects")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in listed]
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UserError(f"{modules} has {unknown[0]}, which nanoflax does not compute")
    modes = _read(directory, "1_Pooling/config.json")
    modes = modes if isinstance(modes, dict) else {}
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    found = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value is True]
    if len(found) != 1 or found[0] not in known:
        raise UserError(f"{directory / '1_Pooling'} has {', '.join(found) or 'no pooling'}; known: mean and cls")
    return known[found[0]]


def _read(directory: pathlib.Path, name: str) -> Any:
    """The JSON of a file in a directory. Raises: UserError, also for a link that is not of the Hugging Face cache."""
    path, root = directory / name, directory.resolve()
    target, snapshots = path.resolve(), root.parent
    cached = snapshots.name == "snapshots" and target.parent == snapshots.parent / "blobs"
    if not path.is_file() or target != root / name and not cached:
        raise UserError(f"{path}: no such file, or a link out of its directory")
    with path.open("rb") as file:
        return untrusted.parse_json(file.read(2**20), path)
