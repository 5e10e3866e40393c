"""Plots of losses, sweeps and attention, and the table of parameters."""

import io
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflax.report.metrics_log import read_metrics, write_atomically
from nanoflax.report.text import format_count

LABELLED_SOURCES = 8  # of a mixture; the legend has no room for more


def plot_losses(workdir: str | os.PathLike[str], tokens_per_step: float | None = None) -> pathlib.Path | None:
    """Draws the losses of `workdir/metrics.jsonl` as `workdir/loss.png`; returns its path, or None without data.

    Reads `loss`, `validation_loss` (of a mixture also of each source) and `bits_per_byte`. Skipped steps and steps with
    a non-finite loss are marked. tokens_per_step: adds a second x axis, in tokens.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    skipped = [r["step"] for r in records if "loss" in r and (r.get("skipped") or not math.isfinite(r["loss"]))]
    training = [
        (r["step"], r["loss"]) for r in records if "loss" in r and math.isfinite(r["loss"]) and not r.get("skipped")
    ]
    validation = [r for r in records if math.isfinite(r.get("validation_loss", math.nan))]
    if not training and not validation:
        return None

    canvas, axes = _axes_of_steps("loss (nats per token)")
    if training:
        _draw_training(axes, training)
    if skipped:
        axes.plot(
            skipped,
            [0.02] * len(skipped),
            "x",
            color="tab:red",
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label=f"skipped steps ({len(skipped)})",
        )
    if validation:
        _draw_validation(axes, validation)
    axes.xaxis.set_major_formatter(lambda x, _: format_count(x))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(left=0)
    if tokens_per_step:
        top = axes.secondary_xaxis(
            "top", functions=(lambda x: np.multiply(x, tokens_per_step), lambda x: np.divide(x, tokens_per_step))
        )
        top.set_xlabel("tokens")
        top.xaxis.set_major_formatter(lambda x, _: format_count(x))
    axes.set_title(_title(training, validation), fontsize=11)
    axes.legend(frameon=False)
    canvas.print_png(buffer := io.BytesIO())
    write_atomically(workdir / "loss.png", buffer.getvalue())
    return workdir / "loss.png"


def plot_rewards(workdir: str | os.PathLike[str]) -> pathlib.Path | None:
    """Draws the rewards of `workdir/metrics.jsonl` as `workdir/reward.png`; returns its path, or None without data.

    Reads `rollout_reward`, of the completions that a step draws, and `reward`, of greedy ones for validation.
    """
    workdir = pathlib.Path(workdir)
    records = read_metrics(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    drawn, greedy = ([(r["step"], r[name]) for r in records if name in r] for name in ("rollout_reward", "reward"))
    if not drawn:
        return None

    canvas, axes = _axes_of_steps("mean reward")
    _draw_training(axes, drawn, "completions of training problems, sampled")
    if greedy:
        steps, rewards = zip(*greedy, strict=True)
        axes.plot(steps, rewards, "o-", color="tab:orange", markersize=4, label="held-out problems, greedy")
        axes.set_title(f"held-out reward {rewards[0]:.3f} at step {steps[0]}, {rewards[-1]:.3f} at step {steps[-1]}")
    values = [reward for _, reward in drawn + greedy]
    margin = 0.03 * (max(values) - min(values)) + 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.legend(frameon=False, loc="lower right")
    canvas.print_png(buffer := io.BytesIO())
    write_atomically(workdir / "reward.png", buffer.getvalue())
    return workdir / "reward.png"


def _axes_of_steps(ylabel):
    """(canvas, axes) of a picture over the steps of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return canvas, axes


def _draw_training(axes, points, label="training"):
    steps, losses = map(np.array, zip(*points, strict=True))
    width = max(1, len(losses) // 100)
    # At both ends the window has fewer terms, so the sum is divided by their number.
    window = np.ones(2 * width + 1)
    smooth = np.convolve(losses, window)[width:-width] / np.convolve(np.ones_like(losses), window)[width:-width]
    thin = slice(None, None, 1 + len(losses) // 5000)
    axes.plot(steps[thin], losses[thin], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[thin], smooth[thin], color="tab:blue", linewidth=1.6, label=label)
    low, high = min(smooth), max(smooth)
    axes.set_ylim(low - 0.12 * (high - low) - 0.01, high + 0.08 * (high - low) + 0.01)


def _draw_validation(axes, records):
    steps, losses = zip(*((r["step"], r["validation_loss"]) for r in records), strict=True)
    axes.plot(steps, losses, "o-", color="tab:orange", markersize=4, linewidth=1, label="validation")
    sources = list(dict.fromkeys(name for r in records for name in r if name.startswith("validation_loss/")))
    for i, name in enumerate(sources):
        of_source = [(r["step"], r.get(name, math.nan)) for r in records]  # a NaN is a gap
        label = f"validation of {name.partition('/')[2]}" if i < LABELLED_SOURCES else None
        axes.plot(*zip(*of_source, strict=True), ".--", color=f"C{i + 3}", markersize=3, linewidth=0.8, label=label)
        losses += tuple(loss for _, loss in of_source if math.isfinite(loss))
    best = min(records, key=lambda r: r["validation_loss"])
    axes.plot(
        best["step"],
        best["validation_loss"],
        "*",
        color="tab:green",
        markersize=13,
        markeredgecolor="white",
        label=f"best: {best['validation_loss']:.4f} at step {best['step']}",
        zorder=3,
    )
    low, high = axes.get_ylim()
    margin = 0.05 * (high - low)
    axes.set_ylim(min(low, min(losses) - margin), max(high, max(losses) + margin))


def _title(training, validation):
    if not validation:
        step, loss = training[-1]
        return f"step {step}: training loss {loss:.4f} nats per token"
    last = validation[-1]
    text = f"step {last['step']}: validation loss {last['validation_loss']:.4f} nats per token"
    if "bits_per_byte" in last:
        text += f", {last['bits_per_byte']:.3f} bits per byte"
    return text


def plot_sweep(
    path: str | os.PathLike[str], points: Sequence[tuple[dict[str, str], float]], metric: str
) -> str | os.PathLike[str]:
    """Draws a panel for each setting of a sweep: its values and the metric. Writes a PNG to `path`; returns `path`.

    points: ({name of the setting: its value as text}, metric) of each trial, the best first. Numbers that
    span a factor of ten get a logarithmic axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(points[0][0])
    figure = Figure(figsize=(4 * len(keys) + 1, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for key, axes in zip(keys, panels, strict=True):
        xs, ys = [values[key] for values, _ in points], [y for _, y in points]
        try:
            xs = [float(x) for x in xs]
            if min(xs) > 0 and max(xs) >= 10 * min(xs):
                axes.set_xscale("log")
        except ValueError:  # names, not numbers
            pass
        axes.plot(xs, ys, "o", color="tab:blue", alpha=0.7)
        axes.plot(
            xs[:1], ys[:1], "*", color="tab:green", markersize=15, markeredgecolor="white", label=f"best: {ys[0]:.4f}"
        )
        axes.set_xlabel(key.removeprefix("config."))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(metric.replace("_", " "))
    panels[0].legend(frameon=False)
    canvas.print_png(buffer := io.BytesIO())
    write_atomically(pathlib.Path(path), buffer.getvalue())
    return path


def plot_alignment(
    path: str | os.PathLike[str], weights: Float[np.ndarray, "T S"], source: Sequence[str], targets: Sequence[str]
) -> str | os.PathLike[str]:
    """Draws the attention from target tokens to source tokens. Writes a PNG to `path`; returns `path`.

    weights: [T, S], between 0 and 1; source, targets: the S and T tokens as text.
    """
    from matplotlib import font_manager, ft2font
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))

    def label(text):  # escapes characters that are not in the font
        text = text.replace(" ", "␣").replace("$", r"\$")
        in_font = all(c.isprintable() and font.get_char_index(ord(c)) for c in text)
        return text if in_font else ascii(text)[1:-1]

    (T, S), side = weights.shape, 0.22
    figure = Figure(figsize=(2 + side * S, 1.5 + side * T), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(S), map(label, source), rotation=90, fontsize=7)
    axes.set_yticks(range(T), map(label, targets), fontsize=7)
    axes.set_xlabel("source")
    axes.set_ylabel("target")
    figure.colorbar(image, label="attention", shrink=0.7)
    canvas.print_png(buffer := io.BytesIO())
    write_atomically(pathlib.Path(path), buffer.getvalue())
    return path


def parameter_table(params: dict[str, Any]) -> str:
    """A table as text: the number of parameters and bytes of each module; equal blocks share one row."""
    modules = {}
    for name, branch in params.items():
        has_blocks = name in ("encoder", "decoder")
        modules |= {f"{name}/{k}": v for k, v in branch.items()} if has_blocks else {name: branch}
    groups = []  # [first name, first name without its number, last name, count, parameters each, bytes each]
    for name in sorted(modules, key=_natural_order):
        leaves = list(_leaves(modules[name]))
        size = sum(math.prod(leaf.shape) for leaf in leaves)
        memory = sum(getattr(leaf, "nbytes", math.prod(leaf.shape) * leaf.dtype.itemsize) for leaf in leaves)
        stem = re.sub(r"\d+$", "", name)
        if groups and stem != name and groups[-1][1] == stem and groups[-1][4:] == [size, memory]:
            groups[-1][2:4] = name, groups[-1][3] + 1
        else:
            groups.append([name, stem, name, 1, size, memory])
    rows = [("module", "", "parameters", "bytes")]
    for first, _, last, count, size, memory in groups:
        names, each = (f"{first} .. {last}", f"{count} x {size:,}") if count > 1 else (first, "")
        rows.append((names, each, f"{count * size:,}", _bytes(count * memory)))
    rows.append(("total", "", f"{sum(g[3] * g[4] for g in groups):,}", _bytes(sum(g[3] * g[5] for g in groups))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)


def _natural_order(name):
    """A sorting key that puts block_2 before block_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name) if part]


def _leaves(tree):
    if not isinstance(tree, dict):
        return [tree]
    return [leaf for branch in tree.values() for leaf in _leaves(branch)]


def _bytes(n):
    return format_count(n).replace("B", "G") + "B"
