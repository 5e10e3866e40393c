"""The HTTP server: OpenAI's API, health, metrics and the page, as a Starlette application."""

import asyncio
import json
import pathlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.serve import api, checks, forms, metrics, programs, schemas
from nanoflax.serve.embeddings import PART, Embedder
from nanoflax.serve.engine import Engine
from nanoflax.serve.errors import ApiError
from nanoflax.serve.replies import Choice, Piece, Replies, attention_of
from nanoflax.serve.settings import Settings

# A body must arrive in FIRST_SECONDS, and in a second more for each LEAST_RATE bytes.
FIRST_SECONDS = 10
LEAST_RATE = 20_000
# The page may fetch from this server only, and no other page may show it in a frame.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """What the routes share: the model, its engine, and the requests that are not finished.

    engine: None for a model that generates no text. embedder: None for a model without embeddings.
    """

    def __init__(
        self, served: forms.Served, engine: Engine | None, embedder: Embedder | None, settings: Settings
    ) -> None:
        self.served, self.engine, self.embedder, self.settings = served, engine, embedder, settings
        self.slots = engine.slots if engine else 0
        self.metrics, self.stopping, self.unfinished = metrics.Metrics(engine), False, 0
        self.running: set[Replies] = set()
        self.embedding = asyncio.Lock()

    def stop(self, at_once: bool = False) -> None:
        """Refuse new requests and those without a token; the others go on. at_once: cancel them too."""
        self.stopping = True
        for replies in self.running:
            if at_once or not replies.started:
                replies.cancel()

    @property
    def failure(self) -> str:
        """Why the engine does not work any more; empty if it works."""
        return self.engine.failure if self.engine else ""

    def check_room(self, texts: int) -> None:
        """Raises: ApiError if the server takes no more texts."""
        if self.stopping:
            raise ApiError(503, "the server is stopping; send the request again later", code="stopping")
        if self.failure:
            raise ApiError(500, self.failure)
        # A request that is alone is never refused: to try it again later would not help.
        if self.unfinished and self.unfinished + texts > self.slots + self.settings.queue:
            message = f"the queue is full: {self.unfinished} texts are not finished; send the request again later"
            raise ApiError(429, message, code="queue_full")

    def start(self, choices: Sequence[Choice]) -> Replies:
        """Send the choices to the engine. Raises: ApiError if there is no room; UserError for a bad request."""
        assert self.engine
        self.check_room(len(choices))
        replies = Replies(choices, self._finished)
        self.unfinished += len(choices)
        try:
            replies.submit(self.engine)
        except BaseException:
            self.unfinished -= sum(choice.ticket is None for choice in choices)
            raise
        self.running.add(replies)
        return replies

    def end(self, replies: Replies) -> None:
        """The HTTP request has ended, perhaps before its texts."""
        replies.cancel()
        self.running.discard(replies)

    def _finished(self, choice: Choice) -> None:
        self.unfinished -= 1


def make_app(service: Service, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The application of a service. hosts: names that clients may use in their Host header; "*": all."""
    routes = [
        Route("/", _page),
        Route("/healthz", _healthz(service)),
        Route("/openapi.json", _endpoint(service, _openapi, is_open=True)),
        Route("/metrics", _endpoint(service, _metrics)),
        Route("/v1/models", _endpoint(service, _models)),
        Route("/v1/models/{model:path}", _endpoint(service, _model)),
        Route("/v1/completions", _endpoint(service, _completions), methods=["POST"]),
        Route("/v1/chat/completions", _endpoint(service, _chat), methods=["POST"]),
        Route("/v1/embeddings", _endpoint(service, _embeddings), methods=["POST"]),
        Route("/v1/attention", _endpoint(service, _attention), methods=["POST"]),
    ]
    check_host = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    handlers: Any = {HTTPException: _http_error, Exception: _server_error}
    return Starlette(routes=routes, middleware=[check_host], exception_handlers=handlers)


def _endpoint(
    service: Service, answer: Callable[[Service, Request], Awaitable[Response]], is_open: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """A route that checks the API key, turns errors into objects of the API, and counts."""

    async def run(request: Request) -> Response:
        began, path = time.monotonic(), request.scope["route"].path
        try:
            if not is_open:
                _check_key(service, request)
            response = await answer(service, request)
        except ApiError as error:
            response = _error(error)
        except UserError as error:
            response = _error(ApiError(400, str(error)))
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            service.metrics.requests.labels(path, 500).inc()
            raise
        service.metrics.requests.labels(path, response.status_code).inc()
        if not isinstance(response, _Events):
            service.metrics.response.labels(path).observe(time.monotonic() - began)
        return response

    return run


def _error(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the request, if it comes, is nothing
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = _error(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _server_error(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "the server failed; its log has the details"))


def _check_key(service: Service, request: Request) -> None:
    key, header = service.settings.api_key, request.headers.get("Authorization", "")
    scheme, _, given = header.partition(" ")
    is_bearer = scheme.lower() == "bearer"  # RFC 9110: the case of a scheme has no meaning
    if key and not (is_bearer and secrets.compare_digest(given.strip().encode("latin-1"), key.encode())):
        message = "the API key is wrong" if is_bearer else "the API key is missing: send Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key")


async def _body(service: Service, request: Request, schema: schemas.Schema) -> dict[str, Any]:
    """The checked JSON object of a request. Raises: ApiError, UserError."""
    # A page of another site can send other types without asking the browser's user.
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type must be application/json")
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding: {encoding:.40} is not read here; send the body without an encoding")
    most, found, began = service.settings.max_body, bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(FIRST_SECONDS) as limit:
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise ApiError(413, f"the body has more than {most} bytes")
                limit.reschedule(began + FIRST_SECONDS + len(found) / LEAST_RATE)
    except TimeoutError:
        message = f"the body is too slow: {len(found)} bytes came, and at least {LEAST_RATE} bytes a second must come"
        raise ApiError(408, message) from None

    def read():
        body = untrusted.json_object(bytes(found), "the body", repeats=False)
        return checks.checked(body, schema)

    body = await anyio.to_thread.run_sync(read)  # some megabytes need a second, in which other replies go on
    api.check_model(service.served, body)
    return body


# Routes.


async def _page(request: Request) -> Response:
    html = pathlib.Path(__file__).with_name("page.html").read_bytes()
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Response(html, headers=headers, media_type="text/html")


def _healthz(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        status = service.failure or ("stopping" if service.stopping else "ok")
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    return run


async def _openapi(service: Service, request: Request) -> Response:
    return JSONResponse(schemas.openapi())


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def _model(service: Service, request: Request) -> Response:
    api.check_model(service.served, {"model": request.path_params["model"]})
    return JSONResponse(_described(service))


def _described(service: Service) -> dict[str, Any]:
    served = service.served
    found = {"id": served.name, "object": "model", "created": served.created, "owned_by": "nanoflax"}
    # For the page: whether the model can chat, and the settings that a request need not give.
    settings = {name: value for name, value in served.defaults.items() if name in programs.FILTERS}
    chat = service.engine is not None and served.tokenizer.chat_template is not None
    found |= {"chat": chat, "reads_source": served.config.reads_source, "settings": settings}
    return found | {"attention": forms.attention_layers(served.config)}


async def _completions(service: Service, request: Request) -> Response:
    body = await _body(service, request, schemas.COMPLETION)
    _check_generates(service)
    service.check_room(1)  # a request that will be refused need not be tokenized
    choices = await anyio.to_thread.run_sync(api.completion_choices, service.served, body)
    return await _reply(service, request, body, choices, chat=False)


async def _chat(service: Service, request: Request) -> Response:
    body = await _body(service, request, schemas.CHAT)
    _check_generates(service)
    service.check_room(1)  # a request that will be refused need not be tokenized
    choices = await anyio.to_thread.run_sync(api.chat_choices, service.served, body)
    return await _reply(service, request, body, choices, chat=True)


def _check_generates(service: Service) -> None:
    if service.engine is None:
        raise ApiError(400, f"{service.served.name} generates no text; use /v1/embeddings", "model")


async def _embeddings(service: Service, request: Request) -> Response:
    body = await _body(service, request, schemas.EMBEDDING)
    if service.embedder is None:
        raise ApiError(400, f"{service.served.name} has no embeddings of texts; use an encoder", "model")
    service.check_room(1)
    texts = await anyio.to_thread.run_sync(api.embedding_ids, service.served, service.embedder.ids, body)
    parts, vectors = [texts[i : i + PART] for i in range(0, len(texts), PART)], []
    service.check_room(len(parts))  # a part is as much work as a text to generate
    service.unfinished += len(parts)
    try:
        for part in parts:
            if await request.is_disconnected():
                raise ClientDisconnect
            async with service.embedding:  # one after another: they would only slow each other down
                vectors.append(await anyio.to_thread.run_sync(service.embedder, part))
    finally:
        service.unfinished -= len(parts)
    service.metrics.embedded_tokens.inc(sum(map(len, texts)))
    return JSONResponse(forms.embeddings(service.served, body, texts, np.concatenate(vectors)))


async def _attention(service: Service, request: Request) -> Response:
    body = await _body(service, request, schemas.ATTENTION)
    _check_generates(service)
    assert service.engine
    service.check_room(1)
    asked = await anyio.to_thread.run_sync(api.attention_request, service.served, body)
    service.unfinished += 1
    try:
        found = await _unless_client_leaves(request, attention_of(service.engine, asked))
    finally:
        service.unfinished -= 1
    return JSONResponse(forms.attention_weights(service.served, body, asked, found))


# Replies.


async def _reply(
    service: Service, request: Request, body: dict[str, Any], choices: list[Choice], chat: bool
) -> Response:
    with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    if with_usage and not body.get("stream"):
        raise ApiError(400, "stream_options: needs stream=true", "stream_options")
    form, replies = forms.Form(service.served, choices, chat, with_usage), service.start(choices)
    if body.get("stream"):
        return _Events(service, replies, form)
    try:
        pieces = await _unless_client_leaves(request, _collected(service, replies))
    finally:
        service.end(replies)
    return JSONResponse(form.whole(pieces))


async def _collected(service: Service, replies: Replies) -> list[list[Piece]]:
    found: list[list[Piece]] = [[] for _ in replies.choices]
    async for index, piece in replies:
        _time_to_first(service, replies, index, found[index])
        found[index].append(piece)
    return found


def _time_to_first(service, replies, index, earlier):
    if not earlier:
        service.metrics.first_text.observe(time.monotonic() - replies.choices[index].submitted)


async def _unless_client_leaves(request: Request, work: Any) -> Any:
    """The result of a coroutine, which is cancelled if the client closes its connection.

    Raises: ClientDisconnect.
    """

    async def left():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


class _Events(StreamingResponse):
    """A reply as server-sent events. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    def __init__(self, service: Service, replies: Replies, form: forms.Form) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.service, self.replies, self.form, self.began = service, replies, form, time.monotonic()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.end(self.replies)  # also if the client has left
            self.service.metrics.response.labels(scope["route"].path).observe(time.monotonic() - self.began)

    async def _events(self) -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            for chunk in self.form.first_chunks():
                yield _event(chunk)
            async for index, piece in self.replies:
                _time_to_first(self.service, self.replies, index, index in begun)
                begun.add(index)
                if chunk := self.form.chunk(index, piece):
                    yield _event(chunk)
            for chunk in self.form.last_chunks():
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
