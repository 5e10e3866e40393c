"""Fine-tuning: a model learns a task from examples, with all parameters or with small adapters."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from nanoflax import config as configs
from nanoflax import hf, nn, parallel, peft, report, tasks
from nanoflax.config import Config, DistillTask
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, grpo, reference, remote
from nanoflax.runs.checkpoint import Checkpoints
from nanoflax.runs.directory import check_workdir, exclusive, part_of, replace_directory, write_jsonl, write_run
from nanoflax.runs.opening import open_initial, open_source, parameter_shapes
from nanoflax.runs.profile import parse_profile
from nanoflax.runs.run import Run, open_run
from nanoflax.runs.start import Start, known_classes, some, start_from
from nanoflax.runs.teacher import Teacher
from nanoflax.runs.trainer import Job, TrainingData, check_metric, check_wandb, run_job, setup_jax, without_models


def finetune(
    source: Any = None,
    data: str | None = None,
    *,
    task: Any = None,
    peft: Any = None,
    workdir: str,
    validation: str | None = None,
    config: Config | None = None,
    profile: str = "",
    reward: Any = None,
) -> Run:
    """Fine-tune in workdir. The same call again resumes the run and measures the best step again.

    source: a Run, its directory, a directory of Transformers, a hub name or a .gguf file; None trains a new model
    of config.model. data, validation: sources of examples, such as "jsonl:train.jsonl". task: a kind, such as
    "classify", or its dataclass. peft: a kind, such as "lora", or its dataclass. config: all other settings; the
    arguments before replace its fields. Without config, texts are cut to the context of the source.
    profile: steps such as "10:12", whose trace is written to workdir/profile. reward: for the task grpo, a function
    (completion, problem) -> number, or a name for task.reward.
    At the end the best step is measured; result.json, predictions.jsonl and final/ (all parameters) are written.
    Returns the Run in workdir; its `reason` says why training ended. After SIGTERM or SIGINT the state is saved and
    `signal` is the number of the signal.
    Raises: UserError for a mistake of the user, before training.
    """
    config = grpo.with_reward(with_arguments(config, source, data, validation, task, peft), reward)
    check(config)
    steps = parse_profile(profile, config)
    setup_jax(trains=True)
    with exclusive(workdir) as directory:
        finetuning = Finetuning(config, directory, reward if callable(reward) else None)
        ended = run_job(dataclasses.replace(finetuning.job, profile=steps), directory)
        if finetuning.policy:
            finetuning.policy.close()
        if ended.signal:
            print(f"{ended.reason}: saved at step {ended.step}; the same command continues")
        else:
            if ended.reason == "early stop" and ended.trained_now:
                metric, patience = config.train.metric, config.train.patience
                print(
                    f"early stop at step {ended.step}: no better train.metric={metric} in train.patience={patience} "
                    "evaluations"
                )
            finetuning.finish(ended.frozen)
    return Run(workdir, reason=ended.reason, signal=ended.signal)


def with_arguments(
    config: Config | None, source: Any, data: str | None, validation: str | None, task: Any, adapter: Any
) -> Config:
    """The Config, with the arguments of `finetune` in its fields."""
    given, config = config, config or Config()
    if source is not None:
        source = str(getattr(source, "source", source))  # of a Run
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=source))
    examples = configs.as_kind(configs.ExampleData, config.data)
    if configs.as_kind(type(config.data), examples) != config.data:
        raise UserError(f"data.kind={config.data.kind!r} is for pretraining; give data=ExampleData(...)")
    names = {"train": data, "validation": validation}
    own = {name: value for name, value in names.items() if value is not None}
    config = dataclasses.replace(config, data=dataclasses.replace(examples, **own))
    if task is not None:
        config = dataclasses.replace(config, task=of_kind(task, config.task, configs.TASK_KINDS, "task"))
    if adapter is not None:
        config = dataclasses.replace(config, peft=of_kind(adapter, config.peft, configs.PEFT_KINDS, "peft"))
    if given is None and source is not None and isinstance(config.task, configs.ExampleTask):
        context, fields = open_source(source).config.context, tasks.TASKS[config.task.kind].length_fields
        if isinstance(config.task, configs.GRPO):
            context //= 2  # a prompt and its completion are in one row
        lengths = {name: min(getattr(config.task, name), context) for name in fields}
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, **lengths))
    configs.validate(config)
    return config


def of_kind(value: Any, current: Any, kinds: Mapping[str, type], section: str) -> Any:
    """`value`, or if it is the name of a kind: `current` if that has this kind, else the kind's defaults.

    Raises: UserError for an unknown name.
    """
    if not isinstance(value, str):
        return value
    if value not in kinds:
        raise UserError(f"{section}={value!r} is not one of {', '.join(kinds)}")
    return current if current.kind == value else kinds[value]()


def check(config: Config) -> None:
    """Raises: UserError for settings that cannot be trained here."""
    if isinstance(config.task, configs.Pretrain):
        kinds = ", ".join(kind for kind in configs.TASK_KINDS if kind != "pretrain")
        raise UserError(f"task.kind='pretrain' is for experiments.pretrain; choose --config.task.kind from {kinds}")
    p = config.peft
    if not isinstance(p, configs.FullFineTuning) and not (config.model.init_from or p.trained):
        raise UserError(
            f"peft.kind={p.kind!r} without model.init_from would adapt a model with random weights; set "
            "model.init_from, or list in peft.trained what else is trained"
        )
    row = tasks.TASKS[config.task.kind]
    check_metric(config, row.metrics, row.measures_loss)
    check_wandb(config)


# The data.


def fingerprint(examples: Iterable[Any]) -> str:
    """A hash of examples. A run resumes only with the same examples."""
    text = "\n".join(map(repr, examples))
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def start_with_examples(config: Config, workdir: str, mesh: Any) -> tuple[Start, tasks.TaskData, Teacher | None]:
    """(where the run in workdir starts, its examples, the teacher of a distillation)."""
    assert isinstance(config.data, configs.ExampleData)  # see `with_arguments`
    source = open_initial(config.model) if config.model.init_from else None
    teacher = Teacher(config.task, workdir, mesh) if isinstance(config.task, DistillTask) else None
    kind = tasks.TASKS[config.task.kind].examples
    examples = tasks.load(tasks.examples_of(config.data), kind, known_classes(config, source), extend=True)
    start = start_from(config, source, examples, workdir, mesh, teacher and teacher.tokenizer)
    if teacher and teacher.task.start == "teacher":
        start = dataclasses.replace(start, source=teacher.source)
    return start, examples, teacher


def encode_examples(config: Config, tokenizer: Any, examples: tasks.TaskData) -> tuple[Any, Any, list[str]]:
    """(the training rows, the validation rows, lines that tell their numbers, labels and problems)."""
    task = config.task
    rows, held_out = (
        tasks.encode_for_task(part, config, tokenizer, examples.report)
        for part in (examples.train, examples.validation)
    )
    if reference.is_needed(task):
        rows, held_out = tasks.with_reference(rows), tasks.with_reference(held_out)
    labels = f", {len(examples.labels)} labels: {some(examples.labels)}" if examples.labels else ""
    lines = [f"{len(rows):,} training and {len(held_out):,} validation examples{labels}"]
    lines += [f"  {line}" for line in examples.report.lines()]
    if isinstance(task, configs.LabelTask) and task.class_weights:
        rows = tasks.weigh_classes(rows, examples.labels, task.class_weights)
        weights = zip(examples.labels, np.asarray(rows.class_weights), strict=True)
        lines.append("class weights: " + ", ".join(f"{name} {weight:.3g}" for name, weight in weights))
    return rows, held_out, lines


# The run.


class Finetuning:
    """One fine-tuning: reads its examples, makes its Job, measures and exports its best step."""

    def __init__(self, config: Config, workdir: str, reward: Any = None):
        self.workdir, self.task = workdir, tasks.TASKS[config.task.kind]
        self.base = ""  # fingerprint of the parameters of the source that are not trained; set by `load`
        self.mesh = parallel.make_mesh(config.train.mesh)
        start, self.examples, self.teacher = start_with_examples(config, workdir, self.mesh)
        if config.train.label_smoothing and start.config.model.multi_label:
            raise UserError(
                f"train.label_smoothing={config.train.label_smoothing} does not work with several labels; set it to 0"
            )
        self.config, self.tokenizer = config, _ = start.config, start.tokenizer
        lengths = tasks.length_limits(config.task) | {"the shortest batch": tasks.SHORTEST}
        parallel.check_mesh(config, self.mesh, lengths)
        parallel.run_on_main_process(lambda: check_workdir(workdir, config, None)[1])
        self.objective = tasks.objective_of(config.task)
        if self.teacher:
            self.teacher.check_vocabulary(
                self.tokenizer, config.model.init_from or f"data.tokenizer={config.data.tokenizer}"
            )
            self.objective = self.teacher.teach(self.objective, self.tokenizer)
        self.rows, self.held_out = self.read_rows()
        self.model = nn.build(config.model, config.train.remat)
        measured = self.model, config, self.tokenizer, self.held_out, self.mesh
        self.evaluator = tasks.Evaluator(*measured, self.objective)
        self.policy: Any = None  # grpo.Policy
        if isinstance(config.task, configs.GRPO):
            self.evaluator.reward = grpo.open_reward(config.task, open_run, reward)
        job = self.make_job(start)
        self.job = self.teacher.join(job) if self.teacher else self.policy.join(job) if self.policy else job

    def read_rows(self) -> tuple[Any, Any]:
        """The training and validation rows. Prints their numbers, labels and an example."""
        rows, held_out, lines = encode_examples(self.config, self.tokenizer, self.examples)
        print("\n".join(lines))
        if example := tasks.show_row(rows, self.tokenizer):
            print("an example; trained tokens are between ⟦ and ⟧:\n  | " + "\n  | ".join(example.splitlines()))
        return rows, held_out

    def make_job(self, start: Start) -> Job:
        config, shapes = self.config, parameter_shapes(self.model, self.config)
        B = config.train.batch_size
        batches = tasks.training_batches(self.rows, config, parallel.own_rows(self.mesh, B))
        if isinstance(batches, tasks.PackedBatches):
            print(batches.summary(config.train.steps))
        if self.evaluator.reward:
            parts = self.workdir, config, self.model, self.tokenizer, self.mesh, batches, self.evaluator.reward
            self.policy = grpo.Policy(*parts, load=lambda: start.load(self.model, self.mesh)[0])
        self.reference = reference.of_run(self.workdir, config, self.model, self.mesh, batches, self.held_out)
        return Job(
            config=config,
            mesh=self.mesh,
            model=self.model,
            tokenizer=lambda: self.tokenizer,
            shapes=shapes,
            load=lambda: self.load(start),
            trained=peft.trainable(shapes, config.peft),
            objective=self.objective,
            batch={n: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype) for n, x in batches[0].items()},
            read_data=lambda: self.training_data(batches, start),
        )

    def load(self, start: Start) -> Any:
        """The initial parameters."""
        params, self.base = start.load(self.model, self.mesh)
        if self.reference:
            self.reference.measure(params)
        return params

    def training_data(self, batches: Any, start: Start) -> TrainingData:
        if self.reference:
            if not self.reference.is_complete:  # a resumed run of more steps, which did not load its source
                self.load(start)
            self.reference.fill()
        if self.policy and self.policy.needs_copy:
            self.base = self.policy.load_reference()

        def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
            metrics, predictions = self.evaluator(params, self.config.train.evaluate_batches)
            return metrics, "\n".join([f"step {step}: {report.format_metrics(metrics)}", *self.samples(predictions)])

        identity = {
            "tokenizer": self.tokenizer.fingerprint,
            "data": fingerprint(self.examples.train),
            "validation": fingerprint(self.examples.validation),
            "base": self.base,
        } | ({"teacher": self.teacher.fingerprint} if self.teacher else {})
        return TrainingData(batches, evaluate, identity, batches.tokens_per_step)

    def samples(self, predictions: list) -> list[str]:
        """The table of a task with rewards: the first validation problems, their completions and rewards."""
        table, most = self.task.samples_table, getattr(self.config.task, "show", 0)
        return table(self.evaluator.rows.examples, predictions, most) if table else []

    # At the end.

    def finish(self, frozen: Any) -> None:
        """Measure the best step on all validation examples; write and print the results."""
        best, saved = checkpoint.restore_params(
            os.path.join(self.workdir, "checkpoints"),
            which="best",
            subtree="ema" if self.config.optim.ema else "params",
            shardings=lambda shapes: parallel.shardings(shapes, self.mesh),
        )
        params = peft.join(best, frozen)
        found = self.measure(params, saved["step"], sum(x.size for x in jax.tree.leaves(best)))
        params, frozen = (without_models(tree, self.job.other_models)[0] for tree in (params, frozen))
        for_peft = (configs.LowRank, configs.PromptTuning, configs.PrefixTuning)
        if isinstance(self.config.peft, for_peft):
            self.write_adapter(peft.join(jax.tree.map(parallel.fetch, best), frozen))
        if isinstance(self.config.peft, configs.LowRank):
            params = peft.merge(params)
        self.write_final(peft.dequantize_params(params))
        aligned = self.task.plots_alignment and self.config.model.bottleneck == "none"
        if aligned:
            params = jax.tree.map(parallel.fetch, params)
        if not parallel.is_main_process():
            return
        if aligned:
            self.plot_alignment(params)
        (report.plot_losses if self.task.measures_loss else report.plot_rewards)(self.workdir)
        print(f"best at step {saved['step']}: {report.format_metrics(found)}")
        if copied := self.evaluator.report.get("bleu_of_source"):
            print(f"bleu of the sources themselves: {copied:.4f}")
        wrote = (
            "result.json",
            "predictions.jsonl",
            "rollouts.jsonl",
            "reward.png",
            "loss.png",
            "attention.png",
            "final",
            "adapter",
        )
        wrote = [name for name in wrote if os.path.exists(os.path.join(self.workdir, name))]
        print(f"{remote.shown(self.workdir)}: {', '.join(wrote)}")

    def measure(self, params: Any, step: int, trained_parameters: int) -> dict[str, Any]:
        """The metrics on all validation examples. Writes result.json and predictions.jsonl, prints some answers."""
        evaluator = self.evaluator
        found, predictions = evaluator(params)
        examples = evaluator.rows.examples
        result = found | {"step": step, "report": evaluator.report, "trained_parameters": trained_parameters}
        if parallel.is_main_process():
            path = pathlib.Path(self.workdir, "result.json")
            report.write_atomically(path, report.to_json(result, indent=1).encode())
            if predictions:
                records = tasks.prediction_records(examples, predictions)
                write_jsonl(os.path.join(self.workdir, "predictions.jsonl"), records)
        for line in self.samples(predictions):
            print(line)
        shown = 0 if self.task.samples_table else getattr(self.config.task, "show", 0)
        for example, answer in zip(examples[:shown], predictions[:shown], strict=False):
            print(f"  | {report.printable(str(example.input))[:200]}\n  -> {report.printable(str(answer))}")
        if self.task.scores_table:
            print("\n".join(self.task.scores_table(evaluator.report)))
        return found

    def write_adapter(self, params: Any) -> None:
        """Write adapter/ for the peft library, if Transformers has this model; and adapter/base/, the model without
        the adapters, if peft cannot open model.init_from."""
        if not parallel.is_main_process():
            return
        config, directory = self.config, os.path.join(self.workdir, "adapter")
        base = config.model.init_from
        shutil.rmtree(directory, ignore_errors=True)
        try:
            if problem := hf.problem_of_base(base, config.model):
                if jax.process_count() > 1:  # other processes hold parts of the parameters
                    raise UserError(f"{problem}; the same command in one process writes it")
                adapters = peft.trainable(params, dataclasses.replace(config.peft, trained="adapters"))
                base = os.path.join(directory, "base")
                hf.save(base, config.model, peft.split(params, adapters)[1], self.tokenizer)
                print(f"adapter/base/ is the model under adapter/: {problem}")
            hf.save_adapter(directory, config.model, params, config.peft, base=base, tokenizer=self.tokenizer)
        except UserError as error:
            shutil.rmtree(directory, ignore_errors=True)
            print(f"no adapter/ for the peft library: {error}")

    def write_final(self, params: Any) -> None:
        """Write final/, a run directory with all parameters, atomically."""
        final = os.path.join(self.workdir, "final")
        part = part_of(final)
        parallel.run_on_main_process(lambda: shutil.rmtree(part, ignore_errors=True))
        remote.begin_export(part, final)
        with Checkpoints(os.path.join(part, "checkpoints")) as saves:
            saves.save(0, {"params": params}, {"tokenizer": self.tokenizer.fingerprint, "step": 0})
        if not parallel.is_main_process():
            return
        merged = isinstance(self.config.peft, configs.LowRank)
        adapters = configs.FullFineTuning() if merged else configs.PEFT_KINDS[self.config.peft.kind]()
        optim = dataclasses.replace(self.config.optim, ema=0.0)
        config = dataclasses.replace(self.config, optim=optim, peft=adapters)
        write_run(part, config, self.tokenizer)
        replace_directory(final)

    def plot_alignment(self, params: Any) -> None:
        """Draw attention.png: the attention from the first validation target to its source."""
        row = self.evaluator.rows.rows[0]
        weights = nn.alignment(nn.build(self.config.model), params, row["source"].tolist(), row["targets"].tolist())
        words = ([self.tokenizer.decode([i]) or "·" for i in row[side].tolist()] for side in ("source", "targets"))
        report.plot_alignment(os.path.join(self.workdir, "attention.png"), np.asarray(weights), *words)
