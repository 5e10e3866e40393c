"""Pretraining: a decoder learns to predict the next token of a corpus, from scratch or from a source."""

import dataclasses
import functools
import os
from functools import partial
from typing import Any

import jax

from nanoflax import config as configs
from nanoflax import data, generate, nn, parallel, planning, report, tokenizers, train
from nanoflax.config import Config, ModelConfig, TextData
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, remote
from nanoflax.runs.directory import check_workdir, exclusive
from nanoflax.runs.opening import initial_parameters, open_initial
from nanoflax.runs.profile import parse_profile
from nanoflax.runs.run import Run
from nanoflax.runs.text_data import known_tokenizer, read_text, train_tokenizer
from nanoflax.runs.trainer import Job, Result, TrainingData, check_metric, check_wandb, run_job, setup_jax
from nanoflax.runs.vocabulary import with_vocabulary


def pretrain(config: Config, workdir: str, *, restart_from_weights: bool = False, profile: str = "") -> Run:
    """Pretrain in workdir. The same call again resumes the run.

    With config.model.init_from (a run, a directory of Transformers, a hub name or a .gguf file) training
    continues from that model, with its sizes and its tokenizer.
    restart_from_weights: start a new run from the weights of the old run in workdir, and archive the old run there.
    profile: steps such as "10:12", whose trace is written to workdir/profile.
    Returns the Run in workdir; its `reason` says why training ended. After SIGTERM or SIGINT the state is saved and
    `signal` is the number of the signal.
    Raises: UserError for a mistake of the user, before training.
    """
    config = with_mixture_file(config)
    check(config)
    steps = parse_profile(profile, config)
    setup_jax(trains=True)
    with exclusive(workdir) as directory:
        job = dataclasses.replace(make_job(config, directory, restart_from_weights), profile=steps)
        ended = run_job(job, directory)
        if parallel.is_main_process():
            summarise(directory, job.config, ended)
    return Run(workdir, reason=ended.reason, signal=ended.signal)


def check(config: Config) -> None:
    """Raises: UserError for a wrong Config. Pretraining trains all parameters of a decoder on text."""
    configs.validate(config)
    found = [
        f"model.{name}={getattr(config.model, name)!r}"
        for name in ("architecture", "head")
        if getattr(config.model, name) != getattr(ModelConfig, name)
    ]
    if config.peft != configs.FullFineTuning():
        found.append(f"peft.kind={config.peft.kind!r}")
    if not isinstance(config.task, configs.Pretrain):
        found.append(f"task.kind={config.task.kind!r}")
    if not isinstance(config.data, TextData):
        found.append(f"data.kind={config.data.kind!r}")
    if found:
        raise UserError(
            f"{', '.join(found)}: pretrain trains a decoder on text; use experiments.finetune for other training"
        )
    assert isinstance(config.data, TextData)
    data.stages_of(config.data, config.train.steps)
    check_metric(config, () if config.train.evaluate_batches else ("bits_per_byte",))
    check_wandb(config)


def with_mixture_file(config: Config) -> Config:
    """The Config with the text of the file in place of data.train=mixture:FILE, so that config.json holds it."""
    if not isinstance(config.data, TextData):
        return config
    return dataclasses.replace(config, data=data.with_mixture_file(config.data))


def check_sources(config: Config) -> dict[str, data.Source]:
    """The sources of data.train. Raises: UserError for missing files."""
    assert isinstance(config.data, TextData)  # see `check`
    sources = data.sources_of(config.data)
    for source in sources.values():
        data.source_version(source)
    return sources


def make_job(config: Config, workdir: str, restart: bool) -> Job:
    """The Job of a Config. The text is read later, and a new tokenizer is trained later: its size is known."""
    source = open_initial(config.model) if config.model.init_from else None
    if source:
        if source.config.reads_source or not source.config.is_causal:
            raise UserError(
                f"model.init_from={config.model.init_from} is of model.architecture={source.config.architecture!r}; "
                "pretrain trains a decoder"
            )
        config = dataclasses.replace(config, model=dataclasses.replace(source.config, head="lm"))
        configs.validate(config)
    config, chosen = configs.with_recipe(config)
    if chosen:
        print(chosen)
    saved, weights = check_workdir_once(workdir, config, restart)
    mesh = parallel.make_mesh(config.train.mesh)
    parallel.check_mesh(dataclasses.replace(config, model=parallel.pad_vocabulary(config.model, mesh)), mesh)
    assert isinstance(config.data, TextData)  # see `check`
    sources = check_sources(config)
    known = source.tokenizer if source and not weights else known_tokenizer(config, weights or workdir)
    kind, size = tokenizers.parse(config.data.tokenizer)
    for text in sources.values():
        data.check_segmentations(text, known, kind)
    size = size if known is None else known.vocab_size
    config = dataclasses.replace(config, model=with_vocabulary(config.model, size, mesh, saved))
    lengths = {"data.window": config.window} if config.window < config.model.context else None
    parallel.check_mesh(config, mesh, lengths)  # with the final vocabulary
    if known is not None:
        prompt_of(config, known)  # refused before anything is compiled
    tokenizer = functools.cache(lambda: train_tokenizer(config, weights or workdir) if known is None else known)
    model = nn.build(config.model, config.train.remat)
    batch, objective, load = train.abstract_batch(config, mesh), train.causal_lm, None
    if len(sources) > 1:
        batch["source_number"], objective = batch["first"], partial(objective, sources=tuple(sources))
    if weights:
        load = lambda: restore_weights(weights, model, mesh)
    elif source:
        load = lambda: initial_parameters(model, source.load, config, mesh)[0]
    return Job(
        config=config,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        shapes=parallel.param_shapes(model),
        load=load,
        objective=objective,
        batch=batch,
        fixed_batch=True,
        read_data=lambda: read_data(config, mesh, model, tokenizer()),
        flops_per_token=planning.flops_per_token(config.model, config.window),
        replaces=weights,
    )


def prompt_of(config: Config, tokenizer: Any) -> list[int]:
    """The ids of train.sample_prompt. Raises: UserError if the context is too short for it and one more token."""
    prompt = tokenizers.prompt_ids(tokenizer, config.train.sample_prompt)
    if config.train.sample_tokens:
        tokenizers.check_prompts(config.model, [prompt], continuation_length(config, prompt))
    return prompt


def continuation_length(config: Config, prompt: list[int]) -> int:
    """train.sample_tokens, or as many as fit into the context after the prompt; at least 1."""
    return max(1, min(config.train.sample_tokens, config.model.max_length - len(prompt)))


def read_data(config: Config, mesh: jax.sharding.Mesh, model: Any, tokenizer: Any) -> TrainingData:
    """The text, and its evaluation, which continues train.sample_prompt."""
    prompt = prompt_of(config, tokenizer)
    sample = lambda params: continue_prompt(config, model, params, tokenizer, prompt)
    return read_text(config, mesh, model, tokenizer, sample)


def check_workdir_once(workdir: str, config: Config, restart: bool) -> tuple[Config | None, str | None]:
    """`check_workdir`, called by process 0 for all processes."""

    def check_as_dict():
        saved, weights = check_workdir(workdir, config, restart)
        return saved and configs.to_dict(saved), weights

    saved, weights = parallel.run_on_main_process(check_as_dict)
    return saved and configs.from_dict(Config, saved), weights


def restore_weights(directory: str, model: Any, mesh: jax.sharding.Mesh) -> Any:
    """The parameters of the run in a directory. Raises: UserError if they do not fit the model."""
    params, _ = checkpoint.restore_params(
        os.path.join(directory, "checkpoints"), shardings=lambda shapes: parallel.shardings(shapes, mesh)
    )
    checkpoint.check_same_shapes(f"the run in {directory}", params, parallel.param_shapes(model))
    return params


def continue_prompt(config: Config, model: Any, params: Any, tokenizer: Any, prompt: list[int]) -> str:
    """train.sample_prompt and a continuation, always with the same random key; "" without train.sample_tokens."""
    if not config.train.sample_tokens:
        return ""
    (new,) = generate.sample(
        model,
        params,
        [prompt],
        continuation_length(config, prompt),
        temperature=0.8,
        top_k=40,
        rng=jax.random.PRNGKey(0),
        eos_id=tokenizers.stop_ids(tokenizer),
        vocab_size=tokenizer.vocab_size,
    )
    decoder = tokenizers.StreamingDecoder(tokenizer, prompt)
    return config.train.sample_prompt + decoder.add(new) + decoder.finish()


def summarise(workdir: str, config: Config, ended: Result) -> None:
    """Draw the loss curve and print how the run ended."""
    plot = report.plot_losses(workdir, config.train.batch_size * config.window)
    if ended.signal:
        print(f"{ended.reason}: saved at step {ended.step}; the same command continues")
    elif ended.trained_now:
        records = report.read_metrics(os.path.join(workdir, "metrics.jsonl"))
        best = next((r for r in records if r["step"] == ended.best_step and "validation_loss" in r), {})
        print(
            f"{ended.reason} at step {ended.step}; best at step {ended.best_step}: "
            + report.to_json({k: round(v, 4) for k, v in best.items() if not isinstance(v, str)})
        )
        print(f"loss curve: {remote.shown(str(plot))}")
