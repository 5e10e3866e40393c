"""The HTTP server, as the `openai` client sees it."""

import jax
import openai
import pytest

import nanoflax
from nanoflax import tokenizers
from tests.serve.servers import running, tiny_chat


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def address(run):
    with running(run, slots=2) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "Hello there"}]


def expected(run, ids, new, seed=0, **settings):
    """The text of `nanoflax.sample` alone."""
    rng = jax.random.PRNGKey(seed)
    [found] = nanoflax.sample(
        run.model, run.params, [ids], new, rng=rng, eos_id=tokenizers.stop_ids(run.tokenizer),
        vocab_size=run.tokenizer.vocab_size, **settings,
    )  # fmt: skip
    return "".join(tokenizers.decode_parts(run.tokenizer, [ids, found])).removeprefix(run.tokenizer.decode(ids))


def test_chat_and_its_stream_are_the_text_of_sample(client, run):
    assert [model.id for model in client.models.list()] == ["tiny"]
    ids = tokenizers.chat_prompt(run.tokenizer, HELLO)
    settings = dict(model="tiny", messages=HELLO, max_tokens=12)
    for sampling in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=3)):
        reply = client.chat.completions.create(**settings, **sampling)
        [choice] = reply.choices
        assert choice.message.content == expected(run, ids, 12, **sampling)
        assert choice.finish_reason in ("length", "stop")
        assert reply.usage.prompt_tokens == len(ids) and reply.usage.completion_tokens <= 12
        stream = list(
            client.chat.completions.create(**settings, **sampling, stream=True, stream_options={"include_usage": True})
        )
        assert stream[-1].usage == reply.usage and not stream[-1].choices
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == choice.message.content
        assert [chunk.choices[0].finish_reason for chunk in stream[:-1]][-1] == choice.finish_reason
