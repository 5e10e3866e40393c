"""Show what a training run reads: for any step the source, place and text of every row, and its tokens.

    python -m experiments.inspect_data --config=tiny_shakespeare
    python -m experiments.inspect_data --config.data.train='text:notes/*.md' --step=300 --out=data.png
    python -m experiments.inspect_data --config=classify --config.data.train=jsonl:topics.jsonl
    python -m experiments.inspect_data --workdir=runs/pydocs_tiny --step=300

Nothing is trained. The rows are exactly those that training reads at this step, on any number of hosts. Steps have the
numbers of metrics.jsonl: the first is 1, and a stage `300:` of data.mixture begins with step 301. With --workdir the
configuration and the tokenizer are those of the run, and data that changed since are refused; without it the flags are
those of experiments.pretrain or experiments.finetune.

Printed are the size of the data, a histogram of the lengths of documents, the rows of the step, and the first rows as
the model sees them: │ stands between two tokens, ↵ is a newline, <eos> ends a document, and each document begins with
the token that is read before it. If some tokens of a row are not trained, the others are between ⟦ and ⟧.
"""

import collections
import os
import shutil

from absl import flags

from experiments.flags import launch, parsed_config
from nanoflax import report, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of a run, instead of the flags of a configuration")
flags.DEFINE_integer("step", 1, "the step whose rows are shown; the first is 1", 1)
flags.DEFINE_integer("rows", 16, "rows that are listed", 0)
flags.DEFINE_integer("samples", 2, "rows whose tokens are shown", 0)
flags.DEFINE_string("out", "", "a .png file for histograms of lengths and sources")


def main() -> None:
    if FLAGS.out and not (FLAGS.out.endswith(".png") and os.access(os.path.dirname(FLAGS.out) or ".", os.W_OK)):
        raise UserError(f"--out={FLAGS.out} must be a .png file in a directory that exists and can be written")
    data = runs.inspect_data(read_config(), FLAGS.workdir)
    if FLAGS.step > data.config.train.steps:
        raise UserError(f"--step={FLAGS.step} is after the last one; the run has train.steps={data.config.train.steps}")
    lengths = data.lengths()
    print("\n".join([*data.lines, "", *report.length_table(lengths, data.unit), ""]))
    print_rows(data)
    for row in range(min(FLAGS.samples, data.config.train.batch_size)):
        print(f"\nrow {row} as the model sees it")
        print("\n".join(data.show(FLAGS.step - 1, row)))
    if FLAGS.out:
        print(f"\nhistograms: {report.plot_data(FLAGS.out, lengths, data.limit, data.unit, *data.shares())}")


def read_config():
    if not FLAGS.workdir:
        return parsed_config()
    if given := [name for name in FLAGS if name.split(".")[0] == "config" and FLAGS[name].present]:
        raise UserError(f"--{given[0]} is not read with --workdir, whose config.json is used")
    return runs.read_run(FLAGS.workdir)[0]


def print_rows(data) -> None:
    """Print a table of the first rows of the step. Its column of sources is for mixtures."""
    facts, sources = data.rows(FLAGS.step - 1), list(data.lengths())
    counts = collections.Counter(x.source for x in facts)
    of = f"of {sources[0]}" if len(sources) == 1 else f"({', '.join(f'{counts[name]} of {name}' for name in sources)})"
    steps = data.config.train.steps
    print(f"step {FLAGS.step} of {steps:,} reads {len(facts):,} rows of at most {data.limit:,} tokens {of}")
    cells = [("row", "epoch", "source", "reads", "begins with")]
    cells += [(f"{x.row}", f"{x.epoch}", x.source, x.place, one_line(x.text)) for x in facts[: FLAGS.rows]]
    cells = [cell[:2] + cell[2 + (len(sources) == 1) :] for cell in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = shutil.get_terminal_size((120, 0)).columns if os.isatty(1) else 120
    for *start, text in cells if len(cells) > 1 else ():
        padded = [f"{x:>{n}}" if i < 2 else f"{x:<{n}}" for i, (x, n) in enumerate(zip(start, widths, strict=False))]
        line = "  ".join(padded)
        print(f"{line}  {text}"[: max(columns, len(line) + 20)].rstrip())
    if more := len(facts) - len(cells) + 1:
        print(f"... and {more:,} row{'s' * (more > 1)} more (--rows={len(facts)} lists all)")


def one_line(text: str) -> str:
    return report.printable(text).replace("\n", "↵")


if __name__ == "__main__":
    launch(main, "pydocs_tiny")
