"""Where a fine-tuning starts: its model, head, tokenizer and vocabulary."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from nanoflax import config as configs
from nanoflax import report, tasks, tokenizers
from nanoflax.config import Config, ModelConfig
from nanoflax.errors import UserError
from nanoflax.runs.directory import read_config
from nanoflax.runs.opening import ModelSource, initial_parameters
from nanoflax.runs.vocabulary import get_tokenizer, with_own_template, with_vocabulary


@dataclasses.dataclass(frozen=True)
class Start:
    """The starting point of a fine-tuning."""

    config: Config  # with the final sizes of the model
    tokenizer: Any
    source: ModelSource | None
    new_head: bool = False  # the source has no head with classes of the data

    def load(self, model: Any, mesh: jax.sharding.Mesh) -> tuple[Any, str]:
        """(the initial parameters on the mesh, the fingerprint of those of the source that are not trained)."""
        return initial_parameters(model, self._load_source if self.source else None, self.config, mesh)

    def _load_source(self) -> Any:
        params = self.source.load() if self.source else {}
        return {name: x for name, x in params.items() if name != "labels" or not self.new_head}


def known_classes(config: Config, source: ModelSource | None) -> tuple[str, ...]:
    """The classes of the model before its fine-tuning, in the order of its head: model.class_names, or the names in
    the source; () if the source has no head for the task.

    Raises: UserError if the head of the source has another number of classes than model.class_names.
    """
    given, kind = config.model.class_names, tasks.TASKS[config.task.kind]
    if not (source and has_classes(source, kind)):
        return given
    if given and len(given) != source.config.labels:
        raise UserError(
            f"model.class_names={','.join(given)} must name the {source.config.labels} classes of model.init_from="
            f"{config.model.init_from} in the order of its head: {', '.join(source.config.class_names)}"
        )
    return given or source.config.class_names


def has_classes(source: ModelSource, kind: Any) -> bool:
    """Whether a source has a head with the classes of a kind of task."""
    return kind.has_labels and source.config.head == kind.head and not source.config.is_regression


def start_from(
    config: Config, source: ModelSource | None, examples: Any, workdir: str, mesh: Any, teacher: Any = None
) -> Start:
    """Decides the model, its head, tokenizer and vocabulary. source: of model.init_from. teacher: the tokenizer of the
    teacher, which a new model reads if data.tokenizer names none that exists.

    Raises: UserError if the model cannot learn the task or is too short for it.
    """
    config = dataclasses.replace(config, task=tasks.in_form_of(config.task, examples.train))
    m, task = config.model, config.task
    new_head = needs_new_head(config, source, examples)
    if source:
        tokenizer = tasks.with_sentinels(task, with_own_template(source.tokenizer, workdir))
        m = dataclasses.replace(
            source.config,
            output_delay=m.output_delay or source.config.output_delay,
            vocab_size=max(source.config.vocab_size, tokenizer.vocab_size),
            multi_label=m.multi_label or source.config.multi_label and not new_head,
        )
        if isinstance(task, configs.TargetTask):  # the evaluation generates targets
            tokenizers.check_prompts(m, [[m.start_id]], 1)
    else:
        train_on = lambda: texts_of(examples.train)
        tokenizer = with_own_template(get_tokenizer(config.data, workdir, train_on, teacher), workdir)
        tokenizer = tasks.with_sentinels(task, tokenizer)
        if m.reads_source:
            m = dataclasses.replace(m, start_id=tokenizer.bos_id)
    path = os.path.join(workdir, "config.json")
    m = with_vocabulary(m, tokenizer.vocab_size, mesh, read_config(path) if os.path.exists(path) else None)
    m = with_head(m, task, examples)
    only_adapters = not isinstance(config.peft, configs.FullFineTuning) and not config.peft.trained
    if source and only_adapters and (new := new_parts(m, source.config, new_head)):
        # Frozen, new parameters would stay random.
        config = dataclasses.replace(config, peft=dataclasses.replace(config.peft, trained=f"adapters,{new}"))
        print(f"peft.trained={config.peft.trained}: these parts of the model are new")
    if long := [f"{name}={n}" for name, n in tasks.length_limits(task).items() if n > m.max_length]:
        raise UserError(f"{' and '.join(long)} must be at most the model's context of {m.context}")
    config, chosen = configs.with_recipe(dataclasses.replace(config, model=m))
    if chosen:
        print(chosen)
    configs.validate(config)
    return Start(config, tokenizer, source, new_head)


def needs_new_head(config: Config, source: ModelSource | None, examples: Any) -> bool:
    """Whether the head of the task is drawn anew; False for a task that keeps the head of any model."""
    kind = tasks.TASKS[config.task.kind]
    if kind.gives_score:
        return not (source and source.config.is_regression)
    return kind.has_labels and not keeps_head(config, source, examples)


def keeps_head(config: Config, source: ModelSource | None, examples: Any) -> bool:
    """Whether the head of the source is used: some of its classes are in the examples. Prints what becomes of it.

    Raises: UserError if none of model.class_names is in the examples.
    """
    known = known_classes(config, source)
    kept = examples.labels[: len(known)] == known
    if config.model.class_names and not kept:
        raise UserError(f"model.class_names={','.join(known)}: the labels of the data are {some(examples.labels)}")
    if not (source and has_classes(source, tasks.TASKS[config.task.kind])):
        return False
    if not kept:
        print(
            f"the head is drawn anew: none of its classes ({some(known)}) is a label of the data; if the labels are "
            "other names of these classes, give them in the order of the head: --config.model.class_names=FIRST,SECOND"
        )
        return False
    if new := examples.labels[len(known) :]:
        print(f"classes drawn anew: {some(new)}; kept from the model: {some(known)}")
    if absent := [name for name in known if name not in tasks.occurring_labels(examples.train)]:
        print(f"classes of the model without a training example, kept: {some(absent)}")
    if examples.multi_label and not source.config.multi_label:
        print("texts have several classes or none: each class gets a probability of its own, unlike in the source")
    return True


def some(names: Sequence[str]) -> str:
    """The names with commas between, safe to print; of many, the first 12."""
    return report.printable(", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]))


def with_head(model: ModelConfig, task: Any, examples: Any) -> ModelConfig:
    """The ModelConfig with the head of the task. Raises: UserError if the architecture cannot learn the task."""
    kind = tasks.TASKS[task.kind]
    if model.architecture not in kind.architectures:
        raise UserError(
            f"task.kind={task.kind!r} needs model.architecture to be {' or '.join(kind.architectures)}, not "
            f"{model.architecture!r}"
        )
    model = dataclasses.replace(model, head=kind.head or model.head)
    if kind.gives_score:
        names = model.class_names if model.is_regression else ()
        return dataclasses.replace(model, labels=1, class_names=names or ("reward",), multi_label=False)
    if not kind.has_labels:
        return model
    several = model.multi_label or examples.multi_label
    return dataclasses.replace(model, labels=len(examples.labels), class_names=examples.labels, multi_label=several)


def new_parts(model: ModelConfig, source: ModelConfig, new_head: bool) -> str:
    """The parts of a model that its source does not have, as a value of peft.trained: a head or an output delay, and
    the tables with rows of new tokens; "" if there are none."""
    head = new_head or model.head != source.head or model.labels != source.labels
    parts = ["head"] if head or model.output_delay and not source.output_delay else []
    if model.vocab_size - model.vocab_padding > source.vocab_size:
        parts += ["embed"] if model.tied or model.head not in ("lm", "mlm") else ["embed", "unembed"]
    return ",".join(parts)


def texts_of(examples: Iterable[Any]) -> Iterator[str]:
    """Every text of examples, to train a tokenizer on. Names of classes are no text."""
    for example in examples:
        for field in example.fields:
            value = getattr(example, field, None)
            if field in ("label", "tags"):
                continue
            if field == "tokens":
                yield " ".join(value or ())
            elif isinstance(value, tuple):  # messages
                yield from (message.get("content") or "" for message in value)  # None beside a call of a tool
            elif isinstance(value, str):
                yield value
