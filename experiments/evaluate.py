"""Measure a trained model: on text, on the examples of its task, or by ranking candidates.

    python -m experiments.evaluate --workdir=runs/pydocs_tiny --data='text:notes/*.md'
    python -m experiments.evaluate --workdir=runs/x --data=tfds:tiny_shakespeare --split=validation
    python -m experiments.evaluate --workdir=runs/topics --data=jsonl:new.jsonl --out=predictions.jsonl
    python -m experiments.evaluate --workdir=runs/tags --data=tfds:conll2003 --split=test
    python -m experiments.evaluate --model=CLASSIFIER --data=jsonl:new.jsonl
    python -m experiments.evaluate --model=SOURCE --candidates=FILE.jsonl --out=ranked.jsonl

Prints one JSON object. For a pretrained run: loss, perplexity and bits per byte of text; each token is
predicted once, from the tokens before it in its window (data.window, or else model.context). For a
fine-tuned run: the metrics in its result.json, for these examples; --out receives the predictions. A published
classifier or tagger has the same metrics; labels of the data mean its classes by their names, in any capitals, or by
their numbers.
Without --data, the run's own validation data is used.

A line of the candidates' file has `prompt`, `candidates` (a list of texts) and, if known, `answer`
(the right one, or its number from 0). Each candidate gets its log-likelihood after the prompt, also
divided by its tokens and by its bytes. With answers: accuracy (how often the most probable candidate is
right) and the mean reciprocal rank of the right one; NAME_normalised is the same per byte. Write a space
between prompt and candidate in one of the two texts. An encoder-decoder reads the prompt as its source.
"""

import sys

from absl import flags

from experiments.flags import launch
from experiments.source import check_source, define_source, open_source
from nanoflax import report, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
define_source()
flags.DEFINE_string(
    "data",
    "",
    "for a pretrained run pydocs | text:GLOB | tfds:NAME[:FIELD], for a fine-tuned run, a classifier or a tagger a "
    "source of examples; empty: the run's own validation data",
)
flags.DEFINE_string(
    "fields", None, "names of our fields in --data, as text=review,label=stars; default: those of the run"
)
flags.DEFINE_enum("split", "all", ["all", "train", "validation", "test"], "part of --data")
flags.DEFINE_string("candidates", "", "a .jsonl file of candidates to rank")
flags.DEFINE_string("reward", "", "of a run of grpo: another task.reward, such as python:FILE.py:FUNCTION")
flags.DEFINE_string("out", "", "a .jsonl file for predictions or rankings")


def main():
    if FLAGS.model and not FLAGS.candidates and not FLAGS.data:
        raise UserError("--model needs --candidates=FILE.jsonl or --data=SOURCE: it is no run with data of its own")
    if FLAGS.candidates and FLAGS.data:
        raise UserError("give either --data or --candidates")
    if FLAGS["split"].present and not FLAGS.data:
        raise UserError(f"--split={FLAGS.split} needs --data; for the run's own data, give its source")
    if FLAGS.fields is not None and not FLAGS.data:
        raise UserError(f"--fields={FLAGS.fields} needs --data; the run's own data has the fields of the run")
    check_source()
    runs.setup_jax()
    if FLAGS.candidates:
        questions = runs.read_questions(FLAGS.candidates)
        result = {"data": FLAGS.candidates} | open_source().rank(questions, FLAGS.out)
    else:
        run = open_source()
        if run.task is None and FLAGS.out:
            raise UserError("--out needs --candidates or a run of finetune: text has no predictions")
        if run.task is None and FLAGS.split == "test":
            raise UserError("--split=test is only for examples; text has train, validation and all")
        result = run.evaluate(FLAGS.data, FLAGS.split, FLAGS.out, FLAGS.fields, FLAGS.reward or None)
        if run.task is not None and run.task.scores_table:
            print("\n".join(run.task.scores_table(result["report"])), file=sys.stderr)
    print(report.to_json(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    launch(main)
