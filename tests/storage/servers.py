"""Buckets on this machine: gcp-storage-emulator and moto's server, which can fail a part of all requests.

The emulator of Google's storage ignores conditions (ifGenerationMatch), forgets a header that tensorstore reads, and
has no threads; these are added here.
"""

import contextlib
import functools
import http.server
import io
import logging
import os
import random
import re
import socket
import socketserver
import threading
from urllib.parse import parse_qs, unquote, urlparse

import boto3
import requests
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "runs"


class Faults:
    """Decides which requests fail. rate: the fraction of them; half with status 503, half by a lost connection."""

    def __init__(self):
        self.rate, self.requests, self.failed, self._random = 0.0, 0, 0, random.Random(17)

    def next(self):
        """None, "status" or "reset" for the next request."""
        self.requests += 1
        if self._random.random() >= self.rate:
            return None
        self.failed += 1
        return self._random.choice(["status", "reset"])


class _GoogleServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 256

    def handle_error(self, request, client_address):
        pass  # a client that was killed


def _google(faults):
    storage, lock = Storage(use_memory_fs=True), threading.Lock()
    buckets.create_bucket(BUCKET, storage)
    logging.getLogger("api").setLevel(logging.CRITICAL)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)

    class Handler(RequestHandler):
        def handle_method(self, method):
            fault = faults.next()
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "reset":
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault:
                self.rfile.read(length)
                return self._refuse(503)
            with lock:
                if status := self._failed_condition(length):
                    return self._refuse(status)
                getattr(RequestHandler, method)(self)

        def _failed_condition(self, length):
            """412 or 304 if the generation of the object is not the one that the request wants, else None."""
            query = parse_qs(urlparse(self.path).query)
            if wanted := query.get("ifGenerationMatch"):
                body = self.rfile.read(length)
                self.rfile = io.BytesIO(body)
                name = query["name"][0] if "name" in query else self._name() or _name_in(body)
                return 412 if self._generation(name) != wanted[0] else None
            if wanted := query.get("ifGenerationNotMatch"):
                return 304 if self._generation(self._name()) == wanted[0] else None
            return None

        def _name(self):
            found = re.search(r"/b/[^/]+/o/([^?]+)", self.path)
            return found and unquote(found[1])

        def _generation(self, name):
            with contextlib.suppress(Exception):
                return storage.get_file_obj(BUCKET, name)["generation"]
            return "0"

        def end_headers(self):
            """tensorstore reads the generation of an object from a header that the emulator forgets."""
            if self.command == "GET" and (name := self._name()):
                self.send_header("x-goog-generation", self._generation(name))
            super().end_headers()

        def _refuse(self, status):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    for method in ("do_GET", "do_POST", "do_PUT", "do_DELETE", "do_PATCH"):
        setattr(Handler, method, lambda self, method=method: self.handle_method(method))
    return _GoogleServer(("127.0.0.1", 0), functools.partial(Handler, storage))


def _name_in(body):
    """The name of the object in the first part of an upload."""
    return body.split(b'"name": "')[1].split(b'"')[0].decode()


def _amazon(faults):
    app = DomainDispatcherApplication(create_backend_app)

    def failing(environ, start_response):
        fault = faults.next()
        if fault == "reset":
            with contextlib.suppress(OSError):
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if fault:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    class Quiet(MotoRequestHandler):
        def log(self, *arguments, **_):
            pass

    return make_server("127.0.0.1", 0, failing, threaded=True, request_handler=Quiet)


@contextlib.contextmanager
def bucket(scheme):
    """(URL of an empty bucket of a new server, environment of its clients, Faults)."""
    faults = Faults()
    server = (_google if scheme == "gs" else _amazon)(faults)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if scheme == "gs":
        env = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}
    else:
        env = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        env |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        if scheme == "s3":
            requests.post(f"{url}/moto-api/reset")
            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"{scheme}://{BUCKET}", env, faults
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()
