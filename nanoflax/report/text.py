"""Readable numbers and durations, and text that is safe to print."""

import math
import re
from collections.abc import Mapping


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics in one line, such as `validation loss 2.3456  perplexity 10.4400`."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


def format_count(n: float) -> str:
    """Three significant digits: 950, 4.5k, 1.23M, 124M, 1.1B, 2T."""
    for unit in ("", "k", "M", "B"):
        if not abs(float(f"{n:.3g}")) >= 1000 or math.isinf(n):
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.4g}T"


def format_bytes(n: float) -> str:
    """Three significant digits: 950B, 4.5kB, 1.23MB, 1.1GB, 2TB."""
    return format_count(n).replace("B", "G") + "B"


def format_duration(seconds: float) -> str:
    """Seconds as 0:07, 3:21 or 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# C0 except newline and tab, DEL, C1, bidirectional controls, line separators, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escaped control characters, so that generated text cannot control a terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
