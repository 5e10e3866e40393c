"""Serves an opened model until a signal arrives."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanoflax import runs, tokenizers
from nanoflax.errors import UserError
from nanoflax.serve.engine import Engine
from nanoflax.serve.settings import Settings

LOCAL = ("127.0.0.1", "::1", "localhost")  # hosts that only this machine reaches
STOPPING_SECONDS = 300  # a client that does not read its reply must not keep the server from ending


def check_installed() -> None:
    """Raises: UserError if the packages of the extra `serve` are missing."""
    missing = [
        name
        for name in ("jsonschema", "llguidance", "prometheus_client", "starlette", "uvicorn")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'nanoflax[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free port. Raises: UserError if this is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"host={host}, port={port}: cannot listen there: {error.strerror}") from error


@contextlib.contextmanager
def service_of(run: Any, settings: Settings) -> Iterator[Any]:
    """The http.Service of a Run, whose engine runs inside the context.

    Raises: UserError for a model without a tokenizer, or that neither generates text nor has embeddings.
    """
    check_installed()
    from nanoflax.serve import embeddings, forms, http

    config, tokenizer = run.model.config, run.tokenizer
    generates, embeds = config.head == "lm", embeddings.can_embed(config)
    if tokenizer is None:
        raise UserError(f"{run.source} has no tokenizer that nanoflax can read")
    if not generates and not embeds:
        raise UserError(f"{run.source} has model.head={config.head!r}: it generates no text and has no embeddings")
    if generates:
        tokenizers.check_prompts(config, [[tokenizer.bos_id]], 1)  # its generation settings can be followed
    embedder = None
    if embeds:
        embedder = embeddings.Embedder(
            run.model, run.params, tokenizer, embeddings.pooling_of(run.workdir or run.source)
        )
        embedder.compile()
    name = settings.name or os.path.basename(os.path.normpath(run.source)).removesuffix(".gguf")
    with contextlib.ExitStack() as stack:
        engine, context = None, config.max_length
        if generates:
            engine = stack.enter_context(Engine(run.model, run.params, tokenizer, settings.slots, settings.context))
            context = engine.context
        defaults = runs.model_settings(config.generation)
        texts, started = forms.TokenTexts(tokenizer), int(time.time())
        served = forms.Served(name, config, tokenizer, texts, context, defaults, settings.max_tokens, started)
        yield http.Service(served, engine, embedder, settings)


def serve(run: Any, listener: socket.socket, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve a Run over HTTP until SIGTERM or SIGINT: then texts that have begun are finished, others refused.

    ready: called with the address of the server when it accepts requests. Call this in the main thread.
    Raises: UserError, see `service_of`.
    """
    with service_of(run, settings) as service:
        asyncio.run(_serve(service, listener, ready))


async def _serve(service: Any, listener: socket.socket, ready: Callable[[str], None]) -> None:
    import uvicorn

    from nanoflax.serve import connections, http

    loop, (host, port, *_) = asyncio.get_running_loop(), listener.getsockname()

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):  # a second Ctrl-C ends at once
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            loop.call_soon_threadsafe(service.stop, self.force_exit)

        async def startup(self, sockets=None):
            await super().startup(sockets)
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    # A page of another site must not reach a local server under a name of that site (DNS rebinding).
    app = http.make_app(service, (*LOCAL, "[::1]") if host in LOCAL else ("*",))
    settings: Any = dict(log_level="warning", lifespan="off", access_log=False, server_header=False)
    settings["http"] = connections.Connection
    settings["timeout_graceful_shutdown"] = STOPPING_SECONDS
    await Server(uvicorn.Config(app, **settings)).serve([listener])
