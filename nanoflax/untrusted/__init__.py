"""Reading of files that a stranger may have written: their size, their JSON, and the files that they name."""

from nanoflax.untrusted.files import is_inside, locate, read_bytes
from nanoflax.untrusted.json_text import json_object, parse_json

__all__ = ["is_inside", "json_object", "locate", "parse_json", "read_bytes"]
