"""Settings of a server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with.

    slots: texts that are generated together. context: most tokens of a text with its prompt; None: the engine's own
    limit. queue: most texts that wait for a slot; more are refused, except those of a request that is alone.
    max_tokens: most new tokens of a text. max_body: most bytes of a request. api_key: clients must send it; empty:
    none. name: of the model in the API; empty: the last part of its path.
    """

    slots: int = 8
    context: int | None = None
    queue: int = 64
    max_tokens: int = 1024
    max_body: int = 4 * 2**20
    api_key: str = ""
    name: str = ""
