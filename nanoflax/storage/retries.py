"""Repeats a request that failed for a reason that may pass, until a deadline."""

import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nanoflax.errors import UserError

T = TypeVar("T")
DEADLINE_SECONDS = 120.0  # of one operation with its repetitions; the variable NANOFLAX_STORAGE_SECONDS changes it
PATIENCE_SECONDS = 10.0  # then a line on stderr says what is tried
_PASSING_STATUS = {408, 425, 429, 499, 500, 502, 503, 504}
_PASSING_CODES = {"SlowDown", "RequestTimeout", "Throttling", "InternalError", "ServiceUnavailable"}
_PASSING_KINDS = {  # without a status: of aiohttp, gcsfs, botocore, requests and google-auth
    "ClientError", "ChecksumError", "HTTPClientError", "ConnectionError", "RequestException", "TransportError",
    "TimeoutError", "IncompleteReadError", "ResponseStreamingError",
}  # fmt: skip
_LIBRARIES = ("gcsfs", "s3fs", "aiohttp", "aiobotocore", "botocore", "requests", "google", "urllib3", "asyncio")
_OWN = (UserError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def retried(what: str, call: Callable[[], T]) -> T:
    """call(), again and again with growing pauses while it fails for a reason that may pass (a busy server, a lost
    connection), for DEADLINE_SECONDS.

    what: for messages, such as "gs://bucket/a".
    Raises: UserError after the deadline, or for a lasting reason (no permission, no bucket); FileNotFoundError and
    FileExistsError of `call` as they are.
    """
    attempts = _Attempts(what)
    while True:
        try:
            return call()
        except Exception as error:
            time.sleep(attempts.pause_after(error))


async def retried_request(what: str, call: Callable[[], Awaitable[T]]) -> T:
    """`retried` for one request inside the event loop of fsspec."""
    import asyncio  # slow

    attempts = _Attempts(what)
    while True:
        try:
            return await call()
        except Exception as error:
            await asyncio.sleep(attempts.pause_after(error))


class _Attempts:
    """The attempts of one operation."""

    def __init__(self, what: str) -> None:
        self.said = False
        self.what, self.begin, self.pause = what, time.monotonic(), 0.05
        self.seconds = float(os.environ.get("NANOFLAX_STORAGE_SECONDS", DEADLINE_SECONDS))

    def pause_after(self, error: Exception) -> float:
        """Seconds until the next attempt. Raises: `error`, or a UserError if there is none."""
        if isinstance(error, _OWN) or not _is_of_storage(error):
            raise error
        reason = " ".join(str(error).split()).strip(" ,")[:300] or type(error).__name__
        if not may_pass(error):
            raise UserError(f"{self.what}: {reason}") from error
        self.pause = min(2 * self.pause, 8.0)
        if time.monotonic() - self.begin + self.pause > self.seconds:
            raise UserError(
                f"{self.what}: no answer of the storage for {self.seconds:g} s; the last error is {reason}"
            ) from error
        if not self.said and time.monotonic() - self.begin > PATIENCE_SECONDS:
            self.said = True
            print(f"{self.what}: still trying, for up to {self.seconds:g} s ({reason})", file=sys.stderr)
        return self.pause * random.uniform(0.5, 1)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: a status such as 503, or a connection that was lost or refused."""
    status, code = _status_of(error)
    if status or code:
        return status in _PASSING_STATUS or code in _PASSING_CODES
    if any(kind.__name__ in _PASSING_KINDS for kind in type(error).__mro__):
        return True
    return error.__cause__ is not None and may_pass(error.__cause__)  # s3fs raises an OSError from it


def _status_of(error: BaseException) -> tuple[int | None, str | None]:
    """(HTTP status, S3's code) of an error of aiohttp, gcsfs or botocore; None if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        code = response.get("Error", {}).get("Code")
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), None if code == "Unknown" else code
    status: Any = getattr(error, "status", None) or getattr(error, "code", None)
    return int(status) if str(status).isdigit() else None, None


def _is_of_storage(error: Exception) -> bool:
    """Whether an error is of a request, and no mistake in our code."""
    kinds: Any = type(error).__mro__
    return isinstance(error, OSError) or any(kind.__module__.split(".")[0] in _LIBRARIES for kind in kinds)
