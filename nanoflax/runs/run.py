"""Run: an object for a run or any trained model, to generate, predict, evaluate, plot and export.

run = nanoflax.open("runs/notes")                # or a Hugging Face directory, hub name, .gguf, adapter directory
run.plot()
print(run.generate("The function returns", max_new_tokens=60))
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nanoflax import config as configs
from nanoflax import data, hf, kernels, nn, parallel, report, tasks, tokenizers
from nanoflax.errors import UserError
from nanoflax.runs import directory, exports, grpo, ranking, reference, remote, text_loss
from nanoflax.runs.generation import GenerationSettings, stream_texts
from nanoflax.runs.opening import ModelSource, load_split, open_source


def open_run(
    source: "str | os.PathLike | Run",
    checkpoint: str = "best",
    dtype: str | None = None,
    quantize: str = "",
    cache_dtype: str = "",
    mesh: str = "",
) -> "Run":
    """The Run of a run's directory, a Hugging Face directory, a hub name, a .gguf file or a directory
    of adapters of the peft library. Weights are read at their first use.

    checkpoint: "best" or "latest", for a run. dtype: of the parameters; None: unchanged. quantize: "int8" or "int4"
    packs the matrices, see peft.quantize_params; "file" keeps those of a .gguf file packed, see hf.load.
    cache_dtype: "int8" keeps keys and values of generated text in 8 bits, see nn.build. mesh: how the parameters are
    split over all devices, as train.mesh, such as "1,1,-1"; empty: they are on one device.
    Raises: UserError if the source cannot be opened, or for another dtype, checkpoint, quantize, cache_dtype or mesh.
    """
    if isinstance(source, Run):
        return source
    if checkpoint not in ("best", "latest"):
        raise UserError(f"checkpoint={checkpoint!r} must be 'best' or 'latest'")
    try:
        jax.numpy.dtype(dtype)
    except TypeError as error:
        raise UserError(f"dtype={dtype!r} must be float32, bfloat16 or float16") from error
    if quantize not in configs.QUANTIZE:
        raise UserError(f"quantize={quantize!r} must be {', '.join(filter(None, configs.QUANTIZE))}, or empty")
    if cache_dtype not in configs.CACHE_DTYPES:
        raise UserError(
            f"cache_dtype={cache_dtype!r} must be {', '.join(filter(None, configs.CACHE_DTYPES))}, or empty"
        )
    run = Run(source, checkpoint, dtype, quantize=quantize, cache_dtype=cache_dtype, mesh=mesh)
    if mesh:
        run._mesh  # noqa: B018 (raises UserError if the devices cannot form it)
    if run.workdir is None:
        run._opened  # noqa: B018 (raises UserError if the source is not a model)
    return run


class Run:
    """A trained or published model, with its run if there is one.

    source: the path or name that was opened. workdir: the directory of the run; None for other models.
    config: the Config of the run; for other models, default settings with their ModelConfig. labels: the names of
    the classes, else (). task: the row of tasks.TASKS of a fine-tuned run, a classifier or a tagger; None for a
    pretrained run and other models. model, params, tokenizer: read at their first use.
    reason, signal: how training ended, if it returned this Run: "finished", "early stop" or the name of a
    signal, and the number of the signal or 0. For an opened Run: "" and 0.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        checkpoint: str = "best",
        dtype: str | None = None,
        reason: str = "",
        signal: int = 0,
        quantize: str = "",
        cache_dtype: str = "",
        mesh: str = "",
    ) -> None:
        self.source, self.checkpoint, self.dtype = str(source), checkpoint, dtype
        self.reason, self.signal, self.quantize = reason, signal, quantize
        self.cache_dtype, self.mesh = cache_dtype, mesh
        self._local = remote.local_copy(self.source)
        self.workdir = self._local if directory.is_run(self._local) else None
        self._compiled_evaluator: Any = None

    def __repr__(self) -> str:
        return f"nanoflax.open({self.source!r})"

    @functools.cached_property
    def _opened(self) -> ModelSource:
        return open_source(self._local, self.checkpoint, quantize=self.quantize)

    @functools.cached_property
    def model(self) -> Any:
        config = self._opened.config
        if self.cache_dtype and config.head != "lm":
            raise UserError(f"cache_dtype={self.cache_dtype!r}: {self.source} generates no text, so it has no cache")
        return nn.build(config, cache_dtype=self.cache_dtype)

    @functools.cached_property
    def params(self) -> Any:
        params = load_split(self._opened, self._mesh) if self.mesh else self._opened.load()
        return kernels.cast(params, self.dtype) if self.dtype else params

    @property
    def tokenizer(self) -> Any:
        return self._opened.tokenizer

    @functools.cached_property
    def config(self) -> configs.Config:
        if self.workdir is None:
            return tasks.config_of(self._opened.config)
        config = directory.read_config(os.path.join(self.workdir, "config.json"))
        return configs.with_recipe(config)[0]  # a run without training may have open fields

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.model.class_names

    @property
    def task(self) -> Any:
        return tasks.TASKS.get(self.config.task.kind)

    # Text.

    def generate(self, prompts: str | Sequence[str] = "", **settings: Any) -> Any:
        """The prompt and its continuation. For a model that reads a source: only the generated target.

        prompts: a text, or a list of texts for a list of results; "" begins a document.
        settings: the fields of GenerationSettings, such as max_new_tokens=60, temperature=0.8, top_k=40,
        stop=["\\n"], beams=4, seed=1.
        Raises: UserError for a setting out of its range or a prompt longer than the model's context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        pieces = zip(*self.stream(texts, **settings), strict=True)
        shown = [""] * len(texts) if self.model.config.reads_source else texts
        found = [prompt + "".join(new) for prompt, new in zip(shown, pieces, strict=True)]
        return found[0] if isinstance(prompts, str) else found

    def stream(self, prompts: Sequence[str], as_task: bool = False, **settings: Any) -> Iterator[list[str]]:
        """Yields lists of the next piece of text for each prompt, without the prompts, during generation.

        as_task: use prompts as `predict` does: cleaned like the run's data, with the prompt format and
        the default settings of the run's task (such as the reply to a message).
        """
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise UserError(f"prompts has {wrong[0]!r:.60}, which is no text; nanoflax.sample continues token ids")
        if self.tokenizer is None:
            raise UserError(f"{self.source} has no tokenizer that nanoflax can read")
        form, defaults = tokenizers.prompt_ids, {}
        if as_task:
            prompts = self._task_texts(prompts)
            form, defaults = tasks.prompt_of(self.config.task) or form, self.task.generation(self.config.task)
        reads_source = self.model.config.reads_source
        ids = [form(self.tokenizer, tokenizers.well_formed(text), reads_source) for text in prompts]
        return self._continued(ids, settings, defaults)

    def _continued(self, ids: list[list[int]], settings: dict, defaults: dict | None = None) -> Iterator[list[str]]:
        """Checks everything before the weights are read."""
        config = self.model.config
        chosen = GenerationSettings.of(settings, defaults, config.generation)
        tokenizers.check_prompts(config, ids, chosen.limit(config, ids))
        constraints = chosen.constraints(self.tokenizer, config, len(ids))
        proposer = chosen.proposer(self.tokenizer)
        return stream_texts(self.model, self.params, self.tokenizer, ids, chosen, constraints, proposer)

    def reply(self, messages: list[dict[str, str]], **settings: Any) -> Iterator[str]:
        """Yields the reply to a chat, piece by piece, using the tokenizer's chat template.

        messages: dicts with role ("system", "user" or "assistant") and content.
        Raises: UserError if the tokenizer has no template, or the chat exceeds the model's context.
        """
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.source}: its tokenizer has no chat template; use predict or generate")
        ids = tokenizers.chat_prompt(self.tokenizer, messages)
        return (piece for (piece,) in self._continued([ids], settings))

    # The task of a fine-tuned run, a classifier or a tagger.

    def why_no_task(self) -> str:
        """Why `predict` and `evaluate` cannot use this model."""
        model = self.config.model
        if model.is_regression:
            return "gives one number for a text (a regression), not classes; model.apply computes it"
        if model.reads_source:
            return (
                "generates a target for a source: fine-tune it to a task, or use generate, or evaluate with candidates"
            )
        if model.head != "lm":
            return f"has model.head={model.head!r}, which has no task: fine-tune it first"
        return "was not fine-tuned, so it cannot predict; use generate"

    def cleaned_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts for the task of a fine-tuned run, cleaned like the run's data. A cleaned text may be empty."""
        if not self.task.needs_prompt:  # the model continues the prompt, so its end must not change
            return list(texts)
        source = tasks.examples_of(configs.as_kind(configs.ExampleData, self.config.data))
        return [source.clean(text, f"text {i}", data.DataReport()) for i, text in enumerate(texts, 1)]

    def _task_texts(self, texts: Sequence[str]) -> list[str]:
        found = self.cleaned_texts(texts)
        empty = [i for i, text in enumerate(found, 1) if not text or text.isspace()]
        if self.task.needs_prompt and empty:
            raise UserError(f"text {empty[0]} is empty after cleaning, with the settings of the run's data")
        return found

    def predict(self, texts: str | Sequence[str], **settings: Any) -> Any:
        """The prediction of a task for a text, or a list of predictions for a list of texts.

        classify: {class: probability}, the most probable first. tag: [(word, tag), ...]; spaces separate
        words. masked_lm, denoise: the text, corrupted by the noise of the task and restored; one line for
        each part of task.length tokens. translate: the target. instruct: the reply. language_model: the
        continuation. settings: of GenerationSettings, for the last three. The number of cut texts is
        printed to stderr.
        Raises: UserError if the model has no task, or a text is empty.
        """
        if self.task is None:
            raise UserError(f"{self.source} {self.why_no_task()}")
        prompts = [texts] if isinstance(texts, str) else list(texts)
        if settings and not self.task.prompt:
            given = ", ".join(f"{name}={value}" for name, value in settings.items())
            raise UserError(f"{given}: not read by task.kind={self.config.task.kind!r}, which generates no text")
        if self.task.prompt:
            found = ["".join(new) for new in zip(*self.stream(prompts, as_task=True, **settings), strict=True)]
        else:
            found = self._predictions(self._task_texts(prompts))
        return found[0] if isinstance(texts, str) else found

    @property
    def _cutting_config(self) -> configs.Config:
        """Texts are always cut for prediction; for a score, the end of a text, only to the context of the model."""
        task: Any = self.config.task
        length = self.model.config.context if self.task.gives_score else task.length
        task = dataclasses.replace(task, truncate=True, length=length)
        return dataclasses.replace(self.config, task=task)

    def _predictions(self, texts: list[str]) -> list[Any]:
        rows = tasks.encode_texts(texts, self._cutting_config, self.tokenizer, report := data.DataReport())
        for line in report.lines():
            print(line, file=sys.stderr)
        evaluator = self._evaluator(rows)
        parts: dict[str, list] = {}
        for example, found in zip(evaluator.rows.examples, evaluator.describe(self._params_on_mesh), strict=True):
            parts.setdefault(example.place, []).append(found)
        predictions = (parts.get(f"text {i}", [""]) for i in range(1, len(texts) + 1))
        return ["\n".join(found) if len(found) > 1 else found[0] for found in predictions]

    def rewards(self, texts: Sequence[Any], tools: Sequence[dict] | None = None) -> np.ndarray:
        """The scores of texts by a reward model, [len(texts)] float32: larger is better.

        texts: texts (a prompt with its answer; its end is added), or chats (lists of messages that end with the reply).
        tools: for the chat template. A text longer than the model's context is cut, and counted on stderr.
        Raises: UserError if the model gives no score, or a text or chat is empty.
        """
        if not (self.task and self.task.gives_score):
            raise UserError(f"{self.source} is no reward model, a decoder whose head gives one number for a text")
        if empty := [i for i, text in enumerate(texts, 1) if not text]:
            raise UserError(f"text {empty[0]} of {len(texts)} is empty")
        make = lambda text, place: (
            tasks.Text(tokenizers.well_formed(text), place)
            if isinstance(text, str)
            else tasks.Chat(tuple(text), place, tuple(tools) if tools else None)
        )
        examples = [make(text, f"text {i}") for i, text in enumerate(texts, 1)]
        if not examples:
            return np.zeros(0, np.float32)
        rows = tasks.encode_for_task(examples, self._cutting_config, self.tokenizer, report := data.DataReport())
        for line in report.lines():
            print(line, file=sys.stderr)
        return np.asarray(self._evaluator(rows).describe(self._params_on_mesh), np.float32)

    @functools.cached_property
    def _mesh(self) -> Any:
        return parallel.make_mesh(self.mesh or "-1,1,1", name="mesh")

    @functools.cached_property
    def _params_on_mesh(self) -> dict:
        return self.params if self.mesh else parallel.put_params(self.params, self._mesh)

    def _evaluator(self, rows: Any) -> Any:
        """A tasks.Evaluator of rows. All Evaluators of a Run share their compiled functions."""
        if self._compiled_evaluator is None:
            self._compiled_evaluator = tasks.Evaluator(self.model, self.config, self.tokenizer, rows, self._mesh)
        return self._compiled_evaluator.with_rows(rows)

    # Measurements.

    def evaluate(
        self, data: str = "", split: str = "all", out: str = "", fields: str | None = None, reward: Any = None
    ) -> dict[str, Any]:
        """The metrics of the model on data, as a dict of JSON values; see experiments.evaluate.

        A fine-tuned run, a classifier and a tagger have the metrics of their task; other models have loss,
        perplexity and bits per byte on windows as in training. data: a source of text, or for a task of
        examples; empty: the run's own validation data. split of `data`: all, train, validation or (only
        examples) test. out: a .jsonl file for the predictions of a task. fields: names of our fields in
        `data`, as text=review,label=stars; None: those of the run. reward: of a run of grpo, a function or a name for
        task.reward; None: the run's, if it is no function: what a directory names is not executed.
        Raises: UserError for data that cannot be read, or for `out` if there are no predictions.
        """
        if not data and (self.workdir is None or not self.config.data.train):
            raise UserError(f"{self.source} has no validation data of its own; give data")
        if self.cache_dtype and not (self.task and self.task.generates):
            raise UserError(f"cache_dtype={self.cache_dtype!r} has no effect: this evaluation generates no text")
        if self.task is not None:
            return self._evaluate_on_examples(data, split, out, fields, reward)
        model = self.config.model
        if model.head != "lm" or model.reads_source:
            raise UserError(f"{self.source} {self.why_no_task()}")
        if out or reward is not None:
            raise UserError("--out needs --candidates or a run of finetune, --reward a run of grpo: text has neither")
        if split == "test":
            raise UserError("--split=test is only for examples; text has train, validation and all")
        stores = text_loss.open_text(self, data, split, fields)
        sums = text_loss.over_windows(self, stores, self._mesh, self._params_on_mesh)
        return text_loss.text_metrics(self, data, stores, sums)

    def _evaluate_on_examples(
        self, name: str, split: str, out: str, fields: str | None, reward: Any = None
    ) -> dict[str, Any]:
        c, report = self.config, data.DataReport()
        if out and not self.task.predict:
            raise UserError(f"--out: task.kind={c.task.kind!r} has no predictions, only a loss")
        source = tasks.examples_of(configs.as_kind(configs.ExampleData, c.data), name, fields)
        if name:
            examples = tasks.read(source, self.task.examples, self.labels, report, split)
        else:
            loaded = tasks.load(source, self.task.examples, self.labels)
            examples, report = loaded.validation, loaded.report
        rows = tasks.encode_for_task(examples, c, self.tokenizer, report)
        rows = reference.rows_to_evaluate(rows, self.workdir, c, self.model, self._mesh)
        evaluator = self._evaluator(rows)
        evaluator.reward = grpo.reward_to_evaluate(c.task, open_run, reward)
        numbers, predictions = evaluator(self._params_on_mesh)
        if out:
            directory.write_jsonl(out, tasks.prediction_records(evaluator.rows.examples, predictions))
        return {
            "data": name or f"{c.data.train} (validation)",
            "examples": len(rows),
            **numbers,
            "report": evaluator.report,
            "data_report": report.lines(),
        }

    def rank(self, questions: str | Sequence[Any], out: str = "") -> dict[str, Any]:
        """Ranks candidates by their likelihood after a prompt: see rank_candidates.

        questions: a .jsonl file, the result of read_questions, or a list of {"prompt": text,
        "candidates": [text, ...], "answer": the right one or its index, if known}. out: a .jsonl file
        for the `rankings`, which are then not in the result.
        Raises: UserError that names every wrong question.
        """
        if isinstance(questions, str):
            found = ranking.read_questions(questions)
        else:
            found = ranking.questions_of((f"question {i}", q) for i, q in enumerate(questions, 1))
        result = ranking.rank_candidates(self.model, self.params, self.tokenizer, found)
        if out:
            directory.write_jsonl(out, result.pop("rankings"))
        return result

    # Pictures and files.

    def plot(self) -> pathlib.Path | None:
        """Draw the loss curve of the run, and show it in a notebook. Returns the path of loss.png, or None
        before the first step."""
        if self.workdir is None:
            raise UserError(f"{self.source} is not the directory of a run, so it has no loss curve")
        # Examples have no fixed number of tokens in a step.
        tokens = self.config.train.batch_size * self.config.window if self.task is None else None
        path = report.plot_losses(self.workdir, tokens)
        notebook = sys.modules.get("IPython")
        if path and notebook and hasattr(notebook.get_ipython(), "kernel"):
            from IPython.display import Image, display

            display(Image(str(path)))
        return path

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a directory for Transformers' AutoModel: see exports.save_pretrained."""
        exports.save_pretrained(self, path)

    def save_gguf(self, path: str | os.PathLike, kind: str = "F16") -> hf.GGUFSummary:
        """Write a .gguf file for llama.cpp: see exports.save_gguf."""
        return exports.save_gguf(self, path, kind)

    def save_run(self, workdir: str) -> None:
        """Write the model as a run with 0 steps, for sample, evaluate and finetune: see exports.save_run."""
        exports.save_run(self, workdir)
