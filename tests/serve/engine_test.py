"""The engine: every reply equals `sample` alone, whatever arrives when."""

import queue

import jax
import numpy as np
import pytest

from nanoflax import generate
from nanoflax.serve import Engine, Finish, Request
from tests.generate.sampling_test import make


class Reply:
    """Collects a reply."""

    def __init__(self, engine, **request):
        self.request, self.events = Request(**request), queue.SimpleQueue()
        self.ticket = engine.submit(self.request, self.events.put)

    def wait(self):
        """(tokens, Finish)."""
        tokens = []
        while not isinstance(event := self.events.get(timeout=120), Finish):
            tokens.append(event)
        return tokens, event


def alone(model, params, r, eos_ids=(), **options):
    settings = {name: getattr(r, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    settings |= options | ({"logit_bias": r.logit_bias} if r.logit_bias else {})
    [found] = generate.sample(
        model, params, [list(r.prompt)], r.max_new_tokens, rng=jax.random.PRNGKey(r.seed), eos_id=eos_ids, **settings
    )
    return found


def mixed_requests(rng, n, vocab=29, longest=30, new=(1, 9)):
    for i in range(n):
        prompt = rng.integers(0, vocab, rng.integers(1, longest)).tolist()
        kind = i % 3
        settings = [dict(temperature=0), dict(temperature=0.7, seed=i), dict(temperature=1.5, top_k=5, top_p=0.9)][kind]
        yield dict(prompt=prompt, max_new_tokens=int(rng.choice(new)), **settings)


@pytest.fixture(scope="module")
def decoder():
    model, params = make()
    with Engine(model, params, None, slots=3) as engine:
        yield model, params, engine


def test_replies_equal_sample_alone(decoder):
    model, params, engine = decoder
    replies = [Reply(engine, **r) for r in mixed_requests(np.random.default_rng(0), 12)]
    for reply in replies:
        tokens, finish = reply.wait()
        assert [t.id for t in tokens] == alone(model, params, reply.request)
        assert finish == Finish("length")
