"""The directory of a run: its configuration and tokenizer, and checks before a run starts there.

config.json  tokenizer/  checkpoints/  metrics.jsonl  loss.png  (tensorboard/  wandb/)
final/                      when finetune has finished: a run directory with all parameters
previous-1/                 the old run that --restart_from_weights archived
"""

import contextlib
import dataclasses
import filecmp
import glob
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from nanoflax import config as configs
from nanoflax import parallel, report, storage, untrusted
from nanoflax.config import Config, LabelTask
from nanoflax.errors import DISK_ERRORS, UserError, listed
from nanoflax.runs import remote
from nanoflax.runs.lock import WorkdirLock, remove_lock
from nanoflax.runs.vocabulary import with_saved_vocabulary

DIRECTORIES = ("checkpoints", "tokenizer", "tensorboard", "final", "adapter")
FILES = (
    "config.json", "metrics.jsonl", "result.json", "predictions.jsonl", "rollouts.jsonl", "reward.png", "loss.png",
    "attention.png"
)  # fmt: skip


@contextlib.contextmanager
def exclusive(workdir: str) -> Iterator[str]:
    """Hold the lock of workdir; gives the local directory to write to: workdir, or its copy if workdir is remote (see
    `remote`). Only process 0 prints to stdout. A start that fails before it writes leaves nothing.

    Raises: UserError if another process holds the lock, a name of a run is taken by something else, or the disk is
    full or cannot be written.
    """
    silent = contextlib.nullcontext() if parallel.is_main_process() else contextlib.redirect_stdout(None)
    if storage.is_remote(workdir):
        with silent, remote.writing(workdir) as copy:
            yield copy
        return
    with _removed_if_empty(workdir), WorkdirLock(workdir), silent:
        parallel.run_on_main_process(lambda: check_names(workdir))
        try:
            yield workdir
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(f"{error.filename or workdir}: {error.strerror}") from error


@contextlib.contextmanager
def _removed_if_empty(workdir: str) -> Iterator[None]:
    """After an error, removes the new directories of workdir and its new lock file, if nothing else is in them."""
    path = pathlib.Path(workdir).expanduser().absolute()
    new = [p for p in (path / ".lock", path / "checkpoints", path, *path.parents) if not os.path.lexists(p)]
    try:
        yield
    except BaseException:
        # The first directory that holds something ends this, and so does the lock of another run.
        with contextlib.suppress(OSError):
            for p in new if parallel.is_main_process() else ():
                if p.is_dir():
                    p.rmdir()
                elif p.name == ".lock":
                    remove_lock(p)
        raise


def check_names(workdir: str) -> None:
    """Raises: UserError if something that is not of a run has a name that a run writes in workdir."""
    found = []
    for name in (*DIRECTORIES, *FILES):
        path, real = (function(os.path.join(workdir, name)) for function in (os.path.abspath, os.path.realpath))
        if not os.path.lexists(path):
            continue
        if not os.path.exists(real):
            found.append(f"{path} is a link to {real}, which does not exist")
        elif os.path.isdir(real) != (name in DIRECTORIES):
            found.append(f"{path} is {'a file' if name in DIRECTORIES else 'a directory'}")
        elif name == "final" and os.path.ismount(real):
            found.append(f"{path} is a mount point; make it a link to a directory inside the mounted disk")
        elif name == "final" and os.listdir(real) and not is_run(real):
            found.append(f"{path} holds other files")
    if found:
        raise UserError(f"{listed(found)}: a run writes there; move it, or choose another --workdir")


def part_of(path: str) -> str:
    """The name under which a directory is written before `replace_directory`: beside it, or beside the target of a
    link."""
    real = os.path.realpath(path)
    return os.path.join(os.path.dirname(real), f".{os.path.basename(real)}")


def replace_directory(path: str) -> None:
    """Rename part_of(path) to `path`, in place of an earlier directory. If path is a link, it stays, and its target is
    replaced."""
    part, real = part_of(path), os.path.realpath(path)
    old = f"{part}.old"  # a killed process leaves no half-removed directory under the name of `path`
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(real):
        os.rename(real, old)
    os.rename(part, real)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def filled_directory(path: str) -> Iterator[str]:
    """A context that fills a directory, which is empty or does not exist; gives the name under which to write.

    The directory gets its own name when it is complete. After an error all is as before. After a kill a part is
    left, which the next call removes. A mounted disk, and a directory in one that cannot be written, are filled in
    place. A remote one is written when it is complete.
    """
    if storage.is_remote(path):
        with remote.filled(path) as part:
            yield part
        return
    part = part_of(path)
    if os.path.ismount(path) or os.path.isdir(path) and not os.access(os.path.dirname(part), os.W_OK):
        part = path
    else:
        shutil.rmtree(part, ignore_errors=True)
    with _removed_if_empty(part):
        try:
            yield part
            if part != path:
                replace_directory(path)
        except BaseException:
            for entry in pathlib.Path(part).iterdir() if os.path.isdir(part) else ():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise


# Reading.


def is_run(path: str | os.PathLike) -> bool:
    """Whether a path is the directory of a run."""
    if storage.is_remote(path):
        return remote.is_run(str(path))
    return os.path.isdir(os.path.join(path, "checkpoints"))


def read_run(workdir: str | os.PathLike) -> tuple[Config, Any]:
    """The Config and tokenizer of a run. Raises: UserError if workdir holds no run."""
    from nanoflax import tokenizers

    workdir = remote.local_copy(str(workdir))
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir} holds no run (no config.json); give the directory that pretrain wrote")
    return read_config(path), tokenizers.load(os.path.join(workdir, "tokenizer"))


def read_config(path: str | os.PathLike) -> Config:
    """The Config of a config.json. Raises: UserError if the file is missing or damaged."""
    directory, name = os.path.split(path)
    try:
        found = untrusted.json_object(untrusted.read_bytes(directory, name), path)
        config = configs.from_dict(configs.Config, found)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return with_old_labels(config, os.path.dirname(path))


def with_old_labels(config: Config, workdir: str) -> Config:
    """The Config of a run, with the names of its classes. Older runs have these in labels.json.

    Raises: UserError if the run has no names of its classes, or labels.json is damaged.
    """
    if not isinstance(config.task, LabelTask) or config.model.class_names:
        return config
    path = os.path.join(workdir, "labels.json")
    if not os.path.exists(path):
        raise UserError(
            f"{workdir}: config.json names no classes (model.class_names), and there is no labels.json of an older run"
        )
    found = untrusted.json_object(untrusted.read_bytes(workdir, "labels.json"), path)
    match found:
        case {"labels": list(labels), "several": bool(several)} if all(isinstance(label, str) for label in labels):
            names = {"class_names": tuple(labels), "multi_label": several}
        case _:
            raise UserError(f"{path} must hold labels, a list of texts, and several, true or false")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **names))


def model_directory(workdir: str, which: str = "best") -> str:
    """The directory that holds all parameters of a run's model: final/ once finetune has finished."""
    final = os.path.join(workdir, "final")
    return final if which == "best" and is_run(final) else workdir


# Writing.


def write_run(workdir: str, config: Config, tokenizer: Any) -> None:
    """Write tokenizer/ and config.json of a new run. config.json is last: it marks a complete run."""
    path = os.path.join(workdir, "tokenizer")
    shutil.rmtree(part_of(path), ignore_errors=True)
    tokenizer.save(part_of(path))
    new_run = not os.path.exists(os.path.join(workdir, "config.json"))
    if new_run and os.path.isdir(path) and os.listdir(path) and not _same_files(path, part_of(path)):
        kept = next(name for i in itertools.count(1) if not os.path.lexists(name := f"{path}-{i}"))
        os.rename(path, kept)
        print(f"{path} was there before the run; it is now {kept}")
    replace_directory(path)
    text = report.to_json(configs.to_dict(config), indent=1)
    report.write_atomically(pathlib.Path(workdir, "config.json"), text.encode())


def _same_files(a: str, b: str) -> bool:
    """Whether two directories without subdirectories hold the same files. A run that was killed here leaves such."""
    found = filecmp.dircmp(a, b)
    return not any([found.left_only, found.right_only, found.diff_files, found.funny_files, found.common_dirs])


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Write a JSON object per line. Raises: UserError if the file cannot be written."""
    if storage.is_remote(path):
        lines = (report.to_json(record, ensure_ascii=False) + "\n" for record in records)
        return storage.write_bytes(str(path), "".join(lines).encode())
    try:
        with open(path, "w", encoding="utf-8") as f:
            for record in records:
                f.write(report.to_json(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


# Checks before a run starts in a directory.

# Fields that may differ when a run resumes, because they do not change the losses.
FREE_FIELDS = {
    "data": ("workers", "cache"),
    "model": ("attention_backend",),
    "train": (
        "loss_chunks", "remat", "scan_layers", "max_skipped", "evaluate_every", "evaluate_batches", "patience",
        "checkpoint_every", "checkpoint_seconds", "keep", "sample_prompt", "sample_tokens", "mesh",
        "watchdog_seconds", "tensorboard", "wandb",
    ),
}  # fmt: skip


def check_workdir(workdir: str, config: Config, restart: bool | None = False) -> tuple[Config | None, str | None]:
    """(Config of the run in workdir or None, directory of the run with the weights for a new run or None).

    restart: start a new run from the weights of the run in workdir; the same command again resumes the
    new run. None if the program has no such option.
    Raises: UserError with the differences if the settings of the run in workdir would give other losses,
    or if there is no run to restart from.
    """
    from nanoflax.runs import checkpoint

    if restart and remote.is_copy(os.path.join(workdir, "config.json")):
        raise UserError(
            f"--restart_from_weights archives the old run by renaming it, which object storage cannot; give "
            f"--config.model.init_from={workdir} and another --workdir"
        )
    path, archived = os.path.join(workdir, "config.json"), archived_runs(workdir)
    if archived and not checkpoint.list_steps(os.path.join(workdir, "checkpoints")):
        if not restart:
            raise UserError(
                f"--workdir={workdir}: a new run from the weights of {archived[-1]} was started and has saved nothing "
                "yet; start it again with --restart_from_weights"
            )
        archive_run(workdir)  # finishes an interrupted move
        saved = read_config(os.path.join(archived[-1], "config.json"))
        return check_same_tokenizer(saved, config), archived[-1]
    if not os.path.exists(path):
        if restart:
            raise UserError(f"--restart_from_weights: --workdir={workdir} holds no run")
        return None, None
    saved = read_config(path)
    changed = changed_fields(saved, config)
    if changed and not restart:
        from_weights = (
            f"--config.model.init_from={workdir} and another --workdir" if restart is None else "--restart_from_weights"
        )
        raise UserError(
            f"--workdir={workdir} holds a run with another configuration ({'; '.join(changed)}); choose another "
            f"--workdir, or start a new run from its weights with {from_weights}"
        )
    if not restart or archived and not changed:  # a repeated restart command resumes the new run
        return saved, None
    return check_same_tokenizer(saved, config), workdir


def changed_fields(saved: Config, config: Config) -> list[str]:
    """The fields that differ and change the losses, as "name: old -> new"."""
    old, new = configs.to_dict(saved), configs.to_dict(config)
    new["model"] |= configs.to_dict(with_saved_vocabulary(config.model, saved))  # the padding may be for another mesh
    for section, names in FREE_FIELDS.items():
        for name in names:
            for fields in (old, new):
                fields[section].pop(name, None)
    return configs.diff(old, new)


def check_same_tokenizer(saved: Config, config: Config) -> Config:
    """Returns `saved`. Raises: UserError if `config` has another tokenizer."""
    old, new = saved.data.tokenizer, config.data.tokenizer
    if old != new:
        raise UserError(
            f"--config.data.tokenizer={new}: --restart_from_weights keeps the tokenizer of the weights, {old}"
        )
    return saved


def check_same_data(meta: dict, identity: dict) -> None:
    """Raises: UserError if the tokenizer, data or teacher in the `meta` of a checkpoint differ from `identity`."""
    for key, what in [
        ("tokenizer", "tokenizer/ of the workdir"),
        ("data", "text of data.train"),
        ("validation", "validation text"),
        ("teacher", "model of task.teacher"),
    ]:
        if meta.get(key) != identity.get(key):
            raise UserError(
                f"the {what} is not the one that the checkpoint was trained with (fingerprint {identity[key][:12]}, "
                f"not {meta[key][:12]}); restore it or choose another --workdir (pretrain also takes "
                "--restart_from_weights)"
            )


def check_same_base(meta: dict, base: str, init_from: str) -> None:
    """Raises: UserError if the parameters that a run does not train, and so does not save, have changed.

    meta: of a checkpoint; older ones have no fingerprint of the base. base: the fingerprint now.
    """
    if base != meta.get("base", base):
        raise UserError(
            f"model.init_from={init_from} has changed since this run began (fingerprint {base[:12]}, not "
            f"{str(meta['base'])[:12]}), and the run's checkpoints hold only what it trains; restore that model, or "
            "choose another --workdir"
        )


def archived_runs(workdir: str) -> list[str]:
    """The directories of the archived runs in workdir, the newest last."""
    found = glob.glob(os.path.join(glob.escape(workdir), "previous-*", "checkpoints"))
    return sorted(map(os.path.dirname, found), key=lambda path: int(path.rsplit("-", 1)[1]))


def archive_run(workdir: str) -> str:
    """Move the run in workdir into a new directory workdir/previous-N; returns that directory.

    checkpoints/ is moved first and config.json last. If only config.json is still in workdir, an earlier
    move was interrupted, and this call finishes it.
    """
    from nanoflax.runs import checkpoint

    archived = archived_runs(workdir)
    if not archived or checkpoint.list_steps(os.path.join(workdir, "checkpoints")):
        last = int(archived[-1].rsplit("-", 1)[1]) if archived else 0
        archived.append(os.path.join(workdir, f"previous-{last + 1}"))
        os.makedirs(archived[-1], exist_ok=True)
    if not os.path.exists(os.path.join(archived[-1], "config.json")):
        for name in "checkpoints tokenizer metrics.jsonl tensorboard loss.png wandb profile config.json".split():
            if os.path.exists(path := os.path.join(workdir, name)):
                os.rename(path, os.path.join(archived[-1], name))
    return archived[-1]
