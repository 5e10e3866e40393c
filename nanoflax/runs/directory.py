"""The directory of a run: its configuration, tokenizer and labels, and whether it can be resumed."""

import dataclasses
import glob
import json
import os
import shutil

from experiments.flags import FLAGS
from nanoflax import config as configs
from nanoflax import parallel
from nanoflax.errors import UserError
from nanoflax.parallel import is_main_process


def read_run(workdir):
    """The Config and tokenizer of a run. Raises: UserError if workdir holds no run."""
    from nanoflax import tokenizers

    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir} holds no run (no config.json); give the directory that pretrain wrote")
    return read_config(path), tokenizers.load(os.path.join(workdir, "tokenizer"))


def read_config(path):
    """The Config of a config.json. Raises: UserError if there is none in it."""
    try:
        with open(path) as f:
            return configs.from_dict(configs.Config, json.load(f))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_labels(workdir, labels, several):
    """labels.json, which marks a run of finetune: the classes, and whether a text may have several
    of them (or none)."""
    with open(os.path.join(workdir, "labels.json"), "w") as f:
        json.dump({"labels": labels, "several": several}, f)


def read_labels(workdir, config):
    """(class names, whether a text may have several) of a finetune run; None of another run.

    Raises: UserError if the run's task has classes and labels.json is not there or not readable.
    """
    path = os.path.join(workdir, "labels.json")
    try:
        with open(path) as f:
            found = json.load(f)
            return tuple(found["labels"]), bool(found["several"])
    except FileNotFoundError:
        if config.task.kind in ("classify", "tag"):
            raise UserError(
                f"{path} does not exist: it names the classes of task.kind={config.task.kind!r}; finetune wrote it"
            ) from None
        return ((), False) if config.task.kind != "language_model" else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def whole(workdir, which="best"):
    """Where the whole model of a run is: in final/, once finetune has ended."""
    final = os.path.join(workdir, "final")
    return final if which == "best" and is_run(final) else workdir


def write_jsonl(path, records):
    """A JSON object a line. Raises: UserError if the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as f:
            for record in records:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def is_run(path):
    """Whether a path is the workdir of a run."""
    return os.path.isdir(os.path.join(path, "checkpoints"))


# Fields that may change between a run and its resumption: they do not touch the trajectory.
FREE = {
    "data": ("workers", "cache"),
    "model": ("attention_backend",),
    "train": (
        "loss_chunks",
        "remat",
        "scan_layers",
        "max_skipped",
        "evaluate_every",
        "evaluate_batches",
        "patience",
        "checkpoint_every",
        "checkpoint_seconds",
        "keep",
        "sample_prompt",
        "sample_tokens",
        "mesh",
        "watchdog_seconds",
        "tensorboard",
        "wandb",
    ),
}


def resumable(workdir, config, restart=False):
    """(the Config of the run in workdir or None, the directory of the run whose weights a new one
    begins with or None).

    restart: that is asked for; what it began before is gone on with by the same command.
    Raises: UserError with a diff if the run is not this one in what determines the numbers, or if
    there is no run to begin from.
    """
    from nanoflax.runs import checkpoint

    path, kept = os.path.join(workdir, "config.json"), previous(workdir)
    if kept and not checkpoint.steps(os.path.join(workdir, "checkpoints")):
        if not restart:
            raise UserError(
                f"--workdir={workdir}: a new run from the weights of {kept[-1]} was "
                "begun and has saved nothing yet; begin it again with "
                "--restart_from_weights"
            )
        set_aside(workdir)  # the rest of it
        saved = read_config(os.path.join(kept[-1], "config.json"))
        return refuse_other_tokenizer(saved, config), kept[-1]
    if not os.path.exists(path):
        if restart:
            raise UserError(f"--restart_from_weights: --workdir={workdir} holds no run to begin from")
        return None, None
    saved = read_config(path)
    old, new = configs.to_dict(saved), configs.to_dict(config)
    new["model"] |= configs.to_dict(settled(config.model, saved))  # on another mesh too
    for section, names in FREE.items():
        for name in names:
            old[section].pop(name), new[section].pop(name)
    changed = configs.diff(old, new)
    if changed and not restart:
        begin = (
            "--restart_from_weights"
            if "restart_from_weights" in FLAGS
            else f"--config.model.init_from={workdir} and another --workdir"
        )
        raise UserError(
            f"--workdir={workdir} holds a run with another configuration "
            f"({'; '.join(changed)}); choose another --workdir, or begin a new run from "
            f"its weights with {begin}"
        )
    if not restart or kept and not changed:  # the latter: this command began it
        return saved, None
    return refuse_other_tokenizer(saved, config), workdir


def refuse_other_tokenizer(saved, config):
    """The saved Config. Raises: UserError if the other one has another tokenizer."""
    old, new = saved.data.tokenizer, config.data.tokenizer
    if old != new:
        raise UserError(
            f"--config.data.tokenizer={new}: --restart_from_weights keeps the tokenizer of the weights, {old}"
        )
    return saved


def previous(workdir):
    """The directories of the runs that were set aside in workdir, the newest last."""
    found = glob.glob(os.path.join(glob.escape(workdir), "previous-*", "checkpoints"))
    return sorted(map(os.path.dirname, found), key=lambda path: int(path.rsplit("-", 1)[1]))


def settled(model, saved):
    """The ModelConfig with the padded vocabulary that a saved Config has, if it asks for that
    vocabulary or for the tokenizer's."""
    old = saved.model
    if model.vocab_padding or model.vocab_size not in (0, old.vocab_size - old.vocab_padding):
        return model
    return dataclasses.replace(model, vocab_size=old.vocab_size, vocab_padding=old.vocab_padding)


def refuse_other_data(meta, identity):
    """Raises: UserError if a checkpoint was trained with another tokenizer or other text."""
    for key, what in [
        ("tokenizer", "tokenizer/ of the workdir"),
        ("data", "text of data.train"),
        ("validation", "validation text"),
    ]:
        if meta[key] != identity[key]:
            raise UserError(
                f"the {what} is not the one that the checkpoint was trained with "
                f"(fingerprint {identity[key][:12]}, not {meta[key][:12]}); restore "
                "it or choose another --workdir (pretrain also takes "
                "--restart_from_weights)"
            )


def set_aside(workdir):
    """Move a run into a directory of its own inside workdir; returns that directory.

    checkpoints/ goes first and config.json last: who finds the one moved and not the other goes on.
    """
    from nanoflax.runs import checkpoint

    kept = previous(workdir)
    if not kept or checkpoint.steps(os.path.join(workdir, "checkpoints")):
        last = int(kept[-1].rsplit("-", 1)[1]) if kept else 0
        kept.append(os.path.join(workdir, f"previous-{last + 1}"))
        os.makedirs(kept[-1], exist_ok=True)
    if not os.path.exists(os.path.join(kept[-1], "config.json")):
        for name in ("checkpoints", "tokenizer", "metrics.jsonl", "tensorboard", "loss.png", "wandb", "config.json"):
            if os.path.exists(path := os.path.join(workdir, name)):
                os.rename(path, os.path.join(kept[-1], name))
    return kept[-1]


def write_run(workdir, config, tokenizer):
    """config.json and tokenizer/ of a new run; config.json last, so that it marks a whole run."""
    final, part = (os.path.join(workdir, name) for name in ("tokenizer", ".tokenizer.tmp"))
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save(part)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    temporary = os.path.join(workdir, ".config.json.tmp")
    with open(temporary, "w") as f:
        json.dump(configs.to_dict(config), f, indent=1)
    os.replace(temporary, os.path.join(workdir, "config.json"))


def trained_once(train, directory):
    """The tokenizer of train(); of several processes the first trains, the others read it."""
    import jax

    from nanoflax import tokenizers

    if jax.process_count() == 1:
        return train()
    part = f"{directory}.part"
    parallel.first(lambda: train().save(part))
    tokenizer = tokenizers.load(part)
    parallel.gather("read")
    if is_main_process():
        shutil.rmtree(part)
    return tokenizer


def get_tokenizer(config, directory, texts):
    """The tokenizer of the run in directory if there is one, else the one that data.tokenizer names
    or asks to train on texts(), an iterable of str."""
    from nanoflax import tokenizers

    kind, size = tokenizers.parse(config.tokenizer)
    own = os.path.join(directory, "tokenizer")
    if os.path.exists(os.path.join(directory, "config.json")):
        return tokenizers.load(own)
    if kind in ("bytes", "path"):
        return tokenizers.load(config.tokenizer)
    return trained_once(lambda: tokenizers.train_sentencepiece(texts(), size, kind), own)


def with_vocabulary(model, tokenizer, mesh, saved=None):
    """The ModelConfig with model.vocab_size settled: as in the saved Config of a run, or the
    tokenizer's (if not set), padded where the mesh needs it.

    Raises: UserError if it is too small.
    """
    from nanoflax import parallel

    model = settled(model, saved) if saved else model
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if (size := model.vocab_size - model.vocab_padding) < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={size} is less than the tokenizer's {tokenizer.vocab_size}; set it to 0 or at least that"
        )
    return model if saved else parallel.padded(model, mesh)
