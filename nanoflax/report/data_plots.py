"""Histograms of training data: lengths of documents, and which source the rows of each step read."""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nanoflax.report.metrics_log import write_atomically
from nanoflax.report.text import format_count

BAR = 40  # characters of the longest bar in the terminal
Lengths = Mapping[str, Int[np.ndarray, " documents"]]


def length_table(lengths: Lengths, unit: str = "documents") -> list[str]:
    """Lines with a histogram of lengths in tokens, and the share of all tokens in each bin. unit: what has a length."""
    sizes = np.concatenate(list(lengths.values()))
    bins = np.frexp(np.maximum(sizes, 1))[1] - 1  # floor(log2(size))
    counts = np.bincount(bins)
    tokens = np.bincount(bins, sizes)
    of_all = f"lengths of {len(sizes):,} {unit}: {_summary(sizes)}"
    each = [f"  {name}: {len(x):,} {unit}, {_summary(x)}" for name, x in lengths.items() if len(lengths) > 1]
    lines = [of_all, *each, f"{'tokens':>19}  {unit:>10}  {'of all tokens':>13}"]
    for i in range(int(bins.min()), len(counts)):
        bar = "█" * round(BAR * counts[i] / counts.max()) or "▏" * bool(counts[i])
        low, high = f"{2**i:,}", f"{2 ** (i + 1) - 1:,}"
        lines.append(f"{low:>8} to {high:>7}  {counts[i]:>10,}  {tokens[i] / sizes.sum():>13.1%}  {bar}".rstrip())
    return lines


def _summary(sizes):
    return f"median {int(np.median(sizes)):,} tokens, mean {sizes.mean():,.0f}, longest {sizes.max():,}"


def plot_data(
    path: str | os.PathLike[str],
    lengths: Lengths,
    window: int,
    unit: str = "documents",
    steps: Sequence[int] = (),
    shares: Mapping[str, Sequence[float]] | None = None,
) -> str | os.PathLike[str]:
    """Draws how long the documents are and, of several sources, their shares of the rows. Writes a PNG; returns `path`.

    lengths: in tokens, by source. window: tokens of a row. unit: what has a length. steps: the first step of each
    stage, and the end of the run. shares: of the rows of each stage, by source.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 3 if shares else 2
    figure = Figure(figsize=(4.5 * panels, 4), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    of_documents, of_tokens, *of_rows = figure.subplots(1, panels)
    top = int(np.ceil(np.log2(max(sizes.max() for sizes in lengths.values()) + 1)))
    edges = 2.0 ** np.arange(0, max(top, 1) + 0.25, 0.5)
    for source, sizes in lengths.items():
        style = {"histtype": "stepfilled", "alpha": 0.45, "label": _short(source)}
        of_documents.hist(sizes, edges, weights=np.full(len(sizes), 1 / len(sizes)), **style)
        of_tokens.hist(sizes, edges, weights=sizes / sizes.sum(), **style)
    for axes, name in ((of_documents, f"share of {unit}"), (of_tokens, "share of tokens")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}" if x < 1024 else f"{x / 1024:g}k")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("length (tokens)")
        axes.set_title(name, fontsize=11)
        axes.axvline(window, color="black", linewidth=1, linestyle="--", label=f"window: {window:,}")
        axes.legend(frameon=False, fontsize=8)
    if of_rows and shares:
        _draw_shares(of_rows[0], shares, steps)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    canvas.print_png(buffer := io.BytesIO())
    write_atomically(pathlib.Path(path), buffer.getvalue())
    return path


def _short(name):
    return name if len(name) <= 32 else f"…{name[-31:]}"


def _draw_shares(axes, shares, steps):
    below = np.zeros(len(steps) - 1)
    for source, values in shares.items():
        axes.stairs(below + np.asarray(values), steps, baseline=below, fill=True, alpha=0.6, label=_short(source))
        below = below + np.asarray(values)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.xaxis.set_major_formatter(lambda x, _: format_count(x))
    axes.set_xlabel("step")
    axes.set_title("share of rows", fontsize=11)
    axes.legend(fontsize=8, loc="lower right", reverse=True)  # in the order of the areas
