"""A run's directory: failed starts leave nothing, what a user made is kept, and links stay links."""

import errno
import fcntl
import logging
import os
import pathlib
import threading

import pytest

import nanoflax
from nanoflax import report, tokenizers
from nanoflax.config import Config, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, directory, lock, orbax_io
from nanoflax.runs.lock import WorkdirLock


def contents(path):
    """{relative path: bytes of a file, target of a link, or None of a directory} of everything under a path."""

    def describe(p):
        return os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None

    return {str(p.relative_to(path)): describe(p) for p in pathlib.Path(path).rglob("*")}


STARTS = {
    "no text": lambda w: nanoflax.pretrain(Config(data=TextData(train="text:absent/*.txt")), w),
    "no examples": lambda w: nanoflax.finetune(data="jsonl:absent.jsonl", task="classify", workdir=w),
    "no model": lambda w: nanoflax.pretrain(Config(model=ModelConfig(init_from="./absent")), w),
    "a bad field": lambda w: nanoflax.pretrain(Config(model=ModelConfig(dim=-1)), w),
    "no kind of data": lambda w: nanoflax.finetune(data="absent:x", task="classify", workdir=w),
    "no devices": lambda w: nanoflax.pretrain(Config(train=TrainConfig(mesh="1,1,7")), w),
    "no tokenizer": lambda w: nanoflax.pretrain(Config(data=TextData(train=f"text:{__file__}", tokenizer="./no")), w),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_failed_start_leaves_nothing_behind(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for workdir in ("new", "new/deep/er"):
        with pytest.raises(UserError):
            start(workdir)
        assert contents(tmp_path) == {}, workdir
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError):
        start("old")
    assert contents(tmp_path) == before


def test_what_was_written_before_an_error_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), directory.exclusive(str(tmp_path / "a" / "b")):
        (tmp_path / "a" / "b" / "metrics.jsonl").write_text("{}")
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "b" / "metrics.jsonl").exists()
    # The second start of a run that is under way changes nothing.
    with directory.exclusive(str(tmp_path / "c")):
        before = contents(tmp_path)
        with pytest.raises(UserError, match="is in use by process"), directory.exclusive(str(tmp_path / "c")):
            pass
        assert contents(tmp_path) == before


def test_a_refused_start_of_the_same_instant_leaves_the_lock_and_the_directories_of_the_other(tmp_path, monkeypatch):
    workdir, first = tmp_path / "w", []

    def second(path):  # its directory was absent when this start looked; now the other run has it
        first.append(WorkdirLock(path))
        (workdir / "checkpoints").mkdir()
        return WorkdirLock(path)

    monkeypatch.setattr(directory, "WorkdirLock", second)
    with pytest.raises(UserError, match="is in use by process"), directory.exclusive(str(workdir)):
        pass
    assert sorted(os.listdir(workdir)) == [".lock", "checkpoints"]
    with pytest.raises(UserError, match="is in use by process"):
        WorkdirLock(workdir)
    first[0].release()


def test_a_sweep_waits_for_a_trial_that_still_runs_and_two_sweeps_exclude_each_other(tmp_path):
    trial, said = WorkdirLock(tmp_path), []
    with pytest.raises(UserError, match="is in use by process"), lock.locked(tmp_path):
        pass
    threading.Timer(0.2, trial.release).start()
    lock.wait_until_free(tmp_path, said.append)
    assert len(said) == 1 and f"waiting for process {os.getpid()}" in said[0]
    lock.wait_until_free(tmp_path / "absent", said.append)
    with lock.locked(tmp_path), pytest.raises(UserError, match="is in use by process"):
        WorkdirLock(tmp_path)
    assert len(said) == 1


def test_a_lock_file_that_another_run_removed_is_no_lock(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def slow(file, operation):  # between opening and locking, the run that held the lock fails and removes the file
        if not removed:
            removed.append(os.unlink(tmp_path / ".lock"))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with WorkdirLock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        WorkdirLock(tmp_path)


@pytest.mark.parametrize("name", [*directory.DIRECTORIES, *directory.FILES])
def test_other_things_under_the_names_of_a_run_are_refused_and_kept(name, tmp_path):
    workdir, elsewhere = tmp_path / "w", tmp_path / "elsewhere"
    workdir.mkdir()

    def refused(words):
        before = contents(tmp_path)
        with pytest.raises(UserError) as error, directory.exclusive(str(workdir)):
            pass
        assert name in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
        assert contents(tmp_path) == before
        path.rename(tmp_path / f"seen {words[:9]}")

    path = workdir / name
    path.symlink_to(elsewhere)
    refused("which does not exist")
    if name in directory.DIRECTORIES:
        path.write_text("mine")
        refused("is a file")
    else:
        path.mkdir()
        refused("is a directory")
    if name == "final":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
        refused("holds other files")
        # The target of a link is as good as a directory.
        elsewhere.mkdir()
        path.symlink_to(elsewhere)
        with directory.exclusive(str(workdir)):
            pass


@pytest.mark.parametrize("linked", [False, True])
def test_a_directory_is_replaced_whole_and_a_link_stays(linked, tmp_path):
    disk, path = tmp_path / "disk" / "final", tmp_path / "w" / "final"
    path.parent.mkdir()
    disk.mkdir(parents=True)
    if linked:
        path.symlink_to(disk)
    for text in ("first", "second"):
        os.makedirs(part := directory.part_of(str(path)))
        pathlib.Path(part, text).write_text(text)
        directory.replace_directory(str(path))
        assert os.listdir(path) == [text] and path.is_symlink() == linked
    assert os.listdir(path.parent) == ["final"] and os.listdir(disk.parent) == ["final"]


def test_a_tokenizer_that_a_user_made_is_kept(tmp_path, capsys):
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "tokenizer.json").write_text("mine")
    for _ in range(2):  # the second call replaces the tokenizer of the run
        directory.write_run(str(tmp_path), Config(), tokenizers.load("bytes"))
    assert (tmp_path / "tokenizer-1" / "tokenizer.json").read_text() == "mine"
    assert "it is now" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["config.json", "tokenizer", "tokenizer-1"]


def test_the_tokenizer_of_a_run_that_was_killed_before_its_config_is_no_other(tmp_path):
    for _ in range(2):
        directory.write_run(str(tmp_path), Config(), tokenizers.load("bytes"))
        (tmp_path / "config.json").unlink()
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_files_are_written_through_links_and_leave_no_part(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    path = tmp_path / "config.json"
    path.symlink_to(tmp_path / "disk" / "config.json")
    report.write_atomically(path, b"new")
    assert path.is_symlink() and (tmp_path / "disk" / "config.json").read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError):
        report.write_atomically(path, b"newer")
    assert os.listdir(tmp_path / "disk") == ["config.json"] and path.read_bytes() == b"new"


def test_the_other_errors_of_a_failed_save_are_not_logged(caplog):
    logger = logging.getLogger("asyncio")
    orbax_io._until_exit.close()  # after a save that failed in another test
    with orbax_io.quiet_orbax():
        logger.error("Task exception was never retrieved")
        logger.error("another")
    logger.error("Task exception was never retrieved")
    assert [record.getMessage() for record in caplog.records] == ["another", "Task exception was never retrieved"]


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_one_line_that_names_a_path(named, tmp_path):
    with pytest.raises(UserError) as error, directory.exclusive(str(tmp_path)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *[f"{tmp_path}/x"] * named)
    assert str(error.value) == f"{tmp_path}{'/x' * named}: No space left on device"
    with pytest.raises(ZeroDivisionError), directory.exclusive(str(tmp_path)):
        raise ZeroDivisionError


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A line of some words.\n\n" * 200)
    config = Config(
        model=ModelConfig(dim=16, layers=1, heads=2, context=16),
        data=TextData(train=f"text:{text}", tokenizer="bytes", cache=str(tmp_path / "cache"), workers=1),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(
            steps=2, batch_size=2, evaluate_every=2, checkpoint_every=1, evaluate_batches=1, sample_tokens=0,
            tensorboard=False,
        ),
    )  # fmt: skip
    workdir = tmp_path / "run"
    nanoflax.pretrain(config, str(workdir))
    for step in checkpoint.list_steps(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / "manifest.json").write_text("{")
    kept = contents(workdir)
    for _ in range(3):
        with pytest.raises(UserError, match="every checkpoint is damaged: .*move the directory away to begin again"):
            nanoflax.pretrain(config, str(workdir))
        now = contents(workdir)
        assert sorted(now.values(), key=repr) == sorted(kept.values(), key=repr), "only names of directories changed"
    (workdir / "checkpoints").rename(tmp_path / "away")
    assert nanoflax.pretrain(config, str(workdir)).reason == "finished"


def test_a_directory_that_could_not_be_filled_is_as_before(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        for error in (OSError, KeyboardInterrupt):
            with pytest.raises(error), directory.filled_directory(str(tmp_path / name)) as part:
                os.makedirs(pathlib.Path(part, "half"))
                pathlib.Path(part, "half", "file").write_text("x")
                pathlib.Path(part, "file").write_text("x")
                raise error
            assert contents(tmp_path) == {"empty": None}


@pytest.mark.parametrize("name", ["empty", "new/deep"])
def test_a_killed_filling_is_not_seen_and_does_not_stop_the_next(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    path = tmp_path / name
    for text in ("killed", "second"):
        filling = directory.filled_directory(str(path))
        os.makedirs(part := filling.__enter__(), exist_ok=True)
        pathlib.Path(part, text).write_text(text)
        assert not path.exists() or not os.listdir(path)
    filling.__exit__(None, None, None)
    assert os.listdir(path) == ["second"] and os.listdir(path.parent) == [path.name]
    # A directory that cannot be renamed is filled in place.
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with directory.filled_directory(str(tmp_path / "disk")) as part:
        assert part == str(tmp_path / "disk")
