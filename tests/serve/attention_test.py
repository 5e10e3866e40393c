"""/v1/attention, and the token ids with which it is asked."""

import jax
import numpy as np
import openai
import pytest

from nanoflax import nn, tokenizers
from nanoflax.config import ModelConfig, RecurrentConfig
from nanoflax.serve import attention
from nanoflax.serve.prefixes import Prefixes
from tests.serve.http_test import post
from tests.serve.servers import running, tiny

HELLO = [{"role": "user", "content": "Hello there"}]


def ask(client, **body):
    return client.post("/attention", body=body, cast_to=object)


def test_the_attention_for_a_token_of_a_reply(client, run):
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
    )
    prompt, ids = reply.prompt_token_ids, reply.choices[0].token_ids
    assert prompt == tokenizers.chat_prompt(run.tokenizer, HELLO) and len(ids) >= 3
    found = ask(client, prompt=prompt, completion=ids, position=2)
    read = [*prompt, *ids[:2]]
    [layer], _ = jax.jit(lambda params, ids: nn.attention_weights(run.model, params, ids))(run.params, np.array([read]))
    np.testing.assert_allclose(found["weights"], np.asarray(layer)[0, :, -1].mean(0), atol=2e-6)
    assert found["rest"] == pytest.approx(0, abs=1e-5) and found["layer"] is found["head"] is None
    assert run.tokenizer.decode(read) == "".join(
        text for i, text in enumerate(found["tokens"]) if i not in found["special"]
    )
    special = run.tokenizer.special.values()
    assert found["special"] == [at for at, i in enumerate(read) if i in special] != []
    one = ask(client, prompt=prompt, completion=ids[:2], layer=0, head=1)
    np.testing.assert_allclose(one["weights"], np.asarray(layer)[0, 1, -1], atol=2e-6)
    assert (one["layer"], one["head"]) == (0, 1) and one["tokens"] == found["tokens"]
    assert len(ask(client, prompt="ab")["weights"]) == 2
    described = client.models.retrieve("tiny").attention
    assert described == {"layers": [{"index": 0, "type": "full"}], "heads": 2, "missing": ""}


def test_token_ids_have_the_places_that_vllm_gives_them(client, run):
    ids, more = run.tokenizer.encode("ab"), {"return_token_ids": True}
    settings = dict(model="tiny", prompt="ab", max_tokens=8, seed=1, extra_body=more)
    reply = client.completions.create(**settings, n=2)
    assert all(choice.prompt_token_ids == ids for choice in reply.choices)
    assert sum(len(choice.token_ids) for choice in reply.choices) == reply.usage.completion_tokens
    chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
    assert chunks[0].prompt_token_ids == ids and not hasattr(chunks[1], "prompt_token_ids")
    assert [i for chunk in chunks for i in chunk.token_ids] == reply.choices[0].token_ids
    echoed = client.completions.create(**settings, echo=True)
    assert echoed.choices[0].token_ids == reply.choices[0].token_ids and echoed.choices[0].text.startswith("ab")
    chat = dict(model="tiny", messages=HELLO, max_tokens=8, temperature=0)
    whole = client.chat.completions.create(**chat, extra_body=more)
    chunks = [*client.chat.completions.create(**chat, stream=True, extra_body=more)]
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    found = [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", [])]
    assert found == whole.choices[0].token_ids and len(found) == whole.usage.completion_tokens
    assert not hasattr(client.chat.completions.create(**chat).choices[0], "token_ids")


@pytest.mark.parametrize(
    "param, words, body",
    [
        ("prompt", "is missing", {}),
        ("prompt", "wrong form", dict(prompt=3)),
        ("prompt", "must not be empty", dict(prompt=[])),
        ("prompt", "not in the vocabulary", dict(prompt=[10**6])),
        ("prompt", "are 257, but the model's context is 256", dict(prompt=[1] * 200, completion=[1] * 56)),
        ("completion", "not in the vocabulary", dict(prompt="a", completion=[10**6])),
        ("completion", "must be a list or null", dict(prompt="a", completion="b")),
        ("position", "after the completion's 2 tokens", dict(prompt="a", completion=[1, 2], position=3)),
        ("position", "must be at least 0", dict(prompt="a", position=-1)),
        ("position", "must be an integer or null", dict(prompt="a", position=True)),
        ("layer", "none of the layers with attention: 0", dict(prompt="a", layer=1)),
        ("head", "below the number of heads, 2", dict(prompt="a", head=2)),
        ("heads", "not a field", dict(prompt="a", heads=1)),
        ("model", "not served here", dict(prompt="a", model="another")),
    ],
)
def test_a_mistake_is_an_error_that_names_the_field(client, param, words, body):
    with pytest.raises(openai.NotFoundError if "model" in body else openai.BadRequestError, match=words) as error:
        ask(client, **body)
    assert param in (error.value.param, str(error.value.param).split("[")[0])


def test_a_context_full_of_tokens_and_the_limits(client, server, monkeypatch):
    assert len(ask(client, prompt=[1] * 200, completion=[2] * 55)["weights"]) == 255
    address, service = server
    monkeypatch.setattr(service, "unfinished", 10**6)
    status, text = post(address, {"prompt": "a"}, "/v1/attention")
    assert status == 429 and "queue_full" in text


MAMBA = dict(
    layer_types=("mamba2", "full"), layers=2, positions="rotary",
    recurrent=RecurrentConfig(heads=4, groups=2, key_dim=8, value_dim=6, chunk=8))  # fmt: skip


@pytest.mark.parametrize(
    "model, layers, words",
    [
        (MAMBA, [(1, "full")], "some layers (mamba2) keep a state and have no attention"),
        (MAMBA | {"layer_types": ("mamba2",)}, [], "all layers (mamba2) keep a state and have no attention"),
        (dict(layers=3, layer_types=("sliding", "full")), [(0, "sliding"), (1, "full"), (2, "sliding")], ""),
        (dict(architecture="encoder_decoder", layers=1, decoder_layers=2), [(0, "full"), (1, "full")], ""),
        (dict(architecture="lstm"), [(0, "full")], ""),
        (dict(architecture="lstm", bottleneck="mean"), [], "reads one vector of its source"),
        (dict(architecture="encoder", head="mlm"), [], "generates no text"),
    ],
    ids=["hybrid", "mamba2", "windows", "encoder-decoder", "lstm", "bottleneck", "encoder"],
)
def test_what_a_model_has(model, layers, words):
    found = attention.layers_of(ModelConfig(**model))
    assert [*found.kinds.items()] == layers and words in found.missing and bool(words) == bool(found.missing)
    assert bool(found.heads) == bool(layers)


def test_the_alignment_of_a_source():
    run, more = tiny(architecture="lstm"), {"return_token_ids": True}
    with (
        running(run, slots=1, name="tiny") as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        [choice] = client.completions.create(
            model="tiny", prompt="a source", max_tokens=9, temperature=0, logit_bias={"1": -100}, extra_body=more
        ).choices
        source, ids = choice.prompt_token_ids, choice.token_ids
        assert len(ids) == 9
        expected = nn.alignment(run.model, run.params, source, ids)
        for position in (0, 8):
            found = ask(client, prompt=source, completion=ids, position=position)
            np.testing.assert_allclose(found["weights"], expected[position], atol=2e-6)
            assert len(found["tokens"]) == len(source)
        with pytest.raises(openai.BadRequestError, match="context is 256"):
            ask(client, prompt=source, completion=[1] * 256)


def test_a_model_without_attention_says_so():
    shape = MAMBA | {"layer_types": ("mamba2",)}
    with (
        running(tiny(**shape, norm="rmsnorm"), slots=1, name="tiny") as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="has no attention to show: all layers") as error:
            ask(client, prompt="a")
        assert error.value.code == "no_attention"


def test_a_longer_cache_replaces_those_of_its_beginnings():
    prefixes, text = Prefixes(2, exact=False, step=4), [*range(40)]
    for n, name in ((30, "other"), (8, "short"), (20, "long"), (12, "shorter again")):
        prefixes.add([100] * n if name == "other" else text[:n], name)
    assert prefixes.find(text) == ("long", 20, 20) and prefixes.find(text[:10]) == ("long", 10, 10)
    assert prefixes.find([*text[:10], -1]) == ("long", 8, 10) and prefixes.find([100] * 7)[0] == "other"
    exact = Prefixes(2, exact=True, step=4)
    for n in (8, 20):
        exact.add(text[:n], n)
    assert exact.find(text[:10]) == (8, 8, 10) and exact.find(text) == (20, 20, 20)
