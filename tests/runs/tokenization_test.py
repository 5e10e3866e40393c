"""experiments.tokenize and data.train=tokens:DIRECTORY: the run is the same as on the text."""

import dataclasses
import json
import shutil

import pytest

import nanoflax
from nanoflax import config as configs
from nanoflax import data, runs, storage, tokenizers
from nanoflax.errors import UserError
from tests import processes
from tests.storage.servers import bucket


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    records = [{"text": f"{i} a house and a tree " * (3 + i % 5)} for i in range(130)]
    (directory / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return configs.Config(
        model=configs.ModelConfig(layers=1, dim=16, heads=1, context=32),
        data=configs.TextData(train=f"text:{directory}/a.jsonl", tokenizer="bpe:300", cache=f"{directory}/cache"),
        train=configs.TrainConfig(steps=2, batch_size=4, evaluate_every=2, sample_tokens=0, tensorboard=False),
    )


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """(a directory of `tokenize`, its stores)."""
    directory = tmp_path_factory.mktemp("made") / "tokens"
    return directory, runs.tokenize(config, str(directory))


def with_data(config, **settings):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))


def test_a_run_on_tokens_is_the_run_on_their_text(config, made, tmp_path, capsys):
    directory, stores = made
    on_tokens = with_data(config, train=f"tokens:{directory}")
    inspected = [runs.inspect_data(c).batches for c in (config, on_tokens)]
    assert f"tokenizer: that of tokens:{directory}, not a new one of data.tokenizer=bpe:300" in capsys.readouterr().out
    for step in (0, 1, 7):
        one, other = (batches[step] for batches in inspected)
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    run = nanoflax.pretrain(on_tokens, str(tmp_path / "run"))
    assert run.tokenizer.fingerprint == stores["train"].meta["tokenizer"]
    expected = run.evaluate(config.data.train, split="validation")
    assert {**expected, "data": ""} == {**run.evaluate(f"tokens:{directory}/validation"), "data": ""}


def test_the_same_call_again_changes_nothing_and_another_is_refused(config, made):
    directory, stores = made
    before = {path: path.stat().st_ino for path in directory.rglob("*.*") if path.suffix != ".lock"}
    assert runs.tokenize(config, str(directory))["train"].fingerprint == stores["train"].fingerprint
    assert before == {path: path.stat().st_ino for path in before}
    for settings, match in (
        ({"tokenizer": "bytes"}, r"another tokenizer \(tokenizer: 'bpe:300' -> 'bytes'\)"),
        ({"min_chars": 5}, r"another source \(source.quality.min_chars: 0 -> 5\)"),
        ({"train": "a=pydocs; b=pydocs"}, "one source of text"),
        ({"train": f"tokens:{directory}"}, "one source of text"),
    ):
        with pytest.raises(UserError, match=match):
            runs.tokenize(with_data(config, **settings), str(directory))


def test_settings_can_be_corrected_until_something_is_built(config, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="field 'body'"):
        runs.tokenize(with_data(config, field="body", tokenizer="bytes"), out)
    assert runs.tokenize(config, out)["train"].n_documents > 100
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out=.* cannot be written"):
        runs.tokenize(config, str(tmp_path / "file" / "out"))


def test_a_tokenizer_of_the_user_is_not_replaced(config, made, tmp_path):
    own = tmp_path / "out" / "tokenizer"
    own.mkdir(parents=True)
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is not of this tokenizer: move it"):
        runs.tokenize(config, str(tmp_path / "out"))
    assert (own / "tokenizer.json").read_text() == "{}"
    shutil.copy(made[0] / "tokenizer" / "tokenizer.json", own)  # that of this command, which was killed
    assert runs.tokenize(config, str(tmp_path / "out"))["train"].fingerprint == made[1]["train"].fingerprint


def test_tokens_that_do_not_fit_are_refused(config, made, tmp_path):
    directory, _ = made
    own = tokenizers.load(directory / "tokenizer")
    name = f"tokens:{directory}"
    for source, tokenizer, split, match in (
        (
            data.Source(name),
            tokenizers.ByteTokenizer(),
            "train",
            "made with another tokenizer.*its own is .*/tokenizer",
        ),
        (data.Source(f"{name}/none"), own, "train", "no complete token store"),
        (data.Source(f"{name}/train"), own, "validation", "name another source in data.validation"),
        (data.Source(name), own, "all", f"name one of them, as in {name}/validation"),
        (data.source_of(with_data(config, train=name, dedup="exact").data), own, "train", "data.dedup is for text"),
        (data.Source(name, field="body"), own, "train", "data.field is for text"),
    ):
        with pytest.raises(UserError, match=match) as error:
            data.prepare(source, tokenizer, split, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="holds tokens, but text is needed"):
        next(data.documents(name))
    both = data.Source(f"{name}/train", validation=f"{name}/validation")
    assert data.prepare(both, own, "validation", tmp_path).fingerprint == made[1]["validation"].fingerprint
    copied = shutil.copytree(directory, tmp_path / "copied")
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(UserError, match="there is no .*tokenizer"):
        nanoflax.pretrain(with_data(config, train=f"tokens:{copied}"), str(tmp_path / "run"))


def test_the_program_makes_and_checks_stores_in_a_bucket(config, made):
    settings = [f"--data={config.data.train}", "--tokenizer=bpe:300", "--workers=1"]
    with bucket("gs") as (root, _, faults):
        out, run = f"{root}/tokens", lambda *args: processes.run(["-m", "experiments.tokenize", *args])
        faults.rate = 0.05
        result = run(*settings, f"--out={out}")
        assert result.returncode == 0, result.stderr
        assert "train: 1" in result.stdout and "peak memory" in result.stdout
        faults.rate = 0.0
        for name in ("settings.json", "train/", "validation/"):  # a process was killed after it wrote the tokenizer
            (storage.delete_all if name.endswith("/") else storage.delete)(f"{out}/{name}".rstrip("/"))
        runs.tokenize(with_data(config, workers=1), out)
        store = data.prepare(data.Source(f"tokens:{out}"), data.made_tokenizer(f"tokens:{out}"), "train")
        assert store.fingerprint == made[1]["train"].fingerprint
        assert runs.check_stores(out).keys() == {"train", "validation"}
        shard = "part-00000-000.bin"
        content = bytearray(store.folder.read(shard))
        content[100] ^= 1
        store.folder.write(shard, bytes(content))
        result = run(f"--out={out}", "--check")
        assert result.returncode == 2 and f"damaged: {out}/train/{shard}" in result.stderr
        with pytest.raises(UserError, match="damaged"):
            runs.check_stores(out)
        runs.tokenize(with_data(config, workers=1), out, check=True)
        runs.check_stores(out)
