"""The engine: every reply equals `sample` alone, whatever arrives when, and nothing compiles or is lost."""

import contextlib
import functools
import gc
import os
import queue
import threading
import time

import jax
import jax.monitoring
import numpy as np
import pytest

from nanoflax import generate, nn, peft
from nanoflax.config import GenerationDefaults, LatentConfig, MoEConfig, PrefixTuning, PromptTuning, RecurrentConfig
from nanoflax.errors import UserError
from nanoflax.kernels import grouped
from nanoflax.serve import Engine, Finish, Request, attention
from nanoflax.serve.compiler import Compiler
from nanoflax.serve.programs import FILTERS, Programs
from tests.compiled import apply
from tests.generate import beams_test
from tests.generate.sampling_test import make

V = 29


class Reply:
    """Collects a reply."""

    def __init__(self, engine, **request):
        self.request, self.events = Request(**dict(max_new_tokens=3) | request), queue.SimpleQueue()
        self.ticket = engine.submit(self.request, self.events.put)

    def wait(self):
        """(tokens, Finish)."""
        tokens = []
        while not isinstance(event := self.events.get(timeout=120), Finish):
            tokens.append(event)
        return tokens, event

    def ids(self):
        tokens, finish = self.wait()
        assert finish.reason == "length", finish
        return [token.id for token in tokens]


def alone(model, params, requests, most=9, pad=30, **options):
    """The tokens of `sample` for each request: row by row drawn as if it were alone."""
    settings = {name: [getattr(r, name) for r in requests] for name in FILTERS}
    prompts, limits = [list(r.prompt) for r in requests], [r.max_new_tokens for r in requests]
    # One compilation for all tests of a model: a row more has the longest prompt and reply.
    settings = {name: [*values, None] for name, values in settings.items()}
    prompts, limits, seeds = [*prompts, [1] * pad], [*limits, most], [*(r.seed for r in requests), 0]
    biases = [*(dict(r.logit_bias) for r in requests), {}]
    options |= {"logit_bias": biases} if any(biases) else {}
    return generate.sample(model, params, prompts, limits, rng=seeds, eos_id=(), **settings, **options)[:-1]


def mixed(n, seed=0):
    """Fields of n requests of mixed lengths and settings."""
    rng = np.random.default_rng(seed)
    kinds = [
        dict(temperature=0),
        dict(temperature=0.7),
        dict(temperature=1.5, top_k=5, top_p=0.9),
        dict(temperature=0, repetition_penalty=1.3),
        dict(min_p=0.2, logit_bias={3: 2.5, 7: -100}),
        dict(temperature=1.2, typical_p=0.4),
        dict(top_h=0.5, top_k=20),
        dict(epsilon_cutoff=0.03, eta_cutoff=0.2),
    ]
    for i in range(n):
        prompt = rng.integers(0, V, rng.integers(1, 31)).tolist()
        yield dict(prompt=prompt, max_new_tokens=int(rng.integers(1, 10)), seed=i - 3, **kinds[i % len(kinds)])


def check_mixed(engine, model, params, n=10):
    replies = [Reply(engine, **fields) for fields in mixed(n)]
    found = [reply.ids() for reply in replies]
    assert found == alone(model, params, [reply.request for reply in replies])


@pytest.fixture
def compilations():
    found = []
    listen = lambda event, *_, **__: found.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: [event for event in found if event.startswith("/jax/core/compile/backend")]
    jax.monitoring.unregister_event_duration_listener(listen)  # and not those of the library


@pytest.fixture(scope="module")
def decoder():
    model, params = make()
    with Engine(model, params, None, slots=3) as engine:
        engine._programs.compiler.get("attention", engine._programs.sizes[-1])  # the last that is compiled
        yield model, params, engine


def test_replies_equal_sample_alone_whatever_arrives_when(decoder, compilations):
    model, params, engine = decoder
    replies, before = [], compilations()
    for i, fields in enumerate(mixed(25)):
        replies.append(Reply(engine, **fields))
        if i % 4 == 3:  # its first token is there before the next request comes
            events = replies[-2].events
            while events.empty():
                time.sleep(0.001)
    found = [reply.ids() for reply in replies]
    assert compilations() == before
    requests = [reply.request for reply in replies]
    assert found == alone(model, params, requests)
    assert len({tuple(ids) for ids in found}) > 15
    assert engine.counts["steps"] < sum(r.max_new_tokens for r in requests) / 1.5  # they shared steps


def test_presence_and_frequency_penalties_are_those_of_a_loop(decoder, compilations):
    """Beside replies without them. Only new tokens count."""
    model, params, engine = decoder
    pairs = [(0, 0), (2, 0), (0, 2), (1.5, 0.75), (-2, 0), (0, -0.5)]
    prompt, new, before = [3, 3, 3, 7, 7, 11], 30, compilations()
    more = [dict(presence_penalty=p, frequency_penalty=f) for p, f in pairs]
    replies = [Reply(engine, prompt=prompt, max_new_tokens=new, temperature=0, **fields) for fields in more]
    found = [reply.ids() for reply in replies]
    assert compilations() == before
    run, expected = jax.jit(lambda ids: model.apply({"params": params}, ids)[0][0]), []
    for presence, frequency in pairs:
        ids, counts = [*prompt], np.zeros(V)
        for _ in range(new):
            padded = np.array([[*ids, *[0] * (len(prompt) + new - len(ids))]])
            logits = np.asarray(run(padded))[len(ids) - 1]
            ids.append(int(np.argmax(logits - frequency * counts - presence * (counts > 0))))
            counts[ids[-1]] += 1
        expected.append(ids[len(prompt) :])
    assert found == expected and len({*map(tuple, found)}) == len(pairs)
    with pytest.raises(UserError, match="frequency_penalty must be finite"):
        Reply(engine, prompt=prompt, frequency_penalty=np.inf)


def test_log_probabilities_equal_those_of_score(decoder):
    model, params, engine = decoder
    [fields] = mixed(1, seed=4)
    prompt = fields["prompt"]
    reply = Reply(engine, prompt=prompt, max_new_tokens=8, seed=1, log_probabilities=4, prompt_log_probabilities=True)
    tokens, _ = reply.wait()
    ids = [token.id for token in tokens]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 8
    assert [token.of_prompt for token in tokens] == [True] * len(prompt) + [False] * 8
    logits, _ = apply(model, params, np.array([ids]))
    logp = np.asarray(jax.nn.log_softmax(logits[0]))
    assert tokens[0].log_probability is None
    for i, token in enumerate(tokens[1:]):
        np.testing.assert_allclose(token.log_probability, logp[i, token.id], atol=1e-5)
        best = np.argsort(-logp[i])[:4]
        assert [*token.alternatives] == best.tolist()
        np.testing.assert_allclose([*token.alternatives.values()], logp[i, best], atol=1e-5)
    only, finish = Reply(engine, prompt=prompt, max_new_tokens=0, prompt_log_probabilities=True).wait()
    assert [t.id for t in only] == prompt and finish == Finish("length") and not only[-1].alternatives
    np.testing.assert_allclose(only[-1].log_probability, tokens[len(prompt) - 1].log_probability, atol=1e-6)


def test_a_shared_beginning_is_read_once(decoder):
    model, params, engine = decoder
    system = np.random.default_rng(9).integers(0, V, 37).tolist()
    requests = [dict(prompt=[*system, i, i + 1], max_new_tokens=5, temperature=0) for i in range(6)]
    first = Reply(engine, **requests[0])
    found, before = [first.ids()], dict(engine.counts)
    replies = [Reply(engine, **fields) for fields in requests[1:]]
    found += [reply.ids() for reply in replies]
    assert engine.counts["reused_tokens"] - before["reused_tokens"] == 5 * 32
    assert found == alone(model, params, [first.request, *(reply.request for reply in replies)])


class OneOf:
    """A constraint: one of some texts, and then the end."""

    def __init__(self, texts, end):
        self.texts, self.end, self.written = texts, end, []

    def allowed(self):
        n = len(self.written)
        texts = [text for text in self.texts if text[:n] == self.written]
        bits = np.zeros(32, np.uint32)
        bits[[text[n] if n < len(text) else self.end for text in texts]] = 1
        return np.packbits(bits.astype(bool), bitorder="little").view(np.uint32)

    def accept(self, token):
        self.written.append(token)


def test_constraints_hold_beside_free_replies(decoder):
    model, params, engine = decoder
    texts = [[1, 2, 3], [1, 4], [5, 6, 7, 8]]
    fields = [*mixed(4)]
    free = [Reply(engine, **f) for f in fields]
    bound = [
        Reply(engine, prompt=[3, i], temperature=9.0, seed=i, constraint=OneOf(texts, end=2), max_new_tokens=6)
        for i in range(8)
    ]
    assert [reply.ids() for reply in free] == alone(model, params, [reply.request for reply in free])
    found = [[token.id for token in reply.wait()[0]] for reply in bound]
    assert all(any(ids[: len(text)] == text for text in texts) for ids in found)
    assert len({tuple(ids) for ids in found}) > 1


def test_a_constraint_that_fails_ends_only_its_reply(decoder):
    model, params, engine = decoder
    wrong = OneOf([[1]], end=2)
    wrong.allowed = lambda: np.ones(99, np.uint32)  # more words than the vocabulary has
    [fields] = mixed(1)
    free, bound = Reply(engine, **fields), Reply(engine, prompt=[3], constraint=wrong)
    assert bound.wait()[1].reason == "refused"
    assert [free.ids()] == alone(model, params, [free.request])


def test_cancelled_replies_free_their_slots(decoder):
    _, _, engine = decoder
    replies = [Reply(engine, prompt=[i, 2], max_new_tokens=60) for i in range(8)]
    while not engine.active:
        time.sleep(0.001)
    for reply in replies:
        reply.ticket.cancel()
    assert {reply.wait()[1].reason for reply in replies} == {"cancelled"}
    before = engine.counts["steps"]
    assert len(Reply(engine, prompt=[1], max_new_tokens=4).ids()) == 4
    assert engine.counts["steps"] <= before + 6 and engine.active == 0


def test_a_receiver_that_fails_stops_only_its_reply(decoder, capsys):
    _, _, engine = decoder

    def receive(_):
        raise RuntimeError("the client is gone")

    engine.submit(Request([1, 2], max_new_tokens=50), receive)
    assert len(Reply(engine, prompt=[1], max_new_tokens=4).ids()) == 4
    assert "the client is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(prompt=[]), "prompt 0 is empty"),
        (dict(prompt=[V]), f"token id {V}, outside"),
        (dict(prompt=[1, V], max_new_tokens=0, prompt_log_probabilities=True), f"token id {V}, outside"),
        (dict(prompt=[1] * 65, max_new_tokens=0, prompt_log_probabilities=True), "model's context of 64"),
        (dict(prompt=[1] * 60, max_new_tokens=9), "exceeds the model's context of 64"),
        (dict(prompt=[1], max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(prompt=[1], temperature=-1.0), "temperature=-1.0 must be at least 0"),
        (dict(prompt=[1], log_probabilities=21), "log_probabilities=21 must be from 0 to 20"),
        (dict(prompt=[1], logit_bias={V: 1.0}), f"logit_bias has id {V}"),
        (dict(prompt=[1], seed=2**64), "must be a 64-bit integer"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_by_one_line(decoder, fields, words):
    with pytest.raises(UserError) as caught:
        Reply(decoder[2], **fields)
    assert words in str(caught.value)


RULES = GenerationDefaults(
    typical_p=0.9, eta_cutoff=0.01, top_h=0.95, encoder_repetition_penalty=1.4, encoder_no_repeat_ngram_size=3,
    sequence_bias=(((4,), 1.5), ((3, 7), -2.0)),
)  # fmt: skip
FAMILIES = {
    "recurrent": dict(
        layers=3, layer_types=("delta", "mamba2", "full"), output_delay=2, positions="rotary", norm="rmsnorm",
        recurrent=RecurrentConfig(heads=4, groups=2, key_dim=8, value_dim=6, chunk=8, conv_bias=True)),
    "latent experts": dict(
        positions="rotary", norm="rmsnorm", bias=False, moe=MoEConfig(experts=4, active=2),
        latent=LatentConfig(rank=12, rope_dim=4, value_dim=8)),
    "windows, tied": dict(layer_types=("sliding", "full"), window=7, positions="rotary", tied=True, kv_heads=2,
                          generation=RULES),
    "encoder_decoder": None,
    "lstm": None,
}  # fmt: skip


def check_attention(engine, model, params, trained=False):
    """The weights of the next token, from caches, are those of a pass over the whole text. trained: some are of trained
    vectors."""
    rng, shown = np.random.default_rng(5), attention.layers_of(model.config)
    text, target = rng.integers(0, V, 29).tolist(), rng.integers(0, V, 19).tolist()
    weights = jax.jit(lambda params, *inputs: nn.attention_weights(model, params, *inputs)[0])
    if model.config.reads_source:
        layers = weights(params, np.array([[model.config.start_id, *target]]), np.array([text]))
    else:
        layers, target = weights(params, np.array([text])), []
    assert len(layers) == len(shown.kinds) and layers[0].shape[1] == shown.heads
    last, counts = np.stack(layers)[:, 0, :, -1, -len(text) :], dict(engine.counts)
    for layer, head, want in ((None, None, last.mean((0, 1))), ([*shown.kinds][-1], shown.heads - 1, last[-1, -1])):
        factors = attention.factors(shown, layer, head)
        reply = Reply(engine, prompt=text, target=target, max_new_tokens=0, attention=factors)
        [found], finish = reply.wait()
        np.testing.assert_allclose(found.weights, want, atol=1e-6)
        assert finish == Finish("length") and len(found.weights) == len(text)
    assert (last.sum(-1).min() < 0.99) == trained and last.sum(-1).max() <= 1 + 1e-5
    # The text is read for the first request alone.
    assert engine.counts["reused_tokens"] - counts["reused_tokens"] == (0 if model.config.reads_source else 28)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model(family):
    fields = FAMILIES[family]
    model, params = make(**fields) if fields else beams_test.make(family, generation=RULES)
    with Engine(model, params, None, slots=4) as engine:
        check_mixed(engine, model, params)
        if family == "recurrent":  # a shared beginning: its state is kept when the second prompt is read
            shared = np.random.default_rng(2).integers(0, V, 20).tolist()
            prompts = [[*shared, i, 1, 2] for i in range(4)]
            replies = [Reply(engine, prompt=p, max_new_tokens=4, temperature=0) for p in prompts]
            found = [reply.ids() for reply in replies]
            assert found == alone(model, params, [reply.request for reply in replies])
            assert engine.counts["reused_tokens"] == 2 * 20
        check_attention(engine, model, params)


@pytest.mark.parametrize("kind", ["", "int8"])
def test_experts_with_the_product_of_accelerators(kind, monkeypatch):
    fields = dict(positions="rotary", moe=MoEConfig(experts=4, active=2, dense_layers=(0,), shared_dim=8))
    model, params = make(**fields)
    params = peft.quantize_params(params, kind) if kind else params
    calls = []
    monkeypatch.setattr(grouped, "by_block", lambda *arrays: calls.append(arrays) or grouped.ragged(*arrays))
    with Engine(model, params, None, slots=4) as engine:
        monkeypatch.undo()  # `generate.sample` computes by block
        assert calls
        check_mixed(engine, model, params)


@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
def test_attention_to_trained_tokens_is_that_to_no_token(kind):
    model, params = make(positions="rotary", kv_heads=2)
    params = peft.add(params, kind(virtual_tokens=3), jax.random.PRNGKey(1))
    with Engine(model, params, None, slots=1) as engine:
        check_attention(engine, model, params, trained=True)


def test_a_context_shorter_than_the_pieces_of_a_prompt():
    model, params = make(context=48)
    with Engine(model, params, None, slots=2) as engine:
        check_mixed(engine, model, params, 4)


def test_caches_grow_and_shrink_with_the_texts():
    model, params = make(context=300, positions="rotary")
    with Engine(model, params, None, slots=2) as engine:
        short, long = dict(prompt=[1, 2], max_new_tokens=9), dict(prompt=[3] * 250 + [4], max_new_tokens=9)
        replies = [Reply(engine, temperature=0, **fields) for fields in (short, long, short, short)]
        found = [reply.ids() for reply in replies]
        assert engine._programs.size_of(engine._state.cache, 1) in (256, 304) == engine._programs.sizes
        engine._programs.compiler.get("resize", 304, 256)
        Reply(engine, **short).ids()
        assert engine._programs.size_of(engine._state.cache, 1) == 256
    assert found == alone(model, params, [reply.request for reply in replies])


def test_short_prompts_do_not_wait_for_long_ones_which_get_half_of_the_pieces():
    model, params = make(context=600, positions="rotary")
    draw, pieces, done = np.random.default_rng(0), {}, queue.SimpleQueue()
    prompts = [draw.integers(0, V, n).tolist() for n in [500] * 4 + [20] * 20]
    with Engine(model, params, None, slots=3) as engine:
        for name in [*engine._programs.compiler._found]:
            engine._programs.compiler.get(*name)

        def receive(i, event):
            pieces.setdefault(i, engine.counts["pieces"])
            if isinstance(event, Finish):
                done.put(i)

        def submit_all(event):  # in the thread of the engine, so that all come at once
            if isinstance(event, Finish):
                pieces["before"] = engine.counts["pieces"]
                for i, prompt in enumerate(prompts):
                    engine.submit(Request(prompt, 1), functools.partial(receive, i))

        engine.submit(Request([1], 1), submit_all)
        for _ in prompts:
            done.get(timeout=120)
    first = {i: n - pieces["before"] for i, n in pieces.items()}
    assert first[4] <= 3 and first[6] <= 12  # a short one has two pieces, a long one eight
    assert 12 <= first[0] <= 18 and first[1] <= 36  # while short ones wait


def test_a_long_text_that_comes_first_waits_alone_and_for_its_own_functions(monkeypatch):
    """Functions for long texts are compiled only after a signal: short texts go on, and the compiler is the only thread
    that compiles."""
    opened, order, threads, add = threading.Event(), [], set(), Compiler.add

    def gated(self, name, compile_):
        def run():
            short = name[1] == 256 and (name[0] not in ("copy", "resize") or name[2] == 256)
            if not short or name[0] == "attention":  # which a text does not need
                opened.wait()
            order.append(name)
            return compile_()

        add(self, name, run)

    monkeypatch.setattr(Compiler, "add", gated)
    model, params = make(layers=1, dim=8, heads=2, context=1100, positions="rotary")
    prompts = [np.random.default_rng(i).integers(0, V, n).tolist() for i, n in enumerate((1050, 700, 900, 800, 30, 20))]
    with Engine(model, params, None, slots=2) as engine, contextlib.ExitStack() as stack:
        assert engine._programs.sizes == (256, 1024, 1104)
        stack.callback(opened.set)
        started = len(order)
        listen = lambda event, *_, **__: threads.add(threading.current_thread().name) if "backend" in event else None
        jax.monitoring.register_event_duration_secs_listener(listen)
        stack.callback(jax.monitoring.unregister_event_duration_listener, listen)
        long = [Reply(engine, prompt=prompt, temperature=0) for prompt in prompts[:4]]
        short = [Reply(engine, prompt=prompt, temperature=0) for prompt in prompts[4:]]
        found = [reply.ids() for reply in short]
        assert engine.counts["pieces"] > 2 * 256 / 64  # the long ones have read what they can
        gone = Reply(engine, prompt=prompts[0][1:])
        gone.ticket.cancel()
        assert gone.wait()[1].reason == "cancelled" and len(order) == started
        opened.set()
        found = [reply.ids() for reply in long] + found
        first = order[started + 1 : started + 6]  # after the one that was at its turn
    assert found == alone(model, params, [reply.request for reply in (*long, *short)], pad=1050)
    assert {*first} == {("piece", 1104, 64), ("copy", 256, 1104), ("step", 1104), ("resize", 256, 1104),
                        ("insert", 1104, 1104)}  # fmt: skip
    assert threads == {"compiler"}


def test_an_interruption_of_the_start_ends_the_compiler(monkeypatch):
    """A process that ends while a thread of it compiles is aborted."""
    before = {*threading.enumerate()}
    for name in ("start", "filters"):
        with monkeypatch.context() as patch:
            patch.setattr(Programs, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), Engine(*make(context=600), None):
                pass
        assert {*threading.enumerate()} <= before


def test_thousands_of_requests_lose_nothing(decoder):
    _, _, engine = decoder
    rng, done, ends = np.random.default_rng(1), threading.Semaphore(0), []

    def receive(event):
        if isinstance(event, Finish):
            ends.append(event.reason)
            done.release()

    def run(n):
        for i in range(n):
            request = Request(rng.integers(0, V, 3).tolist(), int(rng.integers(1, 4)), seed=i)
            ticket = engine.submit(request, receive)
            if i % 7 == 0:
                ticket.cancel()
        for _ in range(n):
            assert done.acquire(timeout=120)
        gc.collect()
        return len(jax.live_arrays()), len(os.listdir("/proc/self/fd")), threading.active_count()

    run(100)
    before = run(100)
    assert run(1000) == before
    assert len(ends) == 1200 and set(ends) == {"length", "cancelled"}
    assert engine.active == engine.queued == 0


def test_leaving_the_engine_ends_every_reply():
    model, params = make(layers=1, dim=8, heads=2)
    with Engine(model, params, None, slots=1, queue_limit=2) as engine:
        replies = [Reply(engine, prompt=[1], max_new_tokens=3)]
        with pytest.raises(UserError, match="requests wait already"):
            for _ in range(1000):
                replies.append(Reply(engine, prompt=[1], max_new_tokens=3))
    assert all(len(reply.ids()) == 3 for reply in replies)
    with pytest.raises(UserError, match="closed"):
        Reply(engine, prompt=[1])


class Unread:
    """Tokens of a step that failed on the device: the error comes when they are read."""

    def __array__(self, *_, **__):
        return 1 / 0


def fail(*_):
    return 1 / 0


@pytest.mark.parametrize("where", ["step", "insert", "read"])
def test_a_fault_ends_every_reply_with_an_error(capsys, where):
    model, params = make(layers=1, dim=8, heads=2)
    with Engine(model, params, None, slots=1) as engine:
        step = engine._programs.step
        faults = {"step": fail, "insert": fail, "read": lambda *x: (step(*x)[0], (Unread(), None))}
        setattr(engine._programs, where.replace("read", "step"), faults[where])
        assert Reply(engine, prompt=[1], max_new_tokens=1).wait()[1].reason == "error"
        with pytest.raises(UserError, match="the engine failed: division by zero"):
            Reply(engine, prompt=[1])
    assert "ZeroDivisionError" in capsys.readouterr().err
