"""Requests of OpenAI's API as requests to the engine, and the engine's replies as objects of the API."""

import base64
import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflax import tokenizers
from nanoflax.config import MAX_SEED, ModelConfig
from nanoflax.serve.engine import Request
from nanoflax.serve.errors import ApiError
from nanoflax.serve.replies import Choice, Piece, ShownToken, token_text
from nanoflax.serve.schemas import MAX_CHOICES

LEAST_LOG_PROBABILITY = -9999.0  # JSON has no infinity
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
COMPLETION_TOKENS = 16  # new tokens if a completion does not say how many, as in OpenAI's API


@dataclasses.dataclass(frozen=True)
class Served:
    """The served model, as requests need it.

    context: most tokens of a text. defaults: its generation settings. max_tokens: most new tokens of a text. created:
    when the server started, in seconds.
    """

    name: str
    config: ModelConfig
    tokenizer: Any
    context: int
    defaults: dict[str, Any]
    max_tokens: int
    created: int


def check_model(served: Served, body: dict[str, Any]) -> None:
    """Raises: ApiError if the body names another model."""
    if body.get("model") not in (None, served.name):
        message = f"model {body['model']!r:.80} is not served here; the only model is {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def completion_choices(served: Served, body: dict[str, Any]) -> list[Choice]:
    """The choices of a request to /v1/completions: n for each prompt. Raises: ApiError."""
    reads_source, echo = served.config.reads_source, bool(body.get("echo"))
    if echo and reads_source:
        raise ApiError(400, "echo: the prompt of an encoder-decoder is no part of its text", "echo")
    limit = COMPLETION_TOKENS if body.get("max_tokens") is None else body["max_tokens"]
    if not limit and not echo:
        raise ApiError(400, "max_tokens: 0 gives an empty text without echo=true", "max_tokens")
    found = []
    for prompt in _each(body["prompt"]):
        ids, text = prompt, prompt
        if isinstance(prompt, str):
            ids = tokenizers.prompt_ids(served.tokenizer, prompt, reads_source)
        else:
            check_ids(served, prompt, "prompt")
            text = served.tokenizer.decode(prompt) if echo else ""
        found.append((ids, text if echo else None))
    return _choices(served, body, found, limit, body.get("logprobs"))


def chat_choices(served: Served, body: dict[str, Any]) -> list[Choice]:
    """The n choices of a request to /v1/chat/completions. Raises: ApiError; UserError if the template fails."""
    if served.tokenizer.chat_template is None:
        raise ApiError(400, f"{served.name} has no chat template; use /v1/completions", "model", "no_chat_template")
    if body.get("max_tokens") and body.get("max_completion_tokens"):
        raise ApiError(400, "max_tokens: give it or max_completion_tokens", "max_tokens")
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
    if (body.get("response_format") or {"type": "text"})["type"] != "text":
        raise ApiError(400, "response_format: only text is available in this server", "response_format")
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    ids = tokenizers.chat_prompt(served.tokenizer, [_message(m) for m in body["messages"]], tools or None)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return _choices(
        served, body, [(ids, None)], limit, (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as chat templates read it: content is a text, and arguments of tools are objects."""
    found = {key: value for key, value in message.items() if value is not None}
    content = found.get("content", "")
    found["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    found["role"] = {"developer": "system"}.get(found["role"], found["role"])
    for call in found.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"].get("arguments") or "{}")
        except (ValueError, RecursionError):
            raise ApiError(400, "messages: the arguments of a tool call are not JSON", "messages") from None
    return found


def check_ids(served: Served, ids: Iterable[int], field: str) -> None:
    """Raises: ApiError for ids that the tokenizer does not have."""
    size = served.tokenizer.vocab_size
    if wrong := [i for i in ids if i >= size]:
        raise ApiError(400, f"{field}: token id {wrong[0]} is not in the vocabulary of {size}", field)


def _choices(served, body, prompts, limit, logprobs):
    n, tokenizer = body.get("n") or 1, served.tokenizer
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"n: {len(prompts)} prompts with n={n} are more than {MAX_CHOICES} texts", "n")
    if (limit or 0) > served.max_tokens:
        raise ApiError(400, f"max_tokens: {limit} is more than the server's limit of {served.max_tokens}", "max_tokens")
    given = {name: value for name in SAMPLING if (value := body.get(name)) is not None}
    filters = {name: value for name, value in (served.defaults | given).items() if name in SAMPLING}
    stops = body.get("stop") or served.defaults.get("stop", ())
    bias = {int(i): float(x) for i, x in (body.get("logit_bias") or {}).items()}
    check_ids(served, bias, "logit_bias")
    seed = secrets.randbelow(MAX_SEED + 1) if body.get("seed") is None else body["seed"]
    found = []
    for ids, echo in prompts:
        most = _room(served, ids, limit, "messages" if "messages" in body else "prompt")
        for i in range(n):
            request = Request(
                ids,
                most,
                **filters,
                seed=(seed + i) % (MAX_SEED + 1),
                logit_bias=bias,
                log_probabilities=logprobs,
                prompt_log_probabilities=echo is not None and (logprobs is not None or not most),
            )
            before = () if served.config.reads_source else ids
            found.append(Choice(tokenizer, request, [stops] if isinstance(stops, str) else stops, before, echo))
    return found


def _room(served, ids, limit, field):
    """The number of new tokens: `limit`, else as many as the server and the context allow."""
    context = served.context
    free = context if served.config.reads_source else context - len(ids)
    if len(ids) > context or free < (limit or 1):
        wanted = "" if limit is None else f" and {limit} new ones"
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens{wanted}, but the model's context is {context}",
            field,
            "context_length_exceeded",
        )
    return limit if limit is not None else int(min(served.max_tokens, free))


def embedding_ids(served: Served, encode: Callable[[str], list[int]], body: dict[str, Any]) -> list[list[int]]:
    """The ids of each text of a request to /v1/embeddings. Raises: ApiError."""
    found, most = [], served.context
    for i, text in enumerate(_each(body["input"])):
        ids = encode(text) if isinstance(text, str) else text
        check_ids(served, ids, "input")
        if len(ids) > most:
            message = f"input: text {i} has {len(ids)} tokens, but the model's context is {most}"
            raise ApiError(400, message, "input", "context_length_exceeded")
        found.append(ids)
    return found


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


def _each(texts: Any) -> list[Any]:
    """A list of texts or of lists of ids; one of them alone becomes a list."""
    return [texts] if isinstance(texts, str) or isinstance(texts[0], int) else texts


# Objects of replies.


class Form:
    """The objects of one reply. chat: of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, served: Served, choices: Sequence[Choice], chat: bool, with_usage: bool = False) -> None:
        self.served, self.choices, self.chat, self.with_usage = served, choices, chat, with_usage
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
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            )
            choices.append(
                {"index": i, **content, "logprobs": self._logprobs(i, tokens), "finish_reason": parts[-1].finish_reason}
            )
        return self.common | {"choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks before any text: in a chat, the role of each choice."""
        delta = {
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
        return [self._chunk([{"index": i, **delta}]) for i in range(len(self.choices))] if self.chat else []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of a streamed reply."""
        content = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        choice = {"index": index, **content, "logprobs": self._logprobs(index, piece.tokens)}
        return self._chunk([choice | {"finish_reason": piece.finish_reason}])

    def last_chunks(self) -> list[dict[str, Any]]:
        return [self._chunk([]) | {"usage": self.usage()}] if self.with_usage else []

    def _chunk(self, choices):
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return self.common | kind | {"choices": choices} | ({"usage": None} if self.with_usage else {})

    def _logprobs(self, index, tokens):
        if self.choices[index].request.log_probabilities is None:
            return None
        tokenizer = self.served.tokenizer
        if self.chat:
            return {"content": [_chat_token(tokenizer, token) for token in tokens], "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.log_probability) for token in tokens],
            "top_logprobs": [_best(tokenizer, token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _chat_token(tokenizer: Any, token: ShownToken) -> dict[str, Any]:
    best = [_named(token_text(tokenizer, i), x) for i, x in token.alternatives.items()]
    return _named(token.text, token.log_probability) | {"top_logprobs": best}


def _named(text, log_probability):
    return {"token": text, "logprob": _finite(log_probability), "bytes": None if "\ufffd" in text else [*text.encode()]}


def _best(tokenizer, token):
    """Text: log-probability of the alternatives and of the token itself; None for the first token of a prompt."""
    if token.log_probability is None:
        return None
    found = {}
    for i, x in [*token.alternatives.items(), (token.id, token.log_probability)]:
        found.setdefault(token_text(tokenizer, i), _finite(x))
    return found


def _finite(x):
    return None if x is None else max(x, LEAST_LOG_PROBABILITY)
