"""Compares the speed of nanoflax with Transformers' GPT-2 in PyTorch, and with the machine's limits.

    python -m experiments.benchmark train --shape=small        # also --shape=vocabulary, gpt2
    python -m experiments.benchmark decode --batch_size=1      # GPT-2 124M, random weights
    python -m experiments.benchmark compile --layers=32        # with and without train.scan_layers

Each side (nanoflax, PyTorch, machine) has its own process, and the sides run in turn. The speed of a
machine can change, so compare the ratio within a round, not the seconds. The limits are measured on
this machine: a float32 matrix product, and reading memory. On a GPU or TPU, or without torch and
transformers (pip install nanoflax[test]), nanoflax runs alone.
"""

import importlib.util
import sys

from absl import flags

from experiments.benchmarks import rounds, sides
from experiments.flags import launch
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_enum("shape", "small", list(sides.SHAPES), "Shape of the model, for train.")
flags.DEFINE_integer("batch_size", 0, "Rows of a batch; 0: those of the shape, or 1 for decode.", 0)
flags.DEFINE_integer("new_tokens", 64, "Tokens that decode generates in a round.", 1)
flags.DEFINE_integer("steps", 3, "Training steps in a round.", 1)
flags.DEFINE_integer("layers", 32, "Layers of the model, for compile.", 1)
flags.DEFINE_integer("rounds", 7, "Number of rounds.", 1)
flags.DEFINE_bool("alone", False, "Do not measure PyTorch.")
flags.DEFINE_string("side", "", "Internal: this process is a side (nanoflax, torch or machine).")


def main() -> None:
    if len(FLAGS.arguments) != 1 or FLAGS.arguments[0] not in ("train", "decode", "compile"):
        raise UserError("benchmark needs one argument: train, decode or compile")
    (kind,) = FLAGS.arguments
    if kind == "compile":
        return sides.compile_times(FLAGS.layers)
    if FLAGS.side:
        job = sides.Job(kind, FLAGS.shape, FLAGS.batch_size, FLAGS.steps, FLAGS.new_tokens)
        return rounds.serve(getattr(sides, f"{FLAGS.side}_side")(job))
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    names = ["nanoflax", "machine", *["torch"] * (has_torch and not FLAGS.alone)]
    facts, results = rounds.measure(sys.argv[1:], names, FLAGS.rounds)
    rounds.summarise(kind, facts, results)


if __name__ == "__main__":
    launch(main, arguments=True)
