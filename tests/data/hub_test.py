"""Data sets of the hub: its cache on disk, folders with its layout, and a small server that speaks its protocol."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoflax import data
from nanoflax.data import hub, parts
from nanoflax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = {split: [f"{split} {i}\n" for i in range(n)] for split, n in (("train", 40), ("test", 3), ("fr", 2))}
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: french
  data_files: fr/*.parquet
---
"""


def write_repository(directory):
    """A data set as `datasets` pushes it: shards of Parquet, two configs, a card."""
    for name in ("data", "fr"):
        (directory / name).mkdir(parents=True)
    (directory / "README.md").write_text(CARD)
    for split, shard, texts in (
        ("train", "00000-of-00002", TEXTS["train"][:25]),
        ("train", "00001-of-00002", TEXTS["train"][25:]),
        ("test", "00000-of-00001", TEXTS["test"]),
    ):
        pq.write_table(pa.table({"text": texts}), directory / f"data/{split}-{shard}.parquet", row_group_size=10)
    pq.write_table(pa.table({"text": TEXTS["fr"]}), directory / "fr/a.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("folder") / "corpus"
    write_repository(directory)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The hub's cache: files are links to blobs."""
    root = tmp_path_factory.mktemp("cache")
    repository = root / "datasets--owner--corpus"
    write_repository(snapshot := repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(i), path.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield root


@pytest.mark.parametrize(
    "rest, split, key",
    [
        ("", "train", "train"),
        ("", "validation", "test"),
        (":default:test", "all", "test"),
        (":test", "all", "test"),
        (":french", "all", "fr"),
        (":french:train", "all", "fr"),
    ],
)
def test_splits_and_configs(folder, cache, tmp_path, rest, split, key):
    for name in (f"hub:{folder}", "hub:owner/corpus"):
        assert list(data.documents(name + rest, split)) == TEXTS[key]
    words = [word for word in rest.split(":") if word]
    config = words[0] if words and words[0] != "test" else None
    oracle = datasets.load_dataset(str(folder), config, split="train" if key == "fr" else key, cache_dir=tmp_path)
    assert list(oracle["text"]) == TEXTS[key]


def test_all_splits_and_versions(folder, cache):
    assert list(data.documents(f"hub:{folder}", "all")) == TEXTS["train"] + TEXTS["test"]
    (files,) = data.source_version(data.Source("hub:owner/corpus"))
    assert files[0] == [COMMIT, "data/train-00000-of-00002.parquet"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("hub:owner/none", "its cache has no such data set; on a machine with a network: hf download owner/none"),
        ("hub:owner/corpus:english", "'english' is not known; it has the splits train, test, and the configs .*french"),
        ("hub:owner/corpus:english:train", "'english' not found"),
        ("hub:owner/corpus:french:test", "'test' is not known"),
        ("hub:owner/a/b", "write hub:OWNER/NAME"),
        ("hub:", "choose pydocs"),
    ],
)
def test_what_is_not_there_is_one_line(cache, name, words):
    with pytest.raises(UserError, match=words) as error:
        list(data.documents(name))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_card(tmp_path):
    """Names decide the splits. Quoted cells with line ends and compressed lines are read as `datasets` reads them."""
    for name, suffix, writer in (("a", "csv", "to_csv"), ("b", "jsonl.gz", "to_json")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            path, options = tmp_path / name / f"{split}.{suffix}", {} if name == "a" else {"compression": "gzip"}
            getattr(datasets.Dataset.from_dict({"text": TEXTS[split]}), writer)(path, **options)
        for split, key in (("train", "train"), ("validation", "test")):
            assert list(data.documents(f"hub:{tmp_path}/{name}", split)) == TEXTS[key]
        oracle = datasets.load_dataset(str(tmp_path / name), split="test", cache_dir=tmp_path / "cache")
        assert list(oracle["text"]) == TEXTS["test"]


def test_a_missing_file_a_setting_and_another_format_are_named(tmp_path):
    write_repository(tmp_path / "a")
    (tmp_path / "a/data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files are not here, such as train-00000-of-00002.parquet"):
        list(data.documents(f"hub:{tmp_path}/a"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/x.csv").write_text("id;text\n1;x\n")
    (tmp_path / "c/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: x.csv\n  sep: ;\n---\n")
    with pytest.raises(UserError, match="its card sets sep=';', which is not supported"):
        list(data.documents(f"hub:{tmp_path}/c"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/train.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match="train.arrow, which is not .txt"):
        list(data.documents(f"hub:{tmp_path}/b"))


def write_card(directory, path):
    (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n")


@pytest.mark.parametrize("kind", ["absolute", "..", "link"])
def test_a_card_that_names_files_of_others(tmp_path, kind):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("a secret\n")
    (folder / "linked.txt").symlink_to(tmp_path / "secret.txt")
    write_card(folder, {"absolute": tmp_path / "secret.txt", "..": "../secret.txt", "link": "linked.txt"}[kind])
    with pytest.raises(UserError, match="its card names .*, which is outside the data set"):
        list(data.documents(f"hub:{folder}"))
    (folder / "own.txt").write_text("its own\n")
    write_card(folder, "own.txt")
    assert list(data.documents(f"hub:{folder}")) == ["its own"]


@pytest.mark.parametrize(
    "where, name, is_own",
    [
        ("owner/corpus", f"hf://datasets/owner/corpus@{COMMIT}/a.csv", True),
        ("owner/corpus", "hf://datasets/Owner/Corpus@refs%2Fconvert%2Fparquet/a/b.parquet", True),
        ("squad", f"hf://datasets/rajpurkar/squad@{COMMIT}/a.csv", True),
        ("owner/corpus", f"hf://datasets/owner/private@{COMMIT}/a.csv", False),
        ("owner/corpus", f"hf://datasets/owner/corpus2@{COMMIT}/a.csv", False),
        ("owner/corpus", f"hf://datasets/owner/corpus@{COMMIT}/../../private/a.csv", False),
        ("owner/corpus", "https://example.org/a.csv", False),
        ("owner/corpus", "/etc/hostname", False),
    ],
)
def test_files_of_a_data_set_of_the_hub(where, name, is_own):
    if is_own:
        return hub._check_inside(f"hub:{where}", where, [name])
    with pytest.raises(UserError, match="which is outside the data set"):
        hub._check_inside(f"hub:{where}", where, [name])


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of huggingface_hub that list a data set and read ranges of its files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(True)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass

    def answer(self, body):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append((path, self.headers.get("Range")))
        status, content, headers = self.found(path)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def found(self, path):
        root, api = self.server.root, "/api/datasets/owner/corpus"
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        file = path.removeprefix(f"/datasets/owner/corpus/resolve/{COMMIT}/").removeprefix(
            "/datasets/owner/corpus/resolve/main/"
        )
        as_json = {"Content-Type": "application/json"}
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            info = {"id": "owner/corpus", "sha": COMMIT, "tags": [], "siblings": [{"rfilename": n} for n in names]}
            return 200, json.dumps(info).encode(), as_json
        if path.startswith(f"{api}/tree/{COMMIT}"):
            below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            entries = {}
            for name in names:
                if (name + "/").startswith(f"{below}/" if below else "") and name != below:
                    head, *more = name.removeprefix(below).strip("/").split("/")
                    full, recursive = "/".join(filter(None, (below, head))), "recursive=true" in self.path.lower()
                    if more:
                        entries[full] = {"type": "directory", "oid": "0", "size": 0, "path": full}
                    if recursive or not more:
                        entries[name] = {"type": "file", "oid": "0", "size": (root / name).stat().st_size, "path": name}
            return (200, json.dumps([*entries.values()]).encode(), as_json) if entries else (404, b"", {})
        if file in names:
            content = (root / file).read_bytes()
            headers = {"ETag": '"x"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.headers.get("Range"):
                start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
                return 206, content[int(start) : int(end or len(content)) + 1], headers
            return 200, content, headers
        return 404, b"", {"X-Error-Code": "RepoNotFound" if path.startswith("/api") else "EntryNotFound"}


READ = """
import json, sys
from nanoflax import data
from nanoflax.data import parts
from nanoflax.errors import UserError
plan = parts.plan("hub:owner/corpus", "train", part_bytes=100)
print(json.dumps([[list(parts.read(plan, i, data.DataReport())) for i in range(len(plan.parts))],
                  data.source_version(plan.source)]))
try:
    data.source_version(data.Source("hub:owner/other"))
except UserError as error:
    print(error)
"""


def test_files_are_streamed_from_the_hub_in_ranges(folder, cache, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.root, server.requests = folder, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        found = subprocess.run([sys.executable, "-c", READ], env=os.environ | own, capture_output=True, text=True)
        server.shutdown()
    assert not found.returncode, found.stderr
    values, refused = found.stdout.splitlines()
    read, version = json.loads(values)
    assert sum(read, []) == TEXTS["train"] and len(read) == 5  # groups of 10 rows
    assert version == data.source_version(data.Source("hub:owner/corpus"))  # of the cache
    assert "hub:owner/other: the hub answers" in refused
    assert any(name.endswith("train-00001-of-00002.parquet") and ranged for name, ranged in server.requests)
    assert not list(tmp_path.rglob("*.parquet"))  # nothing is kept


def test_parts_of_the_cache_are_those_of_the_folder(folder, cache):
    plans = [parts.plan(name, "train", 100) for name in (f"hub:{folder}", "hub:owner/corpus")]
    assert [[(part.begin, part.end, part.size) for part in plan.parts] for plan in plans] == [
        [(part.begin, part.end, part.size) for part in plans[0].parts]
    ] * 2
