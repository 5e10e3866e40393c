"""The fsspec file system of a remote name."""

import functools
import importlib
import os
import re
import secrets
from typing import Any

from nanoflax.errors import UserError
from nanoflax.storage.retries import retried_request

_LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> (module, our extra that installs it)
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_MISTAKEN = re.compile(r"[a-z][a-z0-9+.-]+://|(gs|s3):", re.IGNORECASE)
_TIMEOUT = 60  # seconds without an answer to one request


def is_remote(name: str | os.PathLike) -> bool:
    """Whether a name is of object storage: gs://BUCKET/... or s3://BUCKET/..."""
    found = _REMOTE.match(os.fspath(name))
    return found is not None and found[1] in _LIBRARIES


def check_name(name: str | os.PathLike) -> None:
    """Raises: UserError for a name that is neither remote nor meant as a local path, such as gs:/b/a or http://b/a."""
    if not is_remote(name) and _MISTAKEN.match(os.fspath(name)):
        raise UserError(f"{name} is not a local path, and not gs://BUCKET/... or s3://BUCKET/...")


def join(name: str, *parts: str) -> str:
    """name/part/part, for remote names and local paths."""
    for part in parts:
        name = f"{name.rstrip('/')}/{part}" if is_remote(name) else os.path.join(name, part)
    return name


def filesystem(name: str) -> Any:
    """The fsspec file system of a remote name; the same object for the same process and endpoint.

    It caches no listings, because other hosts write too.
    Raises: UserError if the name is not remote, names no bucket, or its library is not installed.
    """
    found = _REMOTE.match(name)
    if found is None or found[1] not in _LIBRARIES:
        raise UserError(f"{name} is no name of object storage: give gs://BUCKET/... or s3://BUCKET/...")
    if not found[2].split("/")[0]:
        raise UserError(f"{name} names no bucket: give {found[1]}://BUCKET/...")
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST" if found[1] == "gs" else "AWS_ENDPOINT_URL")
    return _made(found[1], endpoint, os.getpid())


@functools.lru_cache(maxsize=8)
def _made(scheme: str, endpoint: str | None, process: int) -> Any:
    """process: connections do not survive a fork."""
    del process
    module, extra = _LIBRARIES[scheme]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{scheme}:// needs {module}: pip install 'nanoflax[{extra}]'") from error
    own: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, "endpoint_url": endpoint}
    if scheme == "s3":
        return library.S3FileSystem(config_kwargs={"connect_timeout": 20, "read_timeout": _TIMEOUT}, **own)
    token = "anon" if endpoint else None  # an emulator asks for no credentials
    return _with_our_retries(importlib.import_module("gcsfs.core").GCSFileSystem)(token=token, timeout=_TIMEOUT, **own)


def _with_our_retries(kind: Any) -> Any:
    """gcsfs's file system (not its experimental one, which asks another service), until the deadline instead of six
    times, and with exact uploads."""
    once = kind._request.__wrapped__

    class GoogleFileSystem(kind):
        async def _request(self, method, path, *args, **kwargs):
            what = f"gs://{'/'.join(args)}" if args else path
            if isinstance(body := kwargs.get("data"), bytes) and body.startswith(b"--==0==\n"):
                kwargs |= _exact_upload(body)
            return await retried_request(what, lambda: once(self, method, path, *args, **kwargs))

    return GoogleFileSystem


def _exact_upload(body: bytes) -> dict[str, Any]:
    r"""Headers and data of an upload that gcsfs has made, with the line ends of RFC 2046 and a boundary of its own.

    gcsfs writes \n, so that a server takes a \r at the end of the content for a part of the line end. It always writes
    the same boundary, which a content may hold. Both lose bytes.
    """
    kind, description, content = body.removesuffix(b"\n--==0==--").split(b"\n\n", 2)
    metadata, _, content_kind = description.partition(b"\n--==0==\n")
    boundary = secrets.token_hex(16)
    line = b"--" + boundary.encode()
    parts = [line, kind.split(b"\n")[1], b"", metadata, line, content_kind, b"", content, line + b"--"]
    headers = {"Content-Type": f'multipart/related; boundary="{boundary}"'}
    return {"headers": headers, "data": b"\r\n".join(parts)}
