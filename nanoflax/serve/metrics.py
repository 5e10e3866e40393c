"""Counts and times of the server, in the text format of Prometheus."""

import bisect
import collections
from collections.abc import Mapping

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


class Metrics:
    """Counters and histograms by name and labels. Used in one thread."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        self._times: dict[str, dict[str, list[float]]] = collections.defaultdict(dict)

    def count(self, name: str, amount: float = 1, **labels: object) -> None:
        self._counters[name][_labels(labels)] += amount

    def time(self, name: str, seconds: float, **labels: object) -> None:
        """Add a duration to a histogram."""
        counts = self._times[name].setdefault(_labels(labels), [0.0] * (len(_BOUNDS) + 2))
        counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        counts[-1] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, with the present values of gauges. https://prometheus.io/docs/instrumenting/exposition_formats/"""
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE nanoflax_{name} gauge", f"nanoflax_{name} {value:g}"]
        for name, values in sorted(self._counters.items()):
            lines.append(f"# TYPE nanoflax_{name}_total counter")
            lines += [
                f"nanoflax_{name}_total{_braces(labels)} {value:.15g}" for labels, value in sorted(values.items())
            ]
        for name, histograms in sorted(self._times.items()):
            lines.append(f"# TYPE nanoflax_{name}_seconds histogram")
            for labels, (*counts, total) in sorted(histograms.items()):
                below = 0.0
                for bound, n in zip([*map(str, _BOUNDS), "+Inf"], counts, strict=True):
                    below += n
                    of_bound = _braces(",".join(filter(None, [labels, f'le="{bound}"'])))
                    lines.append(f"nanoflax_{name}_seconds_bucket{of_bound} {below:g}")
                lines.append(f"nanoflax_{name}_seconds_sum{_braces(labels)} {total:.9g}")
                lines.append(f"nanoflax_{name}_seconds_count{_braces(labels)} {below:g}")
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, object]) -> str:
    """Labels as the format writes them. Their values come from this server, so they need no escapes."""
    return ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""
