"""A config.json that knows which of its fields were read last, so that an error can name them."""

from typing import Any


class Watched(dict):
    """A dict that adds the name of each field that is read to `seen`; so does `self | other`."""

    def __init__(self, values: dict[str, Any], seen: list[str]):
        super().__init__(values)
        self.seen = seen

    def __getitem__(self, name: str) -> Any:
        self.seen.append(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.append(name)
        return super().get(name, default)

    def __or__(self, other: dict[str, Any]) -> "Watched":
        return Watched({**self, **other}, self.seen)
