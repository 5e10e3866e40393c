"""Draws the pictures of the README in docs/: rooms.png, data_flow.png and, for finished runs, loss.png or reward.png.

python -m experiments.draw_readme [WORKDIR ...]
"""

import argparse
import configparser
import pathlib
import shutil

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from nanoflax import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
CORE = ("nn", "generate", "train")
INK, GREY, CORE_FILL, FILL, EDGE = "#1f2933", "#6b7785", "#cfe3f7", "#f3f5f7", "#b8c2cc"
PURPOSE = {
    "experiments": "one short program per job", "runs": "pretrain, finetune, open, checkpoints",
    "tasks": "examples, batches, metrics of each task", "planning": "memory and time of a step, before it runs",
    "alignment": "preferences, rewards, rollouts, teachers", "evals": "benchmarks of models, strided perplexity",
    "serve": "engine, HTTP, page", "hf": "Hugging Face models, in and out", "train": "step, objectives, optimizers",
    "speculation": "guessed tokens, checked", "peft": "LoRA, AdaLoRA, adapters, prompts",
    "generate": "sampling, beam search, scoring", "nn": "layers, attention, experts, models",
    "kernels": "what nn computes, faster", "data": "sources, tokens, windows, mixtures",
    "constraints": "text that matches a rule", "tokenizers": "trained here, or read from files",
    "parallel": "mesh, sharding table, hosts", "config": "every choice of a run, checked", "storage": "gs:// and s3://",
    "report": "progress, metrics, plots", "untrusted": "strangers' files", "errors": "a line for the user"}  # fmt: skip


def canvas(width, height):
    figure = FigureCanvasAgg(Figure(figsize=(width, height), dpi=160)).figure
    return figure, figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), frameon=False, xticks=[], yticks=[])


def write(axes, x, y, text, size, align="center", color=INK, **options):
    axes.text(x, y, text, ha=align, va="center", fontsize=size, color=color, **options)


def box(axes, x, y, width, height, room, align="center"):
    style = dict(boxstyle="round,pad=0,rounding_size=0.08", facecolor=CORE_FILL if room in CORE else FILL)
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style, edgecolor=EDGE, linewidth=1))
    start, size = (x + 0.15, 11) if align == "left" else (x + width / 2, 9)
    write(axes, start, y + height / 2, room, size, align, weight="bold", family="monospace")


def count_lines(room):
    patterns = (f"{room}/*.py", f"nanoflax/{room}/*.py", f"nanoflax/{room}.py")
    return sum(file.read_text().count("\n") for pattern in patterns for file in ROOT.glob(pattern))


def save(figure, name):
    figure.savefig(path := ROOT / "docs" / name)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # 64 colours: a third of the space


def draw_rooms():
    """Draw the floors of the import-linter contract in setup.cfg, and the programs above them."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    layers = contract["importlinter:contract:floors"]["layers"].replace("nanoflax.", "").strip().split("\n")
    floors = [line.split(" | ") for line in ["experiments", *layers]]
    height, gap, left, right = 0.5, 0.1, 0.55, 9.85
    figure, axes = canvas(10, len(floors) * (height + gap) + 0.6)
    title = "A room imports only rooms on lower floors. Blue: what everyone reads. Right: lines of Python."
    write(axes, left, axes.get_ylim()[1] - 0.25, title, 10, "left")
    for floor, rooms in enumerate(reversed(floors)):
        y, width = 0.15 + floor * (height + gap), (right - left - gap * (len(rooms) - 1)) / len(rooms)
        write(axes, 0.3, y + height / 2, str(floor + 1), 10, color=GREY)
        for i, room in enumerate(rooms):
            x = left + i * (width + gap)
            box(axes, x, y, width, height, room, "left")
            write(axes, x + 1.35, y + height / 2, PURPOSE[room], 9.5, "left")
            write(axes, x + width - 0.12, y + height / 2, f"{count_lines(room):,}", 9, "right", GREY)
    save(figure, "rooms.png")


def arrow(axes, start, end):
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=GREY, shrinkA=0, shrinkB=0, linewidth=1.3))


def chain(axes, y, columns, values, rooms):
    for x, (name, shape) in zip(columns, values, strict=True):
        write(axes, x, y, name, 11, weight="bold")
        write(axes, x, y - 0.24, shape, 8, color=GREY)
    for x, following, room in zip(columns[:-1], columns[1:], rooms, strict=True):
        middle, sign = (x + following) / 2, 1 if following > x else -1
        arrow(axes, (x + sign * 0.37, y), (middle - sign * 0.5, y))
        arrow(axes, (middle + sign * 0.5, y), (following - sign * 0.37, y))
        box(axes, middle - 0.48, y - 0.23, 0.96, 0.46, room)


def draw_data_flow():
    figure, axes = canvas(10, 2.9)
    columns, top, middle, bottom = [0.5, 2.72, 4.94, 7.16, 9.38], 2.5, 1.5, 0.5
    values = [("text", ""), ("tokens", "[T]"), ("batch", "[B, T]"), ("hidden", "[B, T, D]"), ("loss", "one number")]
    chain(axes, top, columns, values, ["tokenizers", "data\ntasks", "nn", "kernels"])
    for x, room in zip(columns[3:], ("generate", "train"), strict=True):
        arrow(axes, (x, top - 0.36), (x, middle + 0.25))
        box(axes, x - 0.48, middle - 0.23, 0.96, 0.46, room)
    arrow(axes, (columns[3] - 0.5, middle), (columns[2] + 0.37, middle))
    chain(axes, middle, columns[2:0:-1], [("tokens", "the new ones"), ("text", "")], ["tokenizers"])
    arrow(axes, (columns[4], middle - 0.25), (columns[4], bottom + 0.17))
    saved = [("state", "weights, optimizer"), ("files", "a checkpoint"), ("files", "for Transformers")]
    chain(axes, bottom, columns[:1:-1], saved, ["runs", "hf"])
    box(axes, 0.15, bottom - 0.23, 0.96, 0.46, "parallel")
    write(axes, 1.25, bottom, "one table splits every\narray over the devices", 9, "left")
    save(figure, "data_flow.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("workdirs", nargs="*")
    draw_rooms()
    draw_data_flow()
    for workdir in parser.parse_args().workdirs:
        shutil.copy(report.plot_rewards(workdir) or report.plot_losses(workdir), ROOT / "docs")
