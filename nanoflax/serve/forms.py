"""The engine's replies as objects of OpenAI's API."""

import base64
import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflax import tokenizers
from nanoflax.config import ModelConfig
from nanoflax.serve.attention import layers_of
from nanoflax.serve.errors import ApiError
from nanoflax.serve.replies import Choice, Piece, PlacedToken
from nanoflax.serve.requests import Attention, Request
from nanoflax.serve.tool_calls import ToolCalls

LEAST_LOG_PROBABILITY = -9999.0  # JSON has no infinity and no NaN


class TokenTexts:
    """The texts of single tokens, as the API shows them."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = tokenizers.token_bytes(tokenizer)
        self._names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}

    def text(self, token: int) -> str:
        """The text of a token; bytes that are no character in OpenAI's form "bytes:\\xe2\\x80"."""
        found = self._bytes[token]
        if found is None:
            return self._names.get(token, f"<token {token}>")
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def bytes_of(self, token: int) -> list[int] | None:
        """The bytes that a token adds to a text; None for a special token, which adds none."""
        found = self._bytes[token]
        return None if found is None else [*found]


@dataclasses.dataclass(frozen=True)
class Served:
    """The served model, as requests need it.

    context: most tokens of a text. defaults: its generation settings. max_tokens: most new tokens of a text. created:
    when the server started, in seconds.
    """

    name: str
    config: ModelConfig
    tokenizer: Any
    texts: TokenTexts
    context: int
    defaults: dict[str, Any]
    max_tokens: int
    created: int


class Form:
    """The objects of one reply. chat: of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, served: Served, choices: Sequence[Choice], chat: bool, with_usage: bool = False) -> None:
        self.served, self.choices, self.chat, self.with_usage = served, choices, chat, with_usage
        self._begun: set[int] = set()  # choices whose prompt_token_ids are sent
        self._calls = [ToolCalls() for _ in choices]
        kind = "chat.completion" if chat else "text_completion"
        self.common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "object": kind,
        }

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens. A prompt with n choices counts once."""
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in self.choices}
        read, new = sum(prompts.values()), sum(choice.new_tokens for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The reply, from the pieces of each choice."""
        choices = []
        for i, parts in enumerate(pieces):
            text, tokens = "".join(part.text for part in parts), [token for part in parts for token in part.tokens]
            reason, content = parts[-1].finish_reason, {"text": text}
            if self.chat:
                found, reason = self._said(i, text, reason)
                for call in found.get("tool_calls", ()):
                    del call["index"]  # only chunks have it
                content = {"message": {"role": "assistant", "content": None, "refusal": None} | found}
            choices.append({"index": i, **content, "logprobs": self._logprobs(i, tokens), "finish_reason": reason})
            choices[-1] |= self._ids(i, tokens) | ({} if self.chat else self._prompt_ids(i))
        return self.common | {"choices": choices, "usage": self.usage()} | (self._prompt_ids(0) if self.chat else {})

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks before any text: in a chat, the role of each choice."""
        delta = {
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = lambda i: self._chunk([{"index": i, **delta}]) | self._prompt_ids(i)
        return [chunk(i) for i in range(len(self.choices))] if self.chat else []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A part of a streamed reply; None: all of it is held back, because it may become a call of a tool."""
        content, reason = {"text": piece.text}, piece.finish_reason
        if self.chat:
            found, reason = self._said(index, piece.text, reason)
            content = {"delta": found if found.get("content") or "tool_calls" in found else {}}
            if not (content["delta"] or reason or piece.tokens):
                return None
        choice = {"index": index, **content, "logprobs": self._logprobs(index, piece.tokens)}
        choice |= {"finish_reason": reason} | self._ids(index, piece.tokens)
        if not self.chat and index not in self._begun:
            self._begun.add(index)
            choice |= self._prompt_ids(index)
        return self._chunk([choice])

    def _said(self, index: int, text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
        """({content and tool_calls} of a part of a message, its finish_reason)."""
        with_calls, reader = self.choices[index].with_calls, self._calls[index]
        if not with_calls:
            return {"content": text}, reason
        text, calls = reader.add(text, last=reason is not None)
        found: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if text or not reader.number:
            found["content"] = text
        return found, with_calls if reason == "stop" and reader.number else reason

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self._chunk([]) | {"usage": self.usage()}] if self.with_usage else []

    def _chunk(self, choices):
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return self.common | kind | {"choices": choices} | ({"usage": None} if self.with_usage else {})

    def _ids(self, index, tokens):
        """As vLLM's return_token_ids: those of the prompt are in the choice of a completion, and beside a chat's."""
        ids = [placed.token.id for placed in tokens if not placed.token.of_prompt]
        return {"token_ids": ids} if self.choices[index].with_ids else {}

    def _prompt_ids(self, index):
        choice = self.choices[index]
        return {"prompt_token_ids": [*choice.request.prompt]} if choice.with_ids else {}

    def _logprobs(self, index: int, tokens: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if self.choices[index].request.log_probabilities is None:
            return None
        text, found = self.served.texts.text, [placed.token for placed in tokens]
        if self.chat:
            content = [
                self._named(token.id, token.log_probability) | {"top_logprobs": self._best(token)} for token in found
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [text(token.id) for token in found],
            "token_logprobs": [_finite(token.log_probability) for token in found],
            "top_logprobs": [self._table(token) for token in found],
            "text_offset": [placed.offset for placed in tokens],
        }

    def _named(self, token, log_probability):
        texts = self.served.texts
        return {"token": texts.text(token), "logprob": _finite(log_probability), "bytes": texts.bytes_of(token)}

    def _best(self, token):
        return [self._named(i, x) for i, x in token.alternatives.items()]

    def _table(self, token):
        """Text: log-probability of the alternatives and of the token itself; None for the first token of a prompt."""
        if token.log_probability is None:
            return None
        found = dict(token.alternatives) | {token.id: token.log_probability}
        return {self.served.texts.text(i): _finite(x) for i, x in found.items()}


def _finite(x):
    return None if x is None else x if x > LEAST_LOG_PROBABILITY else LEAST_LOG_PROBABILITY


def attention_layers(config: ModelConfig) -> dict[str, Any]:
    """For /v1/models: whose attention /v1/attention can report, and why that of other layers is missing."""
    shown = layers_of(config)
    layers = [{"index": i, "type": kind} for i, kind in shown.kinds.items()]
    return {"layers": layers, "heads": shown.heads, "missing": shown.missing}


def attention_weights(served: Served, body: dict[str, Any], request: Request, found: Attention) -> dict[str, Any]:
    """The answer of /v1/attention. rest: the weight of attention sinks and of an adapter's trained prefix."""
    texts, weights = served.texts, found.weights.astype(float)
    return {
        "object": "attention",
        "model": served.name,
        "layer": body.get("layer"),
        "head": body.get("head"),
        "tokens": [texts.text(i) for i in request.prompt],
        "special": [at for at, i in enumerate(request.prompt) if texts.bytes_of(i) is None],
        "weights": [round(x, 6) for x in weights.tolist()],
        "rest": round(max(0.0, 1 - weights.sum()), 6),
    }


def embeddings(
    served: Served, body: dict[str, Any], texts: Sequence[Sequence[int]], vectors: Float[np.ndarray, "N D"]
) -> dict[str, Any]:
    """The answer of /v1/embeddings. Raises: ApiError if the vectors do not have the size that the body wants."""
    if body.get("dimensions") not in (None, vectors.shape[1]):
        raise ApiError(400, f"dimensions: this model's embeddings have {vectors.shape[1]} numbers", "dimensions")
    packed = body.get("encoding_format") == "base64"
    show = lambda v: base64.b64encode(v.astype("<f4").tobytes()).decode() if packed else v.tolist()
    data = [{"object": "embedding", "index": i, "embedding": show(v)} for i, v in enumerate(vectors)]
    read = sum(map(len, texts))
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}
