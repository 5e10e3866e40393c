"""Files of strangers: sizes, JSON and links are checked where they are read, in every room."""

import json
import os
import pathlib

import pytest

from nanoflax import tokenizers, untrusted
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, manifest
from nanoflax.runs import directory as runs


@pytest.mark.parametrize(
    "text,said",
    [
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "more than 64 levels"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "more than 64 levels"),
        (b"[" * 10_000_000, "is not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": [{"b": "x\\ud800y"}]}', "unpaired surrogate"),
        (b'{"\\uDC00": 1}', "unpaired surrogate"),
        (b"[1]", "must hold an object, not list"),
        (b"NaN", "must hold an object, not float"),
    ],
)
def test_json_of_strangers(text, said):
    with pytest.raises(UserError, match=f"file.json.* {said}") as error:
        untrusted.json_object(text, "file.json")
    assert len(str(error.value)) < 300


def test_json_that_is_right():
    for value in ({"a": "\U0001f600 \\ud800", "b": [[{}]] * 3, "c": 1e308}, {}):
        assert untrusted.json_object(json.dumps(value).encode(), "x") == value
        assert untrusted.json_object(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode(), "x") == value
    assert untrusted.json_object(b'{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(UserError, match="'a' is there twice"):
        untrusted.json_object(b'{"b": {"a": 1, "a": 2}}', "x", repeats=False)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(10**12)  # a hole: takes no disk
    with pytest.raises(UserError, match="its 1000000000000 bytes are more than 500000000"):
        untrusted.read_bytes(tmp_path, "a.json")
    os.mkfifo(tmp_path / "b.json")  # opening it would wait for ever
    with pytest.raises(UserError, match="not a file"):
        untrusted.read_bytes(tmp_path, "b.json")


def linked(directory, name):
    """Moves a file out of its directory and links to it."""
    outside = directory.parent / f"outside-{directory.name}-{name}"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)


def test_tokenizers_follow_no_links_but_those_of_the_hub_cache(tmp_path):
    for name, tokenizer in (("ours", tokenizers.ByteTokenizer()), ("theirs", None)):
        directory = tmp_path / name
        tokenizer = tokenizer or tokenizers.to_huggingface(tokenizers.ByteTokenizer())
        tokenizer.save(directory)
        hub, blobs = tmp_path / f"{name}-hub" / "snapshots" / "0a", tmp_path / f"{name}-hub" / "blobs"
        hub.mkdir(parents=True)
        blobs.mkdir()
        for file in directory.iterdir():
            (blobs / file.name).write_bytes(file.read_bytes())
            (hub / file.name).symlink_to(f"../../blobs/{file.name}")
        assert tokenizers.load(hub).encode("ab") == tokenizers.load(directory).encode("ab")
        for file in sorted(path.name for path in directory.iterdir()):
            linked(directory, file)
            with pytest.raises(UserError, match=f"{file} is a link out of its directory"):
                tokenizers.load(directory)
            (directory / file).unlink()
            (directory.parent / f"outside-{name}-{file}").rename(directory / file)


def test_a_run_follows_no_links(tmp_path):
    from nanoflax.config import Config

    runs.write_run(str(tmp_path / "run"), Config(), tokenizers.ByteTokenizer())
    linked(tmp_path / "run", "config.json")
    with pytest.raises(UserError, match="config.json is a link"):
        runs.read_run(tmp_path / "run")


@pytest.fixture
def step(tmp_path):
    """The directory of one step of a checkpoint."""
    path = tmp_path / "checkpoints" / "1"
    (path / "state").mkdir(parents=True)
    (path / "state" / "a").write_bytes(b"123")
    (path / "meta").mkdir()
    (path / "meta" / "metadata").write_text("{}")
    manifest.write(path, 1, 1.5)
    assert manifest.find_damage(path) is None
    return path


@pytest.mark.parametrize("name", ["state/a", "state", "meta/metadata", "manifest.json"])
def test_links_in_a_checkpoint_are_damage(step, name):
    outside = step.parent / "outside"
    (step / name).rename(outside)
    (step / name).symlink_to(outside)
    assert f"{pathlib.Path(name).name} is a link" in manifest.find_damage(step)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.read_metadata(step.parent, log=lambda line: None)


@pytest.mark.parametrize(
    "body",
    [
        {"files": {"../../secret": [3, 0]}},
        {"files": {"/etc/hostname": [3, 0]}},
        {"files": {"state/../../x": [3, 0]}},
        {"files": {"state/a": [3]}},
        {"files": {"state/a": "xy"}},
        {"files": {"state/a": [True, None]}},
        {"files": []},
        {"files": {}, "metric": "nan"},
        {"files": {}, "metric": [1]},
        {},
    ],
)
def test_a_manifest_that_lies_is_damage(step, body):
    # Its own checksum is right, so only what it says can be wrong.
    manifest._write_body(step / manifest.NAME, {"metric": 1.0} | body)
    assert manifest.find_damage(step) == "manifest.json is missing or damaged"
    assert manifest.read_metric(step) is None


def test_a_state_that_orbax_cannot_read_is_one_line(step):
    for name, content in (("_METADATA", b"{"), ("_METADATA", b'{"tree_metadata": 1}'), ("manifest.ocdbt", b"x")):
        (step / "state" / name).write_bytes(content)
        (step / manifest.NAME).unlink()
        manifest.write(step, 1, 1.0)
        with pytest.raises(UserError, match="step 1 cannot be restored"):
            checkpoint.restore_params(step.parent)


def test_a_message_is_one_line_whatever_it_quotes():
    error = UserError("x='\x1b[2J\n\u202e\ud800' é日 \t" + "y" * 10**6)
    assert str(error).startswith("x='\\x1b[2J\\n\\u202e\\ud800' é日 \\ty") and len(str(error)) < 6000
