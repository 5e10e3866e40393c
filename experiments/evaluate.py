"""Measure a trained model: on text, on the examples of its task, by ranking candidates, or on benchmarks of lm-eval.

    python -m experiments.evaluate --workdir=runs/pydocs_tiny --data='text:notes/*.md'
    python -m experiments.evaluate --workdir=runs/x --data=tfds:tiny_shakespeare --split=validation
    python -m experiments.evaluate --workdir=runs/topics --data=jsonl:new.jsonl --out=predictions.jsonl
    python -m experiments.evaluate --workdir=runs/tags --data=tfds:conll2003 --split=test
    python -m experiments.evaluate --model=CLASSIFIER --data=jsonl:new.jsonl
    python -m experiments.evaluate --model=SOURCE --candidates=FILE.jsonl --out=ranked.jsonl
    python -m experiments.evaluate --model=SOURCE --data='text:book.txt' --stride=512
    python -m experiments.evaluate --model=SOURCE --tasks=arc_easy,lambada_openai --limit=100 --out=results
    python -m experiments.evaluate --model=SOURCE --tasks=my_task --include_path=my_tasks --num_fewshot=5

Prints one JSON object. For a pretrained run: loss, perplexity and bits per byte of text; each token is predicted once,
from the tokens before it in its window (data.window, or else model.context). For a fine-tuned run: the metrics in its
result.json, for these examples; --out receives the predictions. A published classifier or tagger has the same metrics;
labels of the data mean its classes by their names, in any capitals, or by their numbers.
Without --data, the run's own validation data is used.

A line of the candidates' file has `prompt`, `candidates` (a list of texts) and, if known, `answer` (the right one, or
its number from 0). Each candidate gets its log-likelihood after the prompt, also divided by its tokens and by its
bytes. With answers: accuracy (how often the most probable candidate is right) and the mean reciprocal rank of the
right one; NAME_normalised is the same per byte. Write a space between prompt and candidate in one of the two texts. An
encoder-decoder reads the prompt as its source.

--stride: each document is one text, in windows of the model's context; each window predicts the next --stride tokens,
so each token has at least context - stride + 1 tokens before it.

--tasks: benchmarks of lm-eval (pip install 'nanoflax[evals]'), whose data sets come from the Hugging Face hub, or YAML
files below --include_path in lm-eval's format, with data of yours. Their table goes to stderr, and --out receives
lm-eval's own files. `lm-eval ls tasks` lists the tasks.
"""

import sys
from typing import Any

from absl import flags

import nanoflax
from experiments.flags import launch
from experiments.source import check_source, define_source, open_source
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
define_source()
flags.DEFINE_string(
    "data",
    "",
    "for a pretrained run pydocs | text:GLOB | hub:OWNER/NAME | tfds:NAME[:FIELD], for a fine-tuned run, a classifier "
    "or a tagger a source of examples; default: the run's own validation data",
)
flags.DEFINE_string("fields", None, "names of our fields in --data, as text=review,label=stars; default: the run's")
flags.DEFINE_enum("split", "all", ["all", "train", "validation", "test"], "part of --data")
flags.DEFINE_string("candidates", "", "a .jsonl file of candidates to rank")
flags.DEFINE_string("reward", "", "of a run of grpo: another task.reward, such as python:FILE.py:FUNCTION")
flags.DEFINE_string("out", "", "a .jsonl file for predictions or rankings; with --tasks a directory of lm-eval's")
flags.DEFINE_integer("stride", None, "of texts longer than the context: the tokens that a window predicts", 1)
flags.DEFINE_list("tasks", [], "names of tasks of lm-eval, separated by commas")
flags.DEFINE_string("include_path", None, "a directory with YAML files of more tasks; their Python functions are run")
flags.DEFINE_integer("num_fewshot", None, "answered examples before each question; default: those of the task", 0)
flags.DEFINE_float("limit", None, "documents of each task; below 1: a share of them", 0)
flags.DEFINE_bool("apply_chat_template", False, "ask the questions of --tasks as a user in a chat")
flags.DEFINE_string("system_instruction", None, "a text before each question of --tasks; in a chat the system message")
flags.DEFINE_integer("batch_size", 16, "rows of a batch, for --tasks and --stride", 1)
OF_TASKS = ("include_path", "num_fewshot", "limit", "apply_chat_template", "system_instruction")


def main():
    check_flags()
    check_source()
    nanoflax.runs.setup_jax()
    if FLAGS.tasks:
        settings: dict[str, Any] = {name: FLAGS[name].value for name in OF_TASKS}
        found = nanoflax.evals.run_tasks(
            open_source(), FLAGS.tasks, batch_size=FLAGS.batch_size, out=FLAGS.out or None, **settings
        )
        print(nanoflax.evals.table(found), file=sys.stderr)
        result = {name: found[name] for name in ("results", "groups", "n-shot", "n-samples") if name in found}
    elif FLAGS.stride:
        result = nanoflax.evals.strided_perplexity(
            open_source(), FLAGS.data, FLAGS.stride, FLAGS.split, FLAGS.fields, FLAGS.batch_size
        )
    elif FLAGS.candidates:
        questions = nanoflax.runs.read_questions(FLAGS.candidates)
        result = {"data": FLAGS.candidates} | open_source().rank(questions, FLAGS.out)
    else:
        run = open_source()
        result = run.evaluate(FLAGS.data, FLAGS.split, FLAGS.out, FLAGS.fields, FLAGS.reward or None)
        if run.task is not None and run.task.scores_table:
            print("\n".join(run.task.scores_table(result["report"])), file=sys.stderr)
    print(nanoflax.report.to_json(result, indent=1, ensure_ascii=False))


def check_flags():
    """Raises: UserError for flags that contradict each other, or are given without a value."""
    for name in ("data", "candidates", "tasks", "out", "fields", "reward", "include_path"):
        if FLAGS[name].present and not FLAGS[name].value:
            raise UserError(f"--{name}= is empty; give a value, or leave the flag out")
    if sum(map(bool, (FLAGS.candidates, FLAGS.data, FLAGS.tasks))) > 1:
        raise UserError("give one of --data, --candidates and --tasks")
    if FLAGS.model and not FLAGS.candidates and not FLAGS.data and not FLAGS.tasks:
        raise UserError("--model needs --candidates, --data or --tasks: it is no run with data of its own")
    if unread := [name for name in OF_TASKS if FLAGS[name].present and not FLAGS.tasks]:
        raise UserError(f"--{unread[0]}={FLAGS[unread[0]].value} is only read with --tasks")
    if FLAGS.stride and (FLAGS.candidates or FLAGS.tasks or FLAGS.out):
        raise UserError(f"--stride={FLAGS.stride} measures text: it is not read with --candidates, --tasks or --out")
    if FLAGS["batch_size"].present and not (FLAGS.tasks or FLAGS.stride):
        raise UserError(f"--batch_size={FLAGS.batch_size} is only read with --tasks or --stride")
    if FLAGS.cache_dtype and (FLAGS.candidates or FLAGS.stride):
        raise UserError(f"--cache_dtype={FLAGS.cache_dtype} has no effect with --candidates or --stride: no new text")
    if FLAGS.reward and (FLAGS.candidates or FLAGS.tasks or FLAGS.stride):
        raise UserError(f"--reward={FLAGS.reward} is not read with --candidates, --tasks or --stride")
    for name in ("split", "fields"):
        if FLAGS[name].present and not FLAGS.data:
            raise UserError(f"--{name}={FLAGS[name].value} needs --data; for the run's own data, give its source")


if __name__ == "__main__":
    launch(main)
