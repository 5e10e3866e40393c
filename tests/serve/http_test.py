"""The HTTP server: bad bodies, limits, clients that leave, metrics, and the program."""

import contextlib
import http.client
import json
import select
import socket
import time
import types

import hypothesis
import jax
import numpy as np
import openai
import pytest
import schemathesis
from prometheus_client import parser

import nanoflax
from nanoflax import serve
from nanoflax.errors import UserError
from nanoflax.serve import connections
from nanoflax.serve import http as http_
from tests import processes
from tests.serve.servers import running, until


def post(address, body, path="/v1/completions", **headers):
    """(status, body) of a request that the client would not make."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_bodies_that_are_no_requests(server):
    address = server[0]
    for status, words, body, headers in (
        (413, "more than 100000 bytes", b'"' + b"x" * 200_000, {}),
        (400, "is not JSON", b"{", {}),
        (400, "must hold an object", b"[]", {}),
        (400, "there twice", b'{"prompt": "a", "prompt": "b"}', {}),
        (400, "levels of lists", b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", {}),
        (400, "temperature", b'{"prompt": "a", "temperature": NaN}', {}),
        (400, "max_tokens", b'{"prompt": "a", "max_tokens": 1.5}', {}),
        (400, "surrogate", b'{"prompt": "\\ud800"}', {}),
        (400, "the body is not JSON: byte 12 is not UTF-8", b'{"prompt": "\xff"}', {}),
        (400, "a number with too many digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}),
        (415, "Content-Type", b'{"prompt": "a"}', {"Content-Type": "text/plain"}),
        (415, "Content-Encoding: gzip is not read here", b'{"prompt": "a"}', {"Content-Encoding": "gzip"}),
        (200, "choices", b'{"prompt": "a"}', {"Content-Encoding": "identity"}),
        (400, "host", b'{"prompt": "a"}', {"Host": "evil.example"}),
    ):
        found, text = post(address, body, **headers)
        assert found == status and words in text, text


def test_a_full_queue_is_refused_and_the_client_tries_again(server, client, long):
    address, service = server
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(client.completions.create(**long, stream=True))
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="tiny", prompt="x")
        assert error.value.code == "queue_full" and error.value.response.headers["Retry-After"] == "1"
        again = client.with_options(max_retries=3).completions.create(model="tiny", prompt="x", max_tokens=1)
        assert again.usage.completion_tokens == 1
    until(lambda: service.unfinished == 0)
    assert len(client.completions.create(model="tiny", prompt="x", max_tokens=1, n=9).choices) == 9  # it is alone


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_that_a_full_queue_refuses_is_not_tokenized(server, path, monkeypatch):
    address, service = server
    monkeypatch.setattr(service, "unfinished", 10**6)
    for name in ("completion_choices", "chat_choices"):
        monkeypatch.setattr(http_.api, name, lambda *_: pytest.fail("tokenized"))
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    status, text = post(address, body, path)
    assert status == 429 and "queue_full" in text


def test_slow_heads_and_too_many_connections_are_refused(server, client, long, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    host = server[0].removeprefix("http://").split(":")
    connect = lambda: contextlib.closing(socket.create_connection((host[0], int(host[1])), 10))
    with monkeypatch.context() as full:
        full.setattr(connections, "MAX_CONNECTIONS", 0)
        with connect() as refused:
            assert refused.recv(100).startswith(b"HTTP/1.1 503")
    with connect() as silent, connect() as slow, connect() as third:
        # One request is complete; the head of the second one is never.
        third.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert third.recv(1000).startswith(b"HTTP/1.1 200")
        third.sendall(b"GET")
        with contextlib.suppress(OSError):  # the server closes the connection
            for _ in range(40):
                slow.sendall(b"G")
                time.sleep(0.02)
        read = lambda connection: b"".join(iter(lambda: connection.recv(1000), b""))
        assert all(read(connection).split(b"HTTP")[-1].startswith(b"/1.1 408") for connection in (silent, slow, third))
    with client.completions.create(**long, stream=True) as stream:  # longer than the time for a head
        assert next(iter(stream)) and time.sleep(0.6) is None and next(iter(stream))


def test_slow_bodies_are_refused(server, monkeypatch):
    """A byte now and then is too slow, also after the answer; a steady body may take longer than the first seconds."""
    monkeypatch.setattr(http_, "FIRST_SECONDS", 0.4)
    monkeypatch.setattr(http_, "LEAST_RATE", 20)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.6)
    host, port = server[0].removeprefix("http://").split(":")

    @contextlib.contextmanager
    def request(kind, length):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}"
        with contextlib.closing(socket.create_connection((host, int(port)), 20)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n")
            yield connection

    def answer(body, size):
        """What the server answers to a body that is sent in parts, one in 0.1 seconds."""
        with request("application/json", len(body)) as connection:
            for at in range(0, len(body), size):
                connection.sendall(body[at : at + size])
                if select.select([connection], [], [], 0.1)[0]:
                    break
            return connection.recv(5000)

    body = json.dumps({"prompt": "x" * 180, "max_tokens": 1}).encode()
    slow = answer(body, 1)
    assert slow.startswith(b"HTTP/1.1 408") and b"connection: close" in slow.lower() and b"the body is too slow" in slow
    assert answer(body, 30).startswith(b"HTTP/1.1 200")  # in 0.7 seconds
    with request("text/plain", 9999) as connection:
        assert connection.recv(5000).startswith(b"HTTP/1.1 415")
        with pytest.raises(OSError):  # a connection that only sends the rest of its body is closed
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)


def test_a_client_that_does_not_wait_frees_its_slot(server, client, long):
    service = server[1]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).completions.create(**long, n=6)
    until(lambda: service.unfinished == 0 and not service.running)


def test_200_clients_leave(run, long, monkeypatch):
    """The slot of each client is free within a step after the server has noticed that it left."""
    with running(run, slots=4, queue=400, max_tokens=200) as (address, service):
        steps, late = lambda: service.engine.counts["steps"], []
        cancelled = {}
        cancel = serve.Ticket.cancel

        def recorded(ticket):
            cancelled.setdefault(id(ticket), steps())
            cancel(ticket)

        monkeypatch.setattr(serve.Ticket, "cancel", recorded)
        submit = service.engine.submit

        def submitted(request, receive):
            def received(event):
                if isinstance(event, serve.Finish) and event.reason == "cancelled":
                    late.append(steps() - cancelled[id(ticket)])
                receive(event)

            ticket = submit(request, received)
            return ticket

        monkeypatch.setattr(service.engine, "submit", submitted)
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(long | {"stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        clients = [socket.create_connection((host, int(port))) for _ in range(200)]
        for each in clients:
            each.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: service.unfinished > 150)
        for each in clients:
            each.close()
        until(lambda: service.unfinished == 0 and service.engine.active == 0)
        assert len(late) > 150 and max(late) <= 1
        assert not service.running


def test_the_api_key_protects_all_but_the_page(run):
    with running(run, slots=1, api_key="secret") as (address, _):
        ask = lambda key: openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0).models.list().data[0].id
        assert ask("secret") == "tiny"
        for wrong in ("other", "secret2"):
            with pytest.raises(openai.AuthenticationError):
                ask(wrong)
        for scheme in ("bearer", "BEARER"):
            assert post(address, {"prompt": "x"}, Authorization=f"{scheme} secret")[0] == 200
        for wrong, said in (
            ("Basic secret", "the API key is missing: send Authorization: Bearer KEY"),
            ("secret", "the API key is missing: send Authorization: Bearer KEY"),
            ("Bearer other", "the API key is wrong"),
        ):
            status, text = post(address, {"prompt": "x"}, Authorization=wrong)
            assert (status, json.loads(text)["error"]["message"]) == (401, said)
        assert post(address, {"prompt": "x"})[0] == post(address, {"prompt": "x"}, "/v1/embeddings")[0] == 401
        for path, status in (("/", 200), ("/healthz", 200), ("/openapi.json", 200), ("/metrics", 401)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == status, path
            if path == "/":
                assert (
                    "default-src 'none'" in response.headers["Content-Security-Policy"] and b"<html" in response.read()
                )


def test_numbers_that_json_does_not_have(run, long):
    """A model whose training failed gives no 500; and a key may have any letters."""
    broken = types.SimpleNamespace(**(vars(run) | {"params": jax.tree.map(lambda x: x * np.nan, run.params)}))
    with running(broken, slots=1, api_key="schlüssel") as (address, _):
        key = {"Authorization": b"Bearer " + "schlüssel".encode()}
        status, text = post(address, long | dict(max_tokens=2, logprobs=1), **key)
        assert status == 200 and json.loads(text)["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0] * 2


def test_metrics_are_the_text_that_prometheus_reads(server, client):
    client.completions.create(model="tiny", prompt="x", max_tokens=3)
    families = {f.name: f for f in parser.text_string_to_metric_families(client.get("/../metrics", cast_to=str))}
    values = {(s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples}
    assert values["nanoflax_slots",] == 2 and values["nanoflax_slots_in_use",] == values["nanoflax_queue",] == 0
    assert values["nanoflax_engine_tokens_total",] == server[1].engine.counts["tokens"] > 0
    path = ("path", "/v1/completions")
    count = values["nanoflax_response_seconds_count", path]
    assert count == values["nanoflax_response_seconds_bucket", ("le", "+Inf"), path] > 0
    kinds = {"nanoflax_requests": "counter", "nanoflax_slots": "gauge", "nanoflax_response_seconds": "histogram"}
    assert {name: families[name].type for name in kinds} == kinds


def test_a_fault_of_the_server_is_an_error_object_and_is_counted(server, monkeypatch):
    monkeypatch.setattr(http_.api, "check_model", lambda *_: 1 / 0)
    status, text = post(server[0], {"prompt": "x"})
    assert status == 500 and json.loads(text)["error"]["type"] == "server_error" and "division" not in text
    assert 'nanoflax_requests_total{path="/v1/completions",status="500"} 1.0' in server[1].metrics.text().decode()


def test_no_request_of_the_description_is_a_500(server):
    """schemathesis makes right and wrong requests from /openapi.json."""
    schema = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 6
    statuses = set()
    for operation in operations:
        for mode in schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE:
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                _try(operation.as_strategy(generation_mode=mode), statuses)
    assert {200, 400} <= statuses and not [status for status in statuses if status >= 500]


def _try(cases, statuses):
    @hypothesis.settings(
        max_examples=25, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.seed(0)
    @hypothesis.given(cases)
    def check(case):
        if isinstance(case.body, dict) and "completions" in case.path and case.body.get("max_tokens") is None:
            case.body = case.body | {"max_tokens": 2}
        response = case.call(timeout=30)
        statuses.add(response.status_code)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code >= 400 and response.status_code != 405:
            assert {"message", "type", "param", "code"} == response.json()["error"].keys()

    check()


# The program.


def test_sigterm_finishes_what_runs_and_refuses_the_rest(client, run, tmp_path, long):
    nanoflax.hf.save(tmp_path / "tiny", run.model.config, run.params, run.tokenizer)
    child = processes.start(["-m", "experiments.serve", f"--model={tmp_path / 'tiny'}", "--port=0", "--slots=1"])
    try:
        until(lambda: "http" in child.out.read_text() or child.poll() is not None, 60)
        address = child.out.read_text().split(" at ")[1].split()[0]
        theirs = client.with_options(base_url=f"{address}/v1")
        running = theirs.completions.create(**long, stream=True)
        first = next(iter(running)).choices[0].text
        waiting = theirs.completions.create(**long, stream=True)
        child.send_signal(15)
        rest = list(running)
        assert rest[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(waiting)
        child.wait(30)
        with pytest.raises(openai.APIConnectionError):
            theirs.models.list()
        assert (child.returncode, child.err.read_text()) == (0, f"loading and compiling {tmp_path / 'tiny'} ...\n")
        whole = first + "".join(chunk.choices[0].text for chunk in rest)
        assert whole == client.completions.create(**long).choices[0].text
    finally:
        child.kill()


def test_a_port_that_is_taken_is_one_line(run):
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match=r"port=\d+: cannot listen there"):
        serve.listen("127.0.0.1", taken.getsockname()[1])
