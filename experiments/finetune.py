"""Teach a model a task from a file of examples, wholly or by a small adapter.

    python -m experiments.finetune --config=classify --workdir=runs/topics
    python -m experiments.finetune --config=classify --config.data.train=jsonl:train.jsonl \\
        --config.data.validation=jsonl:dev.jsonl --config.model.init_from=SOURCE \\
        --config.peft.kind=lora --workdir=runs/y

SOURCE is a workdir, a directory of Transformers, a name on the hub or a .gguf file; without one the
model is trained from scratch. The same command resumes. At the end the best step is measured on
the validation examples: a printed report, result.json, predictions.jsonl, and in final/ the whole
model, low-rank adapters merged (and beside it in adapter/, as the peft library reads them).
`evaluate --workdir=runs/y --data=jsonl:new.jsonl` gives the same for new examples, and
`sample --workdir=runs/y --prompt=TEXT` predicts; `convert` opens final/. Exit status, and several
hosts: as of pretrain.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import statistics

from absl import flags

from experiments.flags import HERE, define_hosts, join, launch, parsed_config
from nanoflax import config as configs
from nanoflax import parallel, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run", required=True)
define_hosts()

DEFAULT_CONFIG = os.path.join(HERE, "configs", "classify.py")


def main():
    config, workdir = parsed_config(), FLAGS.workdir
    runs.setup_jax()
    join(config)

    from nanoflax.runs import WorkdirLock

    with (
        WorkdirLock(workdir),
        contextlib.nullcontext() if parallel.is_main_process() else contextlib.redirect_stdout(None),
    ):
        return run(config, workdir)


def run(config, workdir):
    import jax

    from nanoflax import nn, parallel, peft, report, runs, tasks, train

    task, t = config.task, config.train
    check_used(config)
    runs.check_metric(config, tasks.TASKS[task.kind].metrics)
    runs.check_wandb(config)
    mesh, kind = parallel.make_mesh(t.mesh), tasks.TASKS[task.kind].examples
    data = tasks.load(tasks.examples_of(config.data), kind)
    if t.label_smoothing and data.multi_label:
        raise UserError(
            f"train.label_smoothing={t.label_smoothing} does not go with several "
            "labels: each is a question of its own; set it to 0"
        )
    config, params, tokenizer = starting_point(config, data, workdir, mesh)
    parallel.check_mesh(config, mesh, lengths(task) | {"the shortest batch": tasks.SHORTEST})
    parallel.run_on_main_process(lambda: runs.check_workdir(workdir, config, None)[1])  # refuses another run's workdir
    encode = lambda part: tasks.encode_for_task(  # noqa: E731
        part, config, tokenizer, data.labels, data.multi_label, data.report
    )
    rows, held_out = encode(data.train), encode(data.validation)
    print(
        f"{len(rows):,} training and {len(held_out):,} validation examples"
        + (f", {len(data.labels)} labels: {', '.join(data.labels[:12])}" if data.labels else "")
    )
    for line in data.report.lines():
        print(f"  {line}")
    if isinstance(task, configs.LabelTask) and task.class_weights:
        rows = tasks.weigh_classes(rows, data.labels, task.class_weights)
        print(
            "class weights: "
            + ", ".join(f"{name} {weight:.3g}" for name, weight in zip(data.labels, rows.class_weights))
        )
    if example := tasks.show_row(rows, tokenizer):
        print("an example; what is trained stands in ⟦⟧:\n  | " + "\n  | ".join(example.splitlines()))

    model = nn.build(config.model, t.remat)
    params = runs.initialize_with_adapters(model, params, config, mesh)
    trained, frozen = peft.split(params, peft.trainable(params, config.peft))
    if t.scan_layers:
        frozen = parallel.stack(frozen)
    print(report.parameter_table(params))
    size = sum(x.size for x in jax.tree.leaves(trained))
    whole = size + sum(x.size for x in jax.tree.leaves(frozen))
    print(f"{size:,} of {whole:,} parameters are trained ({size / whole:.2%})")
    shapes = {
        name: jax.ShapeDtypeStruct((t.batch_size, *x.shape[1:]), x.dtype)
        for name, x in Batches(rows, config, mesh)[0].items()
    }
    if attention := train.attention_backends(model, params, shapes, mesh, tasks.TASKS[task.kind].objective):
        print(f"attention {attention}")
    optimizer, schedule = train.make_optimizer(config.optim, t.steps)
    if isinstance(config.peft, configs.AdaLoRA):
        optimizer = peft.adalora_optimizer(optimizer, config.peft, t.steps)
    state = train.init_state(model, optimizer, config, mesh, trained)
    parallel.check_memory((state, frozen), mesh)
    step = train.jit_step(
        train.make_train_step(model, optimizer, config, tasks.TASKS[task.kind].objective), state, mesh
    )
    judge = tasks.Evaluator(model, config, tokenizer, data.labels, held_out, mesh)

    def evaluate(trained, at):
        found, _ = judge(peft.join(trained, frozen), t.evaluate_batches)
        return found, f"step {at}: {report.format_metrics(found)}"

    tokens = t.batch_size * statistics.mean(map(rows.n_tokens, range(len(rows))))  # no padding
    meta = {
        "tokenizer": tokenizer.fingerprint,
        "config": configs.to_dict(config),
        "data": fingerprint(data.train),
        "validation": fingerprint(data.validation),
    }
    parallel.check_processes_agree("their data", {k: meta[k] for k in meta if k != "config"})
    tracking, start = train.Tracking(), 0
    with runs.Checkpoints(os.path.join(workdir, "checkpoints"), t.keep) as saves:
        if saves.latest() is not None:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state._asdict()
            )
            restored, old = saves.restore(shapes)
            runs.check_same_data(meta | old, meta)
            state, start = train.TrainState(**restored), old["step"]
            tracking = train.Tracking.read(old["tracking"], start, saves.metric(start))
            print(f"resuming at step {start}")
        elif parallel.is_main_process():
            runs.write_labels(workdir, data.labels, data.multi_label)
            runs.write_run(workdir, config, tokenizer)
        stopped = start >= t.steps or 0 < t.patience <= tracking.waited  # the latter: early
        if tracking.owed or not stopped:
            with runs.displays(workdir, config, start, tokens) as (log, progress):
                if start == 0 and config.model.init_from:  # what the source knows already
                    found, line = evaluate(state.params, 0)
                    log.log(0, **found)
                    progress.write(line)
                state, tracking, outcome = train.fit(
                    state,
                    lambda state, batch: step(state, batch, frozen),
                    Batches(rows, config, mesh),
                    config,
                    mesh,
                    evaluate=evaluate,
                    checkpoints=saves,
                    log=log,
                    progress=progress,
                    meta=meta,
                    tracking=tracking,
                    schedule=schedule,
                )
            if outcome.signal:
                print(f"{outcome.reason}: saved at step {outcome.step}; the same command goes on")
                return 128 + outcome.signal
            if outcome.step < t.steps:
                print(
                    f"{outcome.reason} at step {outcome.step}: no better train.metric="
                    f"{t.metric} in train.patience={t.patience} evaluations"
                )
    best, saved = runs.restore_params(
        os.path.join(workdir, "checkpoints"),
        which="best",
        subtree="ema" if config.optim.ema else "params",
        shardings=lambda shapes: parallel.shardings(shapes, mesh),
    )
    finish(workdir, config, tokenizer, data, best, parallel.unstack(frozen), judge, saved["step"])
    return 0


def check_used(config):
    """Raises: UserError for what would train nothing of use."""
    if isinstance(config.task, configs.Pretrain):
        kinds = ", ".join(kind for kind in configs.TASK_KINDS if kind != "pretrain")
        raise UserError(f"task.kind='pretrain' is for experiments.pretrain; choose --config.task.kind from {kinds}")
    p = config.peft
    if not isinstance(p, configs.FullFineTuning) and not (config.model.init_from or p.trained):
        raise UserError(
            f"peft.kind={p.kind!r} without model.init_from would adapt a model that "
            "stays as it was drawn; say what is trained with it in peft.trained"
        )


def starting_point(config, data, workdir, mesh):
    """(the Config with its model settled, its source's params or None, the tokenizer)."""
    from nanoflax import tasks
    from nanoflax.tasks import TASKS

    m, task, params, other = config.model, config.task, None, False
    if m.init_from:
        model, params, tokenizer = runs.open_model(m.init_from)
        if tokenizer is None:
            raise UserError(f"model.init_from={m.init_from} has no tokenizer")
        if model.config.head == task.kind and os.path.exists(os.path.join(m.init_from, "labels.json")):
            other = runs.read_labels(m.init_from, config)[0] != data.labels
        if other:  # as many classes, perhaps, but not the same
            params = {name: x for name, x in params.items() if name != "labels"}
        tokenizer = tasks.with_sentinels(task, tokenizer)
        m = dataclasses.replace(
            model.config,
            init_from=m.init_from,
            dropout=m.dropout,
            attention_backend=m.attention_backend,
            output_delay=m.output_delay or model.config.output_delay,
            vocab_size=max(model.config.vocab_size, tokenizer.vocab_size),
        )
    else:
        tokenizer = tasks.with_sentinels(task, runs.get_tokenizer(config.data, workdir, lambda: texts(data.train)))
        if m.reads_source:
            m = dataclasses.replace(m, start_id=tokenizer.bos_id)
    path = os.path.join(workdir, "config.json")
    m = runs.with_vocabulary(m, tokenizer, mesh, runs.read_config(path) if os.path.exists(path) else None)
    suited = TASKS[task.kind].architectures
    if m.architecture not in suited:
        raise UserError(
            f"task.kind={task.kind!r} needs model.architecture to be {' or '.join(suited)}, not {m.architecture!r}"
        )
    if isinstance(task, configs.LabelTask):
        m = dataclasses.replace(m, head=task.kind, labels=len(data.labels))
    heads = {"masked_lm": "mlm", "instruct": "lm", "language_model": "lm"}
    m = dataclasses.replace(m, head=heads.get(task.kind, m.head))
    p = config.peft
    if (
        m.init_from
        and not isinstance(p, configs.FullFineTuning)
        and not p.trained
        and (
            other
            or m.head != model.config.head
            or m.labels != model.config.labels
            or m.output_delay
            and not model.config.output_delay
        )
    ):
        # What is new was never trained: frozen it would stay random.
        config = dataclasses.replace(config, peft=dataclasses.replace(p, trained="adapters,head"))
    if long := [f"{name}={n}" for name, n in lengths(task).items() if n > m.context]:
        raise UserError(f"{' and '.join(long)} must be at most the model's context of {m.context}")
    config = dataclasses.replace(config, model=m)
    configs.validate(config)
    return config, params, tokenizer


def lengths(task):
    """The fields of a task that say how long its rows may be."""
    found = {"task.length": task.length}
    if isinstance(task, configs.TargetTask):
        found["task.target_length"] = task.target_length
    return found


def fingerprint(examples):
    """A hash of examples: a run that goes on with others would not be the same run."""
    text = "\n".join(map(repr, examples))
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def texts(examples):
    """Every text of examples, to train a tokenizer on."""
    for example in examples:
        for field in example.fields:
            value = getattr(example, field, None)
            if field == "tokens":
                yield " ".join(value)
            elif field == "messages":
                yield from (message["content"] for message in value)
            elif isinstance(value, str) and field != "label":
                yield value


class Batches:
    """tasks.ExampleBatches for `train.fit`, which also asks where a step's rows came from."""

    def __init__(self, rows, config, mesh):
        from nanoflax import parallel
        from nanoflax.tasks import ExampleBatches

        self.rows, task, t = rows, config.task, config.train
        self.batches = ExampleBatches(
            rows,
            t.batch_size,
            t.seed,
            True,
            parallel.own_rows(mesh, t.batch_size),
            (task.max_shift, task.shift_probability)
            if isinstance(task, configs.ShiftTask) and task.shift_probability
            else None,
        )

    def __getitem__(self, step):
        return self.batches[step]

    def describe(self, step):
        return ", ".join(self.rows.examples[i].place for i in self.batches.indices(step)[:4])


def finish(workdir, config, tokenizer, data, best, frozen, judge, step):
    """Measure the best step on every validation example; write and print what it can do.

    best: its trained parameters; frozen: the others.
    """
    import jax
    import numpy as np

    from nanoflax import hf, nn, parallel, peft, report, runs, tasks

    params = peft.join(best, frozen)
    found, predictions = judge(params)
    result = found | {
        "step": step,
        "report": judge.report,
        "trained_parameters": sum(x.size for x in jax.tree.leaves(best)),
    }
    if parallel.is_main_process():
        with open(os.path.join(workdir, "result.json"), "w") as f:
            json.dump(report.json_numbers(result), f, indent=1, allow_nan=False)
        if predictions:
            runs.write_jsonl(
                os.path.join(workdir, "predictions.jsonl"), tasks.prediction_records(judge.rows.examples, predictions)
            )
    for example, said in itertools.islice(zip(judge.rows.examples, predictions), config.task.show):
        print(f"  | {report.printable(str(example.input))[:200]}\n  -> {report.printable(str(said))}")
    if isinstance(config.task, configs.LabelTask):
        print("\n".join(tasks.metrics_table(judge.report)))
    kind, model_config = config.peft.kind, config.model
    if kind in peft.LOW_RANK:
        adapters = peft.join(jax.tree.map(parallel.fetch, best), frozen)
        try:
            if parallel.is_main_process():
                hf.save_adapter(
                    os.path.join(workdir, "adapter"), model_config, adapters, config.peft, base=model_config.init_from
                )
        except UserError as error:  # such as a model that no class of Transformers is
            print(f"no adapter/ for the peft library: {error}")
        params = peft.merge(params)
    # At once, or not at all: what is half written would be taken for the model.
    final, part = (os.path.join(workdir, name) for name in ("final", ".final"))
    parallel.run_on_main_process(lambda: shutil.rmtree(part, ignore_errors=True))
    with runs.Checkpoints(os.path.join(part, "checkpoints")) as saves:
        saves.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint, "step": 0})
    aligned = config.task.kind == "translate" and config.model.bottleneck == "none"
    if aligned:
        params = jax.tree.map(parallel.fetch, params)
    if not parallel.is_main_process():
        return
    runs.write_labels(part, data.labels, data.multi_label)
    runs.write_run(
        part,
        dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, ema=0.0),
            peft=configs.FullFineTuning() if kind in peft.LOW_RANK else configs.PEFT_KINDS[kind](),
        ),
        tokenizer,
    )
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    if aligned:
        row = judge.rows.rows[0]
        weights = nn.alignment(nn.build(config.model), params, row["source"], row["targets"])
        report.plot_alignment(
            os.path.join(workdir, "attention.png"),
            np.asarray(weights),
            *([tokenizer.decode([i]) or "·" for i in row[side].tolist()] for side in ("source", "targets")),
        )
    report.plot_losses(workdir)
    print(f"best at step {step}: {report.format_metrics(found)}")
    if copied := judge.report.get("bleu_of_source"):
        print(f"bleu of the sources themselves: {copied:.4f}")
    wrote = ("result.json", "predictions.jsonl", "loss.png", "attention.png", "final", "adapter")
    print(f"{workdir}: " + ", ".join(name for name in wrote if os.path.exists(os.path.join(workdir, name))))


if __name__ == "__main__":
    launch(main, DEFAULT_CONFIG, data=configs.ExampleData)
