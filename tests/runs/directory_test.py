"""A run's directory: failed starts leave nothing, what a user made is kept, and links stay links."""

import errno
import logging
import os
import pathlib

import pytest

import nanoflax
from nanoflax import report, tokenizers
from nanoflax.config import Config, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, directory


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
    with checkpoint.quiet_orbax():
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
            with pytest.raises(error), directory.emptied_on_error(str(tmp_path / name)):
                os.makedirs(tmp_path / name / "half")
                (tmp_path / name / "half" / "file").write_text("x")
                (tmp_path / name / "file").write_text("x")
                raise error
            assert contents(tmp_path) == {"empty": None}
