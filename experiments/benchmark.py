"""Compares the speed of nanoflax with PyTorch, and with the machine's limits.

    python -m experiments.benchmark train --shape=small        # also --shape=vocabulary, gpt2; --no_bias
    python -m experiments.benchmark decode --batch_size=1      # GPT-2 124M, random weights
    python -m experiments.benchmark decode --quantize=int8     # the matrices of nanoflax in 8 bits
    python -m experiments.benchmark encode                     # BERT-base, forward, 8 texts of 128 tokens
    python -m experiments.benchmark compile --layers=32        # with and without train.scan_layers
    python -m experiments.benchmark packing                    # task.packing=best_fit against padding, on chats
    python -m experiments.benchmark serve --slots=8            # 64 requests to the engine, GPT-2 124M
    python -m experiments.benchmark where --shape=small        # the kinds of operations in a CPU's training step
    python -m experiments.benchmark speculate --rounds=3       # guessed tokens against decoding alone, on SmolLM2
    python -m experiments.benchmark tokenize --megabytes=2000  # a token store against SentencePiece's own batches
    python -m experiments.benchmark all --out=FILE.json        # nanoflax on this machine's accelerator or CPU

Each side (nanoflax, machine, torch: eager PyTorch, compiled: torch.compile) has its own process, and the
sides run in turn, in both orders. The speed of a machine can change, so compare the ratio within a round,
not the seconds. Training is compared with a GPT like nanoGPT's, which is faster in eager mode than
Transformers' GPT-2; decoding and encoding with Transformers. The limits are measured on this machine: a
float32 matrix product, and reading memory. On a GPU both run in bfloat16; on a TPU, or without torch and transformers
(pip install nanoflax[test]), nanoflax runs alone. `all` trains GPT-2 124M on an accelerator, with the batch chosen by
memory, and the small shapes on a CPU; it prints a table and writes all figures to --out. Exit status: 0,
1 if a measurement of `all` failed, 2 for a mistake of the user.
"""

import importlib.util
import sys

from absl import flags

from experiments.benchmarks import everything, guesses, packing, rounds, serving, sides, tokenizing, where
from experiments.flags import launch
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_enum("shape", "small", list(sides.SHAPES), "Shape of the model for train; tiny: for all kinds.")
flags.DEFINE_integer("batch_size", 0, "Rows of a batch; 0: those of the shape, 1 for decode, 8 for encode.", 0)
flags.DEFINE_integer("new_tokens", 64, "Tokens that decode, or speculate, generates in a round.", 1)
flags.DEFINE_integer("steps", 3, "Training steps, or batches to encode, in a round.", 1)
flags.DEFINE_integer("layers", 32, "Layers of the model, for compile.", 1)
flags.DEFINE_integer("slots", 8, "Replies that serve generates at once.", 1)
flags.DEFINE_integer("rounds", 7, "Number of rounds.", 1)
flags.DEFINE_integer("megabytes", 20, "Text of a round, for tokenize.", 1)
flags.DEFINE_enum("quantize", "", ["", "int8", "int4"], "Pack the matrices of nanoflax, for decode.")
flags.DEFINE_bool("no_bias", False, "Train without biases, on both sides.")
flags.DEFINE_bool("alone", False, "Do not measure PyTorch.")
flags.DEFINE_string("out", "", "File that `all` writes its figures to, as JSON.")
flags.DEFINE_string("side", "", "Internal: this process is a side (nanoflax, torch, compiled or machine).")
READ = {  # the flags that each measurement reads
    "train": {"shape", "batch_size", "steps", "rounds", "no_bias", "alone"},
    "decode": {"shape", "batch_size", "new_tokens", "rounds", "quantize", "alone"},
    "encode": {"shape", "batch_size", "steps", "rounds", "alone"},
    "compile": {"layers"},
    "packing": {"shape", "batch_size", "rounds"},
    "serve": {"shape", "slots", "rounds"},
    "where": {"shape", "batch_size", "steps", "no_bias"},
    "speculate": {"new_tokens", "rounds"},
    "tokenize": {"megabytes", "rounds"},
    "all": {"shape", "batch_size", "steps", "new_tokens", "rounds", "out"},
}
KINDS = (*READ,)


def main() -> int | None:
    if len(FLAGS.arguments) != 1 or FLAGS.arguments[0] not in KINDS:
        raise UserError(f"benchmark needs one argument: {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    (kind,) = FLAGS.arguments
    for name in sorted(set().union(*READ.values())):
        if FLAGS[name].present and name not in READ[kind] and not FLAGS.side:  # `all` gives its flags to every side
            readers = [other for other in KINDS if name in READ[other]]
            raise UserError(f"--{name} is for {' and '.join(readers)}, not {kind}")
    shape = "chats" if kind == "packing" and not FLAGS["shape"].present else FLAGS.shape
    job = sides.Job(
        kind, shape, FLAGS.batch_size, FLAGS.steps, FLAGS.new_tokens, not FLAGS.no_bias, FLAGS.quantize, FLAGS.alone
    )
    if FLAGS.side:
        return rounds.serve(side(job))
    if kind == "compile":
        return sides.compile_times(FLAGS.layers)
    if kind == "packing":
        return packing.measure_packing(job, FLAGS.rounds)
    if kind == "serve":
        return serving.measure_serving(job, FLAGS.rounds if FLAGS["rounds"].present else 1, FLAGS.slots)
    if kind == "where":
        return where.print_table(job)
    if kind == "speculate":
        return guesses.measure_guesses(FLAGS.new_tokens, FLAGS.rounds)
    if kind == "tokenize":
        return tokenizing.measure_tokenizing(FLAGS.megabytes, FLAGS.rounds)
    if kind == "all":
        settings = ("shape", "batch_size", "steps", "new_tokens")
        given = {name: FLAGS[name].value for name in settings if FLAGS[name].present}
        return everything.measure_all(given, FLAGS.rounds, FLAGS.out)
    names = ["nanoflax", "machine"]
    if not FLAGS.alone and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        names += ["torch", *["compiled"] * (kind != "decode")]
    facts, results = rounds.measure(sys.argv[1:], names, FLAGS.rounds)
    rounds.summarise(kind, facts, results)


def side(job: sides.Job) -> sides.Side:
    """The side of this process."""
    if FLAGS.side in ("nanoflax", "machine"):
        return getattr(sides, f"{FLAGS.side}_side")(job)
    from experiments.benchmarks.torch_sides import torch_side

    return torch_side(job, compiled=FLAGS.side == "compiled")


if __name__ == "__main__":
    launch(main, arguments=True)
