"""Mutations for the fuzzer that keep a file's structure: JSON trees, headers of safetensors and GGUF, templates."""

import json
import random
import struct
import zlib

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 31, 32, 64, 255, 256, 1000, 2**16, 2**31 - 1, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**100, -(2**63), 0.0, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", " ", "a",
    "0", "-1", "\0", "\n", "\x1b[2J", "\ud800", "é", "日本語", "</s>", "<s>", "../x", "/etc/passwd", "..", ".", "a/b",
    "~", "%s", "{0}", "x" * 1000, [], {}, [[]], [None], [0], [1, 1], [-1], [2**40, 2**40], ["a"], {"a": 1}, {"": None},
    {"0": "a", "1": "b"}, [{"name": "default", "template": "{{ 1 }}"}],
]  # fmt: skip
SIZES = [x for x in ODD if type(x) is int and 0 <= x < 2**64]
JINJA = """{{ {% }} %} {%- -%} {# #} {%if %}for in range( ) messages message ['content'] .role |trim |tojson |length
    |join(',') |replace('a','b') |indent(2) |upper |list |map(attribute='role') |selectattr( |sort |first |last |string
    namespace(n=0) {%set x= {%endset%} {%endif%} {%endfor%} {%else%} {%elif {%macro f()%} {%endmacro%} {{f()}}
    {%generation%} {%endgeneration%} {%break%} {%continue%} raise_exception('x') strftime_now('%Y') bos_token eos_token
    add_generation_prompt tools loop.index0 loop.last loop.previtem ~ + - * ** / // % == != < > and or not is defined
    none true false 0 1 -1 10**9 99999999 'a' "b" <|im_start|> <|im_end|> </s> [ ] ( ) { } : , . | = __class__
    __globals__ __init__ __mro__ __subclasses__() .format( .join( .center( .__getitem__ cycler( joiner() lipsum() dict(
    |format( |center( |batch( |attr('x') self caller() {%call {%endcall%} {%filter {%endfilter%} {%raw%} {%endraw%}
    {%include'x'%} {%import'x'as y%} {%extends'x'%} {%block b%} {%endblock%} |pprint |urlize |wordwrap( |xmlattr
    .split( .strip() .startswith( .items() .get( .append( |reject( |groupby( |sum |unique |slice( |round( |int |float
    """.split()


def bytes_of(data, rng, max_size):
    """Bytes with one small change."""
    data = bytearray(data or b"a")
    at, kind = rng.randrange(len(data)), rng.randrange(7)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + 1] = rng.randbytes(1)
    elif kind == 2:
        data[at:at] = rng.choice(
            [b"\0", b"\n", b"\t", b'"', b"\r", b"\xff", b"\xef\xbb\xbf", b"  ", b",", b"\xed\xa0\x80"]
        )
    elif kind == 3:
        del data[at : at + rng.choice([1, 2, 8, 64])]
    elif kind == 4:
        end = at + rng.choice([1, 4, 16, 64])
        data[at:at] = data[at:end] * rng.choice([1, 2, 50])
    elif kind == 5:
        data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"])
    else:
        other = rng.randrange(len(data))
        data[at : at + 8] = data[other : other + 8]
    return bytes(data[:max_size])


def _places(value, found):
    """All (container, key) in a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found.append((value, key))
        _places(child, found)
    return found


def json_value(value, rng):
    """A JSON tree with one to three changes."""
    root = [value]
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = _places(root, [])
        container, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind < 3:
            container[key] = rng.choice(ODD)
        elif kind == 3:
            other, its_key = rng.choice(found)
            container[key] = json.loads(json.dumps(other[its_key]))
        elif kind == 4 and container is not root:
            del container[key]
        elif kind == 5 and isinstance(container, dict):
            container[rng.choice(["", "a", "..", "0", "\ud800", "model_type", str(rng.choice([*container])) + "x"])] = (
                container[key]
            )
        elif kind == 6 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
            number = container[key]
            container[key] = rng.choice([number + 1, number - 1, -number, number * 2, float(number), str(number)])
        elif kind == 7 and rng.random() < 0.2:
            for _ in range(rng.choice([1, 5, 200, 900])):
                container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
        elif isinstance(container[key], str):
            text = container[key]
            at = rng.randrange(len(text) + 1)
            container[key] = text[:at] + str(rng.choice(ODD)) + text[at + rng.randrange(3) :]
    return root[0]


def json_text(data, rng, max_size):
    """The text of JSON: its tree is changed, or else its bytes."""
    try:
        if rng.random() < 0.1:
            raise ValueError
        text = json.dumps(json_value(json.loads(data), rng), ensure_ascii=rng.random() < 0.7).encode(
            "utf-8", "surrogatepass"
        )
        if rng.random() < 0.05 and b":" in text:  # a name that is there twice
            text = text.replace(b"}", b"," + text[1 : text.index(b":")] + b":0}", 1)
        return text if len(text) <= max_size else data
    except (ValueError, RecursionError, OverflowError):
        return bytes_of(data, rng, max_size)


def lines(data, rng, max_size):
    """A file of lines: one is changed as JSON or as bytes, copied, removed or moved."""
    found = data.split(b"\n")
    at, kind = rng.randrange(len(found)), rng.randrange(6)
    if kind < 3:
        change = json_text if found[at][:1] in (b"{", b"[") else bytes_of
        found[at] = change(found[at], rng, max_size)
    elif kind == 3:
        found.insert(at, rng.choice(found))
    elif kind == 4:
        del found[at]
    else:
        other = rng.randrange(len(found))
        found[at], found[other] = found[other], found[at]
    return b"\n".join(found)[:max_size]


def words(data, rng, max_size):
    """A template: fragments are inserted, removed or exchanged."""
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice([1, 2, 4])):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(4)
        if kind < 2:
            text = text[:at] + " " * rng.randrange(2) + rng.choice(JINJA) + " " * rng.randrange(2) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.choice([1, 5, 20]) :]
        else:
            begin = rng.randrange(len(text) + 1)
            text = text[:at] + text[begin : begin + rng.choice([5, 20, 60])] + text[at:]
    return text.encode("utf-8", "surrogateescape")[:max_size]


def safetensors(data, rng, max_size):
    """A safetensors file: its header is changed as JSON and its length is then right, or bytes are changed."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15 or length > len(data):
        return bytes_of(data, rng, max_size)
    header = json_text(data[8 : 8 + length], rng, max_size)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def gguf_spans(data):
    """The (start, size, what) of the fields in the header of a GGUF file: as many as can be read."""
    found, position = [], 0

    def take(size, what):
        nonlocal position
        if not 0 <= size <= len(data) - position:
            raise ValueError
        found.append((position, size, what))
        position += size
        return int.from_bytes(data[position - size : position], "little")

    def string():
        take(take(8, "size"), "text")

    def value(kind):
        if kind == 8:
            string()
        elif kind == 9:
            kind = take(4, "kind")
            for _ in range(take(8, "size")):
                value(kind)
        else:
            take({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4), "number")

    try:
        take(4, "magic"), take(4, "version")
        tensors, metadata = take(8, "size"), take(8, "size")
        for _ in range(metadata):
            string()
            value(take(4, "kind"))
        for _ in range(tensors):
            string()
            for _ in range(take(4, "kind")):
                take(8, "size")
            take(4, "kind"), take(8, "size")
    except (ValueError, RecursionError):
        pass
    return found


def gguf(data, rng, max_size):
    """A GGUF file with one to three changed fields of its header."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        spans = gguf_spans(data)
        if rng.random() < 0.1 or not spans:
            return bytes_of(data, rng, max_size)
        start, size, what = rng.choice(spans)
        old = data[start : start + size]
        if what == "text":
            new = bytes_of(old, rng, 200)[:size].ljust(size, b"\0") if rng.random() < 0.5 else rng.choice(
                [data[s : s + n] for s, n, w in spans if w == "text"])  # fmt: skip
            start, size = start - 8, size + 8
            new = struct.pack("<Q", len(new)) + new
        elif size == 8:
            new = struct.pack("<Q", rng.choice([*SIZES, struct.unpack("<Q", old)[0] ^ 1]))
        elif what in ("kind", "version"):
            new = struct.pack("<I", rng.choice([*range(14), 20, 30, 100, 2**31, 2**32 - 1]))
        else:
            new = bytes_of(old, rng, size)[:size].ljust(size, b"\0")
        data = data[:start] + new + data[start + size :]
    return data[:max_size]


def repair_manifests(files):
    """Makes the checksums of a checkpoint right, so that what is behind them is read too."""
    for name in files:
        if name.endswith("manifest.json"):
            root = name.removesuffix("manifest.json")
            try:
                body = json.loads(files[name])
                for file in body["files"].keys() & {path.removeprefix(root) for path in files}:
                    body["files"][file] = [len(files[root + file]), zlib.crc32(files[root + file])]
                body.pop("crc32", None)
                crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
                files[name] = json.dumps({"crc32": crc, **body}).encode()
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                pass


def pack(files):
    """{name: bytes} as one input of the fuzzer."""
    return b"".join(struct.pack("<HI", len(name), len(data)) + name.encode() + data for name, data in files.items())


def unpack(data):
    """The inverse of `pack`; {} for what it did not write."""
    files, at = {}, 0
    while at + 6 <= len(data):
        n, size = struct.unpack_from("<HI", data, at)
        name = data[at + 6 : at + 6 + n].decode("ascii", "replace")
        files[name] = data[at + 6 + n : at + 6 + n + size]
        at += 6 + n + size
    return files


KINDS = {".json": json_text, ".jsonl": lines, ".csv": lines, ".conll": lines, ".txt": lines, ".en": lines,
         ".fr": lines, ".jinja": words, ".safetensors": safetensors, ".gguf": gguf}  # fmt: skip


def mutate(data, max_size, seed):
    """libFuzzer's custom mutator: one file of a packed input is changed by the kind of its name."""
    rng = random.Random(seed)
    files = unpack(data)
    if not files:
        return data
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice([*files])
        suffix = name[name.rfind(".") :] if "." in name else ".json"
        files[name] = KINDS.get(suffix, bytes_of)(files[name], rng, max_size)
    if rng.random() < 0.8:
        repair_manifests(files)
    packed = pack(files)
    return packed if len(packed) <= max_size else data
