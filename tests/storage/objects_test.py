"""Objects of gs:// and s3://, on servers of this machine."""

import concurrent.futures
import io
import os

import pytest

from nanoflax import storage
from nanoflax.data.folders import Folder
from nanoflax.errors import UserError
from nanoflax.runs.lock import make_writable
from tests.storage.servers import bucket


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    with bucket(request.param) as found:
        yield found


def test_objects(place, tmp_path):
    root = storage.join(place[0], "objects")
    name = storage.join(root, "a", "b.bin")
    assert not storage.exists(name)
    assert storage.list_names(root) == [] and storage.list_sizes(root) == {}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(name)
    with pytest.raises(FileNotFoundError):
        storage.size(name)
    content = os.urandom(100_000)
    storage.write_bytes(name, content)
    storage.write_bytes(storage.join(root, "c.txt"), b"")
    assert storage.read_bytes(name) == content and storage.size(name) == len(content)
    assert storage.read_range(name, 70_000, 70_010) == content[70_000:70_010]
    assert storage.read_range(name, 99_990, 200_000) == content[99_990:]
    assert storage.list_names(root) == ["a", "c.txt"]
    assert storage.list_sizes(root) == {"a/b.bin": 100_000, "c.txt": 0}
    assert storage.is_directory(root) and not storage.is_directory(name) and storage.exists(name)
    storage.download(name, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    storage.upload(tmp_path / "b", storage.join(root, "d"))
    assert storage.read_bytes(storage.join(root, "d")) == content
    with storage.open_reader(name) as file, io.BytesIO(content) as expected:
        for position, length in [(0, 10), (99_000, 5_000), (5, 80_000)]:
            file.seek(position), expected.seek(position)
            assert file.read(length) == expected.read(length)
    storage.delete(name)
    storage.delete(name)
    storage.delete_all(root)
    assert storage.list_sizes(root) == {}


@pytest.mark.parametrize("content", [b"\r", b"a\r", b"a\r\n", b"\n\n", b"\r\n\r\n", b"--==0==--", b"\n--==0=="])
def test_no_byte_is_lost_at_an_edge(place, tmp_path, content):
    name = storage.join(place[0], "edge")
    storage.write_bytes(name, content)
    assert storage.read_bytes(name) == content
    (tmp_path / "a").write_bytes(content)
    storage.upload(tmp_path / "a", name)
    assert storage.read_bytes(name) == content and storage.size(name) == len(content)


def test_one_of_many_creates_an_object(place):
    name = storage.join(place[0], "once")

    def create(i):
        try:
            storage.write_bytes(name, str(i).encode(), only_if_absent=True)
            return i
        except FileExistsError:
            return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        (winner,) = [i for i in pool.map(create, range(8)) if i is not None]
    assert storage.read_bytes(name) == str(winner).encode()


def test_failing_requests_lose_nothing(place):
    root, faults = storage.join(place[0], "failing"), place[2]
    faults.rate, faults.failed = 0.2, 0
    try:
        for i in range(15):
            storage.write_bytes(storage.join(root, str(i)), str(i).encode(), only_if_absent=i % 2 == 0)
        assert storage.list_sizes(root) == {str(i): len(str(i)) for i in sorted(range(15), key=str)}
        assert all(storage.read_bytes(storage.join(root, str(i))) == str(i).encode() for i in range(15))
    finally:
        faults.rate = 0.0
    assert faults.failed > 3


def test_what_lasts_is_one_line(place, monkeypatch):
    scheme = place[0].partition(":")[0]
    with pytest.raises(UserError, match="no-such-bucket/a: there is no bucket no-such-bucket"):
        storage.write_bytes(f"{scheme}://no-such-bucket/a", b"x")
    monkeypatch.setenv("NANOFLAX_STORAGE_SECONDS", "1")
    place[2].rate = 1.0
    try:
        with pytest.raises(UserError, match="no answer of the storage for 1 s"):
            storage.read_bytes(f"{place[0]}/a")
    finally:
        place[2].rate = 0.0


def test_names():
    assert storage.is_remote("gs://b/c") and storage.is_remote("s3://b")
    assert not any(map(storage.is_remote, ["gs:/b", "a/gs://b", "http://a/b", "text:gs://b", "C:\\a"]))
    assert storage.join("gs://b/", "c", "d") == "gs://b/c/d" and storage.join("a", "b") == os.path.join("a", "b")
    for wrong in ("gs://", "s3:///a", "http://a"):
        with pytest.raises(UserError):
            storage.filesystem(wrong)


@pytest.mark.parametrize("name", ["s3:/b/a", "GS://b/a", "gs:", "s3:b/a", "hdfs://b/a", "http://b/a"])
def test_a_mistaken_name_makes_no_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (make_writable, Folder, storage.check_name):
        with pytest.raises(UserError, match="is not a local path"):
            make(name)
    assert not list(tmp_path.iterdir())
    for name in ("a/b", "a:b/c", "C:/a", "gs", "~/gs:/a", "gs://b/a"):
        storage.check_name(name)
