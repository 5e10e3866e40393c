"""Functions that are compiled one after another in a thread, those that a request waits for first."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Name = tuple[Any, ...]


class Compiler:
    """Compiled functions by their names. `add` all of them, then `start`; the first ones are compiled first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Name, Callable[[], Any]] = {}
        self._wanted: dict[Name, None] = {}  # of those that wait, in the order of the wishes
        self._found: dict[Name, Future] = {}
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)

    def add(self, name: Name, compile_: Callable[[], Any]) -> None:
        self._waiting[name], self._found[name] = compile_, Future()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Compile nothing more."""
        with self._changed:
            self._waiting.clear()
            self._wanted.clear()
            self._changed.notify_all()
        self._thread.join()

    def has(self, *names: Name) -> bool:
        """Whether all are compiled. Raises: the error of one that could not be compiled."""
        return all(self._found[name].done() and (self._found[name].result(), True)[1] for name in names)

    def ready(self, *names: Name) -> bool:
        """Whether all are compiled; those that are not come next. Raises: as `has`."""
        if self.has(*names):
            return True
        with self._changed:
            self._wanted |= dict.fromkeys(name for name in names if name in self._waiting)
        return False

    def get(self, *name: Any) -> Any:
        """A compiled function; waits for it. Raises: its error."""
        self.ready(name)
        return self._found[name].result()

    def wait(self, seconds: float) -> None:
        """Wait until the next function is compiled, at most this long."""
        with self._changed:
            self._changed.wait(seconds)

    def _run(self):
        while True:
            with self._changed:
                if not self._waiting:
                    return
                name = next(iter(self._wanted or self._waiting))
                self._wanted.pop(name, None)
                compile_ = self._waiting.pop(name)
            try:
                self._found[name].set_result(compile_())
            except BaseException as error:
                self._found[name].set_exception(error)
            with self._changed:
                self._changed.notify_all()
