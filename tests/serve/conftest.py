"""A server of a tiny chat model, and a client of it."""

import openai
import pytest

from nanoflax import tokenizers
from tests.serve.servers import SPECIAL, TOOL_TEMPLATE, running, tiny, tiny_chat
from tests.tokenizers.chat_test import make


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="package")
def server(run):
    with running(run, slots=2, queue=4, max_tokens=200, max_body=100_000) as found:
        yield found


@pytest.fixture(scope="package")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def long(run):
    """Settings of a text that has 200 tokens."""
    ends = {str(i): -100 for i in tokenizers.stop_ids(run.tokenizer)}
    return dict(model="tiny", prompt="ab", max_tokens=200, temperature=0, logit_bias=ends)


@pytest.fixture(scope="package")
def tool_client(tmp_path_factory):
    """A client of a server whose chat template has calls of tools."""
    tokenizer, _ = make(tmp_path_factory.mktemp("tokenizer"), SPECIAL, TOOL_TEMPLATE)
    with (
        running(tiny(tokenizer, context=2048), slots=4, max_tokens=800) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
