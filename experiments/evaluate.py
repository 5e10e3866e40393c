"""Measure a trained model: on text, on the examples of its task, or by ranking candidates.

    python -m experiments.evaluate --workdir=runs/pydocs_tiny --data='text:notes/*.md'
    python -m experiments.evaluate --workdir=runs/x --data=tfds:tiny_shakespeare --split=validation
    python -m experiments.evaluate --workdir=runs/topics --data=jsonl:new.jsonl --out=said.jsonl
    python -m experiments.evaluate --workdir=runs/tags --data=tfds:conll2003 --split=test
    python -m experiments.evaluate --model=SOURCE --candidates=FILE.jsonl --out=ranked.jsonl

Prints one JSON object. Of a run of pretrain: loss, perplexity and bits per byte of text, whose
windows of the model's context are read side by side, each token predicted once. Of a run of
finetune: what its own result.json says of its validation examples, on these; its predictions go to
--out. Without --data: on the run's own validation split.

A line of the candidates' file has `prompt`, `candidates` (a list of texts) and, if known, `answer`
(the right one, or its number from 0). Each candidate gets its log-likelihood after the prompt, also
over its tokens and over its bytes; with answers: how often the likeliest is right (accuracy, and by
bytes accuracy_normalised) and the mean reciprocal rank. A space between prompt and candidate is
part of one of them. Of an encoder-decoder, the prompt is the source.
"""

import dataclasses
import json
import math
import sys

from absl import flags

from experiments.flags import launch
from nanoflax import config as configs
from nanoflax import runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of a run")
flags.DEFINE_string(
    "model",
    "",
    "with --candidates, instead of --workdir: a directory of Transformers, a name on the hub or a .gguf file",
)
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which of its checkpoints")
flags.DEFINE_string(
    "data",
    "",
    "of pretrain pydocs | text:GLOB | tfds:NAME[:FIELD], of finetune a "
    "source of examples; empty is the run's own validation split",
)
flags.DEFINE_enum("split", "all", ["all", "train", "validation", "test"], "which part of --data")
flags.DEFINE_string("candidates", "", "a .jsonl file of candidates to rank")
flags.DEFINE_string("out", "", "a .jsonl file for predictions or rankings")


def main():
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir, of a run, or, with --candidates, --model")
    if FLAGS.model and not FLAGS.candidates:
        raise UserError(
            "--model needs --candidates=FILE.jsonl; to measure text, import the model into a run by experiments.convert"
        )
    if FLAGS.candidates and FLAGS.data:
        raise UserError("give either --data or --candidates")
    if FLAGS["split"].present and not FLAGS.data:
        raise UserError(f"--split={FLAGS.split} is of --data, which is missing; for the run's own source name it")
    runs.setup_jax()
    if FLAGS.candidates:
        result = ranked(FLAGS.candidates)
    else:
        config, tokenizer = runs.read_run(FLAGS.workdir)
        labels = runs.read_labels(FLAGS.workdir, config)
        result = on_text(config, tokenizer) if labels is None else on_examples(config, tokenizer, *labels)
    print(json.dumps(result, indent=1, ensure_ascii=False))


def on_text(config, tokenizer):
    from nanoflax import data, parallel, train
    from nanoflax.data import Windows

    if FLAGS.out:
        raise UserError("--out needs --candidates or a run of finetune: text has no predictions")
    if FLAGS.split == "test":
        raise UserError("--split=test is of examples; text has train, validation and all")
    store = data.prepare(
        data.source_of(config.data, FLAGS.data),
        tokenizer,
        FLAGS.split if FLAGS.data else "validation",
        config.data.cache or None,
    )
    windows = Windows(store, config.model.context, config.data.packing == "isolated")
    model, params = runs.restore_model(FLAGS.workdir, config, tokenizer, FLAGS.checkpoint)
    config = dataclasses.replace(  # all windows
        config, train=dataclasses.replace(config.train, evaluate_batches=0)
    )
    mesh = parallel.make_mesh("-1,1,1")
    nats, tokens = train.make_evaluation(model, config, mesh)(parallel.put_params(params, mesh), windows)
    return {
        "data": FLAGS.data or f"{config.data.train} (validation)",
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / store.n_bytes,
        "documents": store.n_documents,
        "tokens": int(tokens),
        "bytes": store.n_bytes,
        "report": store.report,
    }


def on_examples(config, tokenizer, labels, several):
    """What finetune says of its validation examples, of these; the table goes to stderr."""
    from nanoflax import data, parallel, tasks

    task, report = config.task, data.DataReport()
    kind = tasks.TASKS[task.kind].examples
    if FLAGS.data:
        source = tasks.examples_of(config.data, FLAGS.data)
        found = tasks.read(source, kind, labels, report, FLAGS.split)
    else:
        loaded = tasks.load(tasks.examples_of(config.data), kind, labels or None)
        found, report = loaded.validation, loaded.report
    rows = tasks.encode_for_task(found, config, tokenizer, labels, several, report)
    model, params, _ = runs.open_model(FLAGS.workdir, FLAGS.checkpoint)
    mesh = parallel.make_mesh("-1,1,1")
    judge = tasks.Evaluator(model, config, tokenizer, labels, rows, mesh)
    numbers, predictions = judge(parallel.put_params(params, mesh))
    if FLAGS.out:
        if not predictions:
            raise UserError(f"--out: task.kind={task.kind!r} is measured by its loss, and has no predictions")
        runs.write_jsonl(FLAGS.out, tasks.prediction_records(judge.rows.examples, predictions))
    if isinstance(task, configs.LabelTask):
        print("\n".join(tasks.metrics_table(judge.report)), file=sys.stderr)
    return {
        "data": FLAGS.data or f"{config.data.train} (validation)",
        "examples": len(rows),
        **numbers,
        "report": judge.report,
        "data_report": report.lines(),
    }


def ranked(path):
    """Candidates by their log-likelihoods: the figures, and the rankings where no --out takes them."""
    from nanoflax import generate

    questions = read_candidates(path)
    model, params, tokenizer = runs.open_model(FLAGS.workdir or FLAGS.model, FLAGS.checkpoint)
    pairs = [
        candidate_ids(tokenizer, q["prompt"], text, model.config.reads_source)
        for q in questions
        for text in q["candidates"]
    ]
    names = [f"{q['place']} candidate {i}" for q in questions for i in range(len(q["candidates"]))]
    totals = iter(generate.log_likelihoods(model, params, *zip(*pairs), names=names))
    sizes = iter(len(new) for _, new in pairs)
    places, normalised, out = [], [], []
    for q in questions:
        rows = [
            {
                "text": text,
                "log_likelihood": (total := float(next(totals))),
                "tokens": (n := next(sizes)),
                "per_token": total / n,
                "per_byte": total / len(text.encode()),
            }
            for text in q["candidates"]
        ]
        record = {"prompt": q["prompt"], "candidates": sorted(rows, key=lambda row: -row["log_likelihood"])}
        if q["answer"] is not None:
            places.append(generate.rank([row["log_likelihood"] for row in rows], q["answer"]))
            normalised.append(generate.rank([row["per_byte"] for row in rows], q["answer"]))
            record |= {"answer": q["candidates"][q["answer"]], "rank": places[-1], "rank_normalised": normalised[-1]}
        out.append(record)
    result = {"data": path, "questions": len(out), "candidates": len(pairs), "answers": len(places)}
    if places:
        mean = lambda values: sum(values) / len(places)  # noqa: E731
        result |= {
            "accuracy": mean([p == 1 for p in places]),
            "accuracy_normalised": mean([p == 1 for p in normalised]),
            "mean_reciprocal_rank": mean([1 / p for p in places]),
            "mean_reciprocal_rank_normalised": mean([1 / p for p in normalised]),
        }
    if not FLAGS.out:
        return result | {"rankings": out}
    runs.write_jsonl(FLAGS.out, out)
    return result


def candidate_ids(tokenizer, prompt, text, is_source):
    """(the prompt's ids, the candidate's): of a decoder as the two read together, if the prompt's
    are the same there; of an encoder-decoder the candidate with the tokens that frame it."""
    from nanoflax import tokenizers

    ids = tokenizers.prompt_ids(tokenizer, prompt, is_source)
    if is_source:  # as tasks.encode frames the targets of training
        encode = getattr(tokenizer, "encode_target", tokenizer.encode)
        before, after = tokenizers.ends(tokenizer)
        return ids, [*before, *encode(text), *after]
    whole = tokenizers.prompt_ids(tokenizer, prompt + text)
    same = len(whole) > len(ids) and whole[: len(ids)] == ids
    return ids, whole[len(ids) :] if same else tokenizer.encode(text)


def read_candidates(path):
    """The questions of a file, each answer as an index or None.

    Raises: UserError naming every line that is none.
    """
    from nanoflax.tokenizers import well_formed

    questions, found = [], []
    try:
        with open(path, encoding="utf-8") as f:
            lines = [(i, line) for i, line in enumerate(f, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--candidates={path}: {error}") from error
    for i, line in lines:
        try:
            q = json.loads(line)
        except ValueError as error:
            found.append(f"{path}:{i} is not JSON: {error}")
            continue
        texts = q.get("candidates") if isinstance(q, dict) else None
        if not (
            isinstance(q, dict)
            and isinstance(q.get("prompt"), str)
            and isinstance(texts, list)
            and texts
            and all(isinstance(text, str) and text for text in texts)
        ):
            found.append(f"{path}:{i} must have a 'prompt' (text) and 'candidates' (a list of texts, none empty)")
            continue
        answer = q.get("answer")
        if isinstance(answer, str) and answer in texts:
            answer = texts.index(answer)
        if answer is not None and (type(answer) is not int or not 0 <= answer < len(texts)):
            found.append(
                f"{path}:{i} has the answer {answer!r}, which is neither a candidate nor "
                f"the number of one (0 to {len(texts) - 1})"
            )
            continue
        questions.append(
            {
                "place": f"{path}:{i}",
                "prompt": well_formed(q["prompt"]),
                "candidates": [well_formed(text) for text in texts],
                "answer": answer,
            }
        )
    if found:
        raise UserError("; ".join(found[:8]) + (f"; {len(found) - 8} more" if found[8:] else ""))
    if not questions:
        raise UserError(f"--candidates={path} holds no question")
    return questions


if __name__ == "__main__":
    launch(main)
