"""Sources in buckets on this machine: the same documents, parts and refusals as from a disk."""

import pytest

from nanoflax import data, storage
from nanoflax.data import parts
from nanoflax.errors import UserError
from tests.data.formats_test import TEXTS, WRITERS
from tests.storage.servers import bucket

NAMES = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.csv", "x.parquet")


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request, tmp_path_factory):
    """(the name of a folder in a bucket with files of all formats, its server's faults)."""
    directory = tmp_path_factory.mktemp("files")
    with bucket(request.param) as (root, *rest):
        for name in NAMES:
            WRITERS[name](directory / name)
            storage.upload(directory / name, storage.join(root, "texts", name))
        storage.write_bytes(storage.join(root, "texts", "a", "b.txt"), b"whole")
        storage.write_bytes(storage.join(root, "texts", "a.array_record"), b"x")
        yield storage.join(root, "texts"), rest


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_read_from_a_bucket(place, name):
    assert list(data.documents(f"text:{place[0]}/{name}", "all")) == TEXTS


def test_ranges_and_patterns(place):
    for name in ("x.jsonl", "x.parquet"):
        plan = parts.plan(f"text:{place[0]}/{name}", "all", 1000)
        assert len(plan.parts) > 4
        assert [text for i in range(len(plan.parts)) for text in parts.read(plan, i, data.DataReport())] == TEXTS
    assert list(data.documents(f"text:{place[0]}/**/*.txt", "all")) == ["whole"]
    assert list(data.documents(f"text:{place[0]}/x.json*", "all")) == TEXTS * 3


def test_requests_that_fail_lose_nothing(place):
    faults = place[1][-1]
    faults.rate, faults.failed = 0.1, 0
    try:
        for _ in range(2):
            for name in NAMES:
                assert list(data.documents(f"text:{place[0]}/{name}", "all")) == TEXTS
    finally:
        faults.rate = 0
    assert faults.failed


def test_a_new_object_is_a_new_version(place):
    name = storage.join(place[0], "new.txt")
    versions = []
    for content in (b"one", b"two", b"three"):
        storage.write_bytes(name, content)
        versions.append(data.source_version(data.Source(f"text:{name}")))
    assert versions[0] != versions[1] != versions[2]
    assert versions[2] == data.source_version(data.Source(f"text:{name}"))


@pytest.mark.parametrize(
    "name, words", [("none.txt", "no file"), ("a.array_record", "local disks only"), ("*.rst", "no file")]
)
def test_what_cannot_be_read_from_a_bucket_is_one_line(place, name, words):
    with pytest.raises(UserError, match=words) as error:
        list(data.documents(f"text:{place[0]}/{name}", "all"))
    assert "\n" not in str(error.value)
