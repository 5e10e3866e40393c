"""Servers of tiny models in a thread of the test's process."""

import contextlib
import importlib.util
import pathlib
import threading
import time
import types

import jax
import uvicorn

import nanoflax
from nanoflax import serve, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.serve import connections, http
from tests.tokenizers.chat_test import TEMPLATES, make, without_marks

# Qwen's.
TOOL_TEMPLATE = (
    pathlib.Path(importlib.util.find_spec("trl").origin)
    .with_name("chat_templates")
    .joinpath("qwen2_5.jinja")
    .read_text()
)
SPECIAL, CHATML = TEMPLATES["eos is another token than the end of a reply"]


def tiny_chat(directory, seed=0, **model):
    """A Run of a random decoder whose tokenizer has a chat template."""
    tokenizer, _ = make(directory, SPECIAL, without_marks(CHATML))
    return tiny(tokenizer, seed, **model)


def tiny(tokenizer=None, seed=0, **model):
    """A Run of a random model; by default a decoder of bytes."""
    tokenizer = tokenizer or tokenizers.ByteTokenizer()
    shape = dict(layers=1, dim=32, heads=2, context=256, vocab_size=tokenizer.vocab_size)
    found = nanoflax.build(ModelConfig(**(shape | model)))
    params = nanoflax.init(found, jax.random.PRNGKey(seed))
    return types.SimpleNamespace(workdir=None, source="runs/tiny", model=found, params=params, tokenizer=tokenizer)


@contextlib.contextmanager
def running(run, **settings):
    """(address, http.Service) of a server of the run."""
    with serve.service_of(run, serve.Settings(**settings)) as service, serve.listen("127.0.0.1", 0) as listener:
        app = http.make_app(service, ["127.0.0.1", "localhost"])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", http=connections.Connection))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join()


def until(condition, seconds=20):
    """Wait until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
