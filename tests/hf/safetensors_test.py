"""Directories of safetensors: equal to the library's, streamed, and refused when they lie."""

import dataclasses
import json
import os
import random
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax.errors import UserError
from nanoflax.hf import safetensors_io
from tests.corruption import damaged, read_all

RNG = np.random.default_rng(0)
SMALL = {
    "a.weight": RNG.normal(size=(4, 6)).astype(np.float32),
    "a.bias": RNG.normal(size=6).astype(np.float16),
    "b.weight": RNG.normal(size=(6, 2, 2)).astype(ml_dtypes.bfloat16),
    "ids": np.arange(3),
}


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def write_tensors(directory, arrays, **options):
    safetensors_io.save_safetensors(directory, [(n, a.shape, a.dtype, a) for n, a in arrays.items()], **options)


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def snapshot(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def assert_holds(directory, arrays):
    found = safetensors_io.open_safetensors(directory)
    assert {n: bits(t.read()) for n, t in found.items()} == {n: bits(a) for n, a in arrays.items()}


def refusal(directory):
    with pytest.raises(UserError) as caught:
        safetensors_io.open_safetensors(directory)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, SMALL, max_shard_bytes=100)
    assert sorted(os.listdir(tmp_path)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        safetensors_io.INDEX,
    ]
    return tmp_path


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("tag", safetensors_io.DTYPES)
def test_every_dtype_and_shape_both_ways(tmp_path, tag, shape):
    dtype = safetensors_io.DTYPES[tag]
    array = RNG.integers(0, 2, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    odd = np.ones(3, np.uint8)  # so that the other is not aligned
    safetensors.numpy.save_file({"x": array, "odd": odd}, tmp_path / "model.safetensors")
    assert_holds(tmp_path, {"x": array, "odd": odd})
    write_tensors(tmp_path, {"odd": odd, "x": array})
    assert safetensors_io.open_safetensors(tmp_path)["x"].offset % dtype.itemsize == 0
    ours = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in ours.items()} == {
        "x": (tag, list(shape), array.tobytes()),
        "odd": ("U8", [3], odd.tobytes()),
    }


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_parts_are_numpys_parts(tmp_path_factory, data):
    directory = tmp_path_factory.getbasetemp() / "parts"
    array = np.arange(5 * 4 * 3).reshape(5, 4, 3).astype(ml_dtypes.bfloat16)
    if not directory.exists():
        write_tensors(directory, {"x": array})
    slices = tuple(data.draw(st.slices(n)) for n in array.shape[: data.draw(st.integers(0, 3))])
    part = safetensors_io.open_safetensors(directory)["x"].read(slices)
    assert bits(part) == bits(array[slices]) and part.flags.writeable  # not the map
    empty = dataclasses.replace(safetensors_io.open_safetensors(directory)["x"], shape=(5, 4, 0))
    assert bits(empty.read(slices)) == bits(array[..., :0][slices])


def test_a_part_reads_only_itself_and_is_born_sharded(tmp_path):
    import jax

    array = RNG.normal(size=(1024, 1024)).astype(np.float32)
    write_tensors(tmp_path, {"x": array})
    tensor = safetensors_io.open_safetensors(tmp_path)["x"]
    for slices in ((slice(8, 16),), (slice(None), slice(3, 11))):
        tracemalloc.start()
        part = tensor.read(slices)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert bits(part) == bits(array[slices]) and peak < 2 * part.nbytes
    whole = (slice(None), slice(0, 1024))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "memmap", None)  # not for a whole tensor: it would be in memory twice
        assert bits(tensor.read(whole)) == bits(array)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    placed = jax.make_array_from_callback(tensor.shape, sharding, tensor.read)
    assert bits(np.asarray(placed)) == bits(array)


def test_the_library_opens_what_is_written(sharded):
    index = json.loads((sharded / safetensors_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in SMALL.values())
    found = {}
    for file in set(index["weight_map"].values()):
        with safetensors.safe_open(sharded / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: (file, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 (no iterator)
    assert {n: file for n, (file, _) in found.items()} == index["weight_map"]
    assert {n: bits(a) for n, (_, a) in found.items()} == {n: bits(a) for n, a in SMALL.items()}
    assert_holds(sharded, SMALL)


@pytest.mark.parametrize("limit", [2_000, 10**9])
def test_transformers_opens_what_is_written_and_back(tmp_path, limit):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        torch_dtype="bfloat16",
    )
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    read = safetensors_io.open_safetensors(tmp_path / "theirs")
    state = theirs.state_dict()
    assert {n: t.shape for n, t in read.items()} == {n: tuple(t.shape) for n, t in state.items()}
    safetensors_io.save_safetensors(
        tmp_path / "ours", [(n, t.shape, t.dtype, t.read) for n, t in read.items()], max_shard_bytes=limit
    )
    theirs_wrote = {p.name for p in (tmp_path / "theirs").glob("model*")}
    assert set(os.listdir(tmp_path / "ours")) == theirs_wrote
    assert (safetensors_io.INDEX in theirs_wrote) == (limit == 2_000)
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, value in again.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, state[name])


def test_save_and_read_hold_one_tensor_at_a_time(tmp_path):
    size = 1 << 20
    tracemalloc.start()
    safetensors_io.save_safetensors(
        tmp_path,
        [(f"t{i}", (size // 4,), np.float32, lambda i=i: np.full(size // 4, i, np.float32)) for i in range(16)],
        max_shard_bytes=4 * size,
    )
    for i, tensor in enumerate(safetensors_io.open_safetensors(tmp_path).values()):
        assert tensor.read()[[0, -1]].tolist() == [i, i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * size
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


LAYOUTS = {"single": 10**9, "two shards": 100, "four shards": 1}


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_a_model_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, before, after):
    new = {name: array + 1 for name, array in SMALL.items()}
    new["more"] = np.zeros(3, np.float32)
    write_tensors(tmp_path, SMALL, max_shard_bytes=LAYOUTS[before])
    for other in ("config.json", "adapter_model.safetensors", "notes.txt"):
        (tmp_path / other).write_text(other)
    old, replace, moves = snapshot(tmp_path), os.replace, []

    def broken_replace(source, target):  # fails at the move of this number, once
        moves.append(target)
        if len(moves) == fail_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken_replace)
    for fail_at in range(1, 20):  # noqa: B007 (broken_replace reads it)
        moves.clear()
        try:
            write_tensors(tmp_path, new, max_shard_bytes=LAYOUTS[after])
            break
        except UserError as error:
            assert "No space left" in str(error)
            assert snapshot(tmp_path) == old and len(list(tmp_path.iterdir())) == len(old)
    assert fail_at == len(moves) + 1 > 1
    if before == after == "single":
        assert len(moves) == 1  # in one step: there is never a moment without a model
    monkeypatch.undo()
    assert_holds(tmp_path, new)
    others = {n: c for n, c in snapshot(tmp_path).items() if n not in {p.name for p in tmp_path.glob("model*")}}
    assert others == {n: n.encode() for n in others} and len(others) == 3
    fresh = tmp_path / "fresh"
    write_tensors(fresh, new, max_shard_bytes=LAYOUTS[after])
    assert snapshot(fresh) == {n: c for n, c in snapshot(tmp_path).items() if n.startswith("model")}


@pytest.mark.parametrize(
    "failure, expected",
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt), (None, ValueError)],
)
def test_a_failure_while_writing_loses_nothing(tmp_path, failure, expected):
    write_tensors(tmp_path, SMALL)
    old = snapshot(tmp_path)

    def source():
        if failure:
            raise failure
        return np.zeros(5, np.float32)  # announced with another shape

    with pytest.raises(expected):
        safetensors_io.save_safetensors(
            tmp_path,
            [("x", (2,), np.float32, np.zeros(2, np.float32)), ("y", (2,), np.float32, source)],
            max_shard_bytes=8,
        )
    assert snapshot(tmp_path) == old and os.listdir(tmp_path) == ["model.safetensors"]


def test_a_model_is_rewritten_from_its_own_files(sharded):
    lazy = safetensors_io.open_safetensors(sharded)
    safetensors_io.save_safetensors(sharded, [(n, t.shape, t.dtype, t.read) for n, t in lazy.items()])
    assert os.listdir(sharded) == ["model.safetensors"]
    assert_holds(sharded, SMALL)


def test_what_cannot_be_written_is_refused_before_the_directory_is_made(tmp_path):
    zeros = np.zeros(2, ml_dtypes.int4)
    with pytest.raises(UserError, match="x has dtype int4; .*y has dtype"):
        write_tensors(tmp_path / "new", {"x": zeros, "y": np.zeros(2, np.complex128)})
    for names in (["x", "x"], ["__metadata__"]):
        with pytest.raises(ValueError, match="name"):
            safetensors_io.save_safetensors(tmp_path / "new", [(n, (2,), np.int8, zeros) for n in names])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*File exists"):
        write_tensors(tmp_path / "file", SMALL)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    "header, data, said",
    [
        ({"x": entry()}, bytes(7), "the tensors need 8 bytes of data and the file has 7"),
        ({"x": entry()}, bytes(9), "the tensors need 8 bytes of data and the file has 9"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "'y' begins at byte 4"),
        ({"x": entry(), "y": entry()}, bytes(8), "'y' begins at byte 0"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "'y' begins at byte 12"),
        ({"x": entry(offsets=(4, 12))}, bytes(12), "'x' begins at byte 4"),
        ({"x": entry(shape=(3,))}, bytes(8), "needs 12 bytes, not 8"),
        ({"x": entry(offsets=(8, 0))}, b"", "needs 8 bytes, not -8"),
        ({"x": entry(shape=(2**40, 2**40))}, bytes(8), "impossible shape"),
        ({"x": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", "impossible shape"),
        ({"x": entry(shape=(2**60,), offsets=(0, 2**62))}, b"", "the file has 0"),
        ({"x": entry(shape=[1] * 40 + [2])}, bytes(8), "impossible shape"),
        ({"x": entry(shape=(-2,))}, bytes(8), "whole numbers"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "whole numbers"),
        ({"x": entry(shape=(2, True))}, bytes(8), "whole numbers"),
        ({"x": entry(offsets=(0, 8, 8))}, bytes(8), "whole numbers"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "whole numbers"),
        ({"x": [1]}, bytes(8), "whole numbers"),
        ({"x": entry("F4")}, bytes(8), "dtype 'F4'; known are BOOL"),
        ({"x": entry(["F32"])}, bytes(8), "needs dtype"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b'{"x": 1, "x": 2}', b"", "'x' is there twice"),
        (b'{"x": {"shape": [1], "shape": [2]}}', b"", "'shape' is there twice"),
        (b'{"x": ', b"", "is not JSON"),
        (b"[" * 100_000, b"", "is not JSON"),
        (b"\xff\xfe{}", b"", "is not JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", b"", "is not JSON"),
        (b"[]", b"", "must hold an object"),
        (b"", b"", "is not JSON"),
    ],
)
def test_lying_headers_are_refused(tmp_path, header, data, said):
    write_raw(tmp_path / "model.safetensors", header, data)
    assert said in refusal(tmp_path)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("length", [1000, 2**63, 2**64 - 1])
def test_impossible_header_lengths_are_refused(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", {}, length=length)
    assert f"a header of {length} bytes cannot be" in refusal(tmp_path)
    for size in (0, 7):
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
        assert f"in a file of {size}" in refusal(tmp_path)


def test_an_absurd_header_is_not_even_read(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole: takes no disk
    tracemalloc.start()
    assert "100000001 bytes of JSON are more than" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_all_problems_are_named_at_once(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    write_raw(
        first,
        {"a.weight": entry("F4"), "new": entry(shape=(9,), offsets=(8, 16)), "a.bias": entry(shape=(-1,))},
        bytes(20),
    )
    second.unlink()
    said = refusal(sharded)
    for part in (
        "'a.weight' has dtype 'F4'",
        "'new' of shape [9] needs 36",
        "'a.bias' needs dtype",
        "'model-00002-of-00002.safetensors' is not a file",
    ):
        assert said.count(part) == 1, said
    write_raw(first, {f"t{i}": entry("F4") for i in range(1000)}, bytes(20))
    assert len(refusal(sharded)) < 8000 and "more" in refusal(sharded)


def edit_index(directory, **changes):
    path = directory / safetensors_io.INDEX
    index = json.loads(path.read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/x",
        "a\0b",
        "..\\x",
        "C:x",
        "a" * 300,
        "\ud800",
        "missing.safetensors",
    ],
)
def test_an_index_stays_in_its_directory(sharded, name):
    (sharded / "sub").mkdir()
    for place in (sharded.parent / "x.safetensors", sharded / "sub" / "x"):
        shutil.copy(sharded / "model-00001-of-00002.safetensors", place)
    edit_index(sharded, ids=name)
    plain = not any(c in name for c in "/\\:") and name != "."
    why = "is not a file that can be read" if plain else "must be a plain file name"
    why = "has an unpaired surrogate" if name == "\ud800" else why
    assert f"{name!r} {why}" in refusal(sharded)


def test_an_index_agrees_with_its_files(sharded):
    edit_index(sharded, ghost="model-00001-of-00002.safetensors", ids=None)
    said = refusal(sharded)
    assert "model-00001-of-00002.safetensors: 'ghost' is in the index but not in the file" in said
    assert "model-00002-of-00002.safetensors: 'ids' is in the file but not in the index" in said
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "{"):
        (sharded / safetensors_io.INDEX).write_text(text)
        refusal(sharded)


def test_links_are_refused(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for name in ("model-00001-of-00002.safetensors", safetensors_io.INDEX):
        (sharded / name).rename(outside / name)
        (sharded / name).symlink_to(outside / name)
        assert "is a link out of its directory" in refusal(sharded)
        (sharded / name).unlink()
        (sharded / name).symlink_to(name)
        assert "is not a file" in refusal(sharded)  # a loop
        (sharded / name).unlink()
        (outside / name).rename(sharded / name)
    assert_holds(sharded, SMALL)
    link = outside / "link"
    link.symlink_to(sharded)  # the directory itself may be one: the user named it
    assert_holds(link, SMALL)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a file" in refusal(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_cache_is_read_through_its_links(sharded, tmp_path_factory, shared):
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--a--b"
    revision = repo / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        blob = repo / "blobs" / (name := f"{i}fc0")
        if shared:  # as huggingface_hub 2 does
            (cache / "blobs" / name[:2]).mkdir(parents=True)
            shutil.copy(path, cache / "blobs" / name[:2] / name)
            blob.symlink_to(f"../../blobs/{name[:2]}/{name}")
        else:
            shutil.copy(path, blob)
        (revision / path.name).symlink_to(f"../../blobs/{name}")
    assert_holds(revision, SMALL)
    (repo / "snapshots").rename(repo / "models")  # any other links out of a directory
    assert "is a link out of its directory" in refusal(repo / "models" / "0123abcd")
    (repo / "models").rename(repo / "snapshots")
    blob = repo / "blobs" / "0fc0"  # a blob that leads elsewhere
    blob.unlink()
    blob.symlink_to(sharded / "model-00001-of-00002.safetensors")
    assert "is a link out of its directory" in refusal(revision)
    other = cache / "models--c--d"  # another repository's blob
    (other / "blobs").mkdir(parents=True)
    shutil.copy(sharded / "model-00001-of-00002.safetensors", other / "blobs" / "0fc0")
    (revision / "model-00001-of-00002.safetensors").unlink()
    (revision / "model-00001-of-00002.safetensors").symlink_to("../../../models--c--d/blobs/0fc0")
    assert "is a link out of its directory" in refusal(revision)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")
    said = refusal(tmp_path)
    assert name in said and "save_pretrained" in said and "safe_serialization=True" in said
    write_tensors(tmp_path, SMALL)
    assert_holds(tmp_path, SMALL)  # beside safetensors they do not matter


def test_no_weights_at_all(tmp_path):
    assert "has neither model.safetensors nor" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "none")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    write_tensors(tmp_path, SMALL)
    tensor = safetensors_io.open_safetensors(tmp_path)["b.weight"]
    os.truncate(tensor.file, tensor.offset + 4)
    for slices in ((), (slice(1, 3),)):
        with pytest.raises(UserError, match="b.weight cannot be read any more"):
            tensor.read(slices)


def library_reads(path):
    try:
        return {
            name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
            for name, t in safetensors.deserialize(path.read_bytes())
        }
    except safetensors.SafetensorError:
        return None


def tagged(arrays):
    return {n: (safetensors_io._TAGS[a.dtype], a.shape, a.tobytes()) for n, a in arrays.items()}


def test_a_thousand_damaged_files(tmp_path):
    # A damaged header may still be a whole one, of other names: then the library must agree, to
    # the byte. Whatever it refuses is refused.
    write_tensors(tmp_path, SMALL)
    path, rng = tmp_path / "model.safetensors", random.Random(0)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    loaded = refused = 0
    for _ in range(1500):
        path.write_bytes(damaged(good, rng, header))
        arrays = read_all(safetensors_io.open_safetensors, tmp_path, most=300_000)
        if arrays is None:
            refused += 1
        else:
            loaded += 1
            assert tagged(arrays) == library_reads(path)
    assert loaded > 50 and refused > 500


def test_a_thousand_damaged_shards(sharded):
    # With an index, a damaged name never passes, nor does any other shape or width.
    rng = random.Random(1)
    files = {p: p.read_bytes() for p in sharded.iterdir()}
    sizes = {p: len(d) if p.suffix == ".json" else 8 + int.from_bytes(d[:8], "little") for p, d in files.items()}
    loaded = refused = 0
    for i in range(1500):
        path = list(files)[i % 3]
        path.write_bytes(damaged(files[path], rng, sizes[path]))
        arrays = read_all(safetensors_io.open_safetensors, sharded, most=300_000)
        path.write_bytes(files[path])
        if arrays is None:
            refused += 1
        else:
            loaded += 1
            assert {n: (a.shape, a.itemsize) for n, a in arrays.items()} == {
                n: (a.shape, a.itemsize) for n, a in SMALL.items()
            }
    assert loaded > 50 and refused > 500
