"""Apache Beam writes the same bytes as the processes of this machine, on every engine and after kills."""

import json
import os
import pathlib
import random
import signal

import pytest

from nanoflax import data
from nanoflax.data import building, parts, processes
from nanoflax.data.beam import beam_engine
from nanoflax.data.quality import Quality
from nanoflax.errors import UserError
from nanoflax.tokenizers import trained

pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
PROCESSES = ("DirectRunner", "--direct_running_mode=multi_processing --direct_num_workers=2")


class KilledOnce(trained.ByteTokenizer):
    """Bytes. The first process that tokenizes a certain document is killed, once for each file in a directory."""

    def __init__(self, directory):
        super().__init__()
        self.directory = str(directory)

    def encode(self, text):
        if "fatal" in text:
            for path in pathlib.Path(self.directory).iterdir():
                path.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


class Refusing(trained.ByteTokenizer):
    def encode(self, text):
        raise UserError("this text has no tokens")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory, choose = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(6):
        texts = [" ".join(f"w{choose.randrange(300)}" for _ in range(40)) for _ in range(100)]
        texts[7] += " fatal" * (number == 4)
        texts[50] = texts[20]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / f"{number}.jsonl").write_text("".join(lines))
    return data.Source(f"text:{directory}/*.jsonl", quality=Quality(dedup="exact"))


def files_of(directory, source, engine, tokenizer=None):
    """{name: content} of the store that an engine builds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "plan", lambda source, split: parts.plan(source, split, part_bytes=10_000))
        store = building.build_store(directory, source, tokenizer or trained.ByteTokenizer(), "train", engine)
    assert store.n_documents > 500 and len(store.shards) > 5
    assert store.report == ["exact duplicates of earlier documents, left out: 6 (" + store.report[0].partition("(")[2]]
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    engine = lambda *given: processes.tokenize_parts(*given, workers=1)
    return files_of(tmp_path_factory.mktemp("expected") / "store", source, engine)


@pytest.mark.parametrize("runner,options", [("DirectRunner", ""), PROCESSES])
def test_beam_and_processes_write_the_same_bytes(tmp_path, source, expected, runner, options):
    assert files_of(tmp_path / "store", source, beam_engine(runner, options)) == expected


def test_a_cluster_whose_workers_are_killed_writes_the_same_bytes(tmp_path, source, expected):
    distributed = pytest.importorskip("distributed")
    (tmp_path / "kills").mkdir()
    for name in ("first", "second"):
        (tmp_path / "kills" / name).touch()
    options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**options, silence_logs=50) as cluster:
        engine = beam_engine("DaskRunner", f"--dask_client_address={cluster.scheduler_address}")
        found = files_of(tmp_path / "store", source, engine, KilledOnce(tmp_path / "kills"))
        distributed.default_client().close()  # Beam leaves it open
    assert not any((tmp_path / "kills").iterdir())
    assert found == expected


def test_an_error_of_a_worker_is_one_line(tmp_path, source, caplog):
    with pytest.raises(UserError, match="^this text has no tokens$"):
        files_of(tmp_path / "store", source, beam_engine("DirectRunner"), Refusing())
    assert "Traceback" not in caplog.text and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "runner,options,match",
    [
        ("FlunkRunner", "", "Beam's FlunkRunner cannot be used: Unexpected pipeline runner"),
        ("DirectRunner", "--direct_workers=2", "Beam's DirectRunner has no option direct_workers"),
        ("DirectRunner", "--job_name='a", "No closing quotation"),
        (
            "DirectRunner",
            "--direct_num_workers=two",
            "with options --direct_num_workers=two cannot be used: .*invalid int value: 'two'",
        ),
    ],
)
def test_unusable_runners_and_options_are_refused(runner, options, match):
    with pytest.raises(UserError, match=match):
        beam_engine(runner, options)
