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
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(child := value[key], dict | list):
            _places(child, found)
    return found


def _place(root, rng):
    """A (container, key) in a JSON tree: each place is as likely, or, more often, each branch on the way to it.

    A vocabulary has most of the places of a file, and hides the few that decide how the file is read.
    """
    if rng.random() < 0.3:
        return rng.choice(_places(root, []))
    container, key = root, 0
    while (child := container[key]) and isinstance(child, dict | list) and (container is root or rng.random() < 0.9):
        container, key = child, rng.choice([*child]) if isinstance(child, dict) else rng.randrange(len(child))
    return container, key


def json_value(value, rng):
    """A JSON tree with one to three changes."""
    root = [value]
    for _ in range(rng.choice([1, 1, 2, 3])):
        container, key = _place(root, rng)
        kind = rng.randrange(8)
        if kind < 3:
            container[key] = rng.choice(ODD)
        elif kind == 3:
            other, its_key = _place(root, rng)
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
        if size > len(data) - position:
            raise ValueError
        found.append((position, size, what))
        position += size

    def number(size, what):
        take(size, what)
        return int.from_bytes(data[position - size : position], "little")

    def value(kind):
        if kind == 8:
            take(number(8, "size"), "text")
        elif kind == 9:
            kind, n = number(4, "kind"), number(8, "size")
            if kind in (8, 9):
                for _ in range(n):
                    value(kind)
            elif n <= len(data):
                size = GGUF_SIZES.get(kind, 4)
                for _ in range(n):
                    take(size, "number")
        else:
            take(GGUF_SIZES.get(kind, 4), "number")

    try:
        take(4, "magic"), take(4, "version")
        tensors, metadata = number(8, "size"), number(8, "size")
        for _ in range(metadata):
            value(8)
            value(number(4, "kind"))
        for _ in range(tensors):
            value(8)
            for _ in range(number(4, "kind")):
                take(8, "size")
            take(4, "kind"), take(8, "size")
    except (ValueError, RecursionError):
        pass
    return found


GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type; others have 4


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


def _varint(data, at):
    """(number, its end) of a varint of protobuf."""
    number = 0
    for i in range(10):
        number |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return number, at + i + 1
    raise ValueError


def _as_varint(number):
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def message_spans(data):
    """[(tag, start, start of the content, end)] of a message of protobuf. Raises: ValueError or LookupError if it is
    none."""
    found, at = [], 0
    while at < len(data):
        start, tag = at, data[at]
        tag, at = (tag, at + 1) if tag < 128 else _varint(data, at)
        if tag & 7 == 2:
            size = data[at]
            size, begin = (size, at + 1) if size < 128 else _varint(data, at)
            at = begin + size
        elif tag & 7 == 0:
            begin, at = at, _varint(data, at)[1]
        else:
            begin, at = at, at + {5: 4, 1: 8}[tag & 7]
        if at > len(data) or tag < 8:
            raise ValueError
        found.append((tag, start, begin, at))
    return found


def _field(tag, content):
    return _as_varint(tag) + (_as_varint(len(content)) if tag & 7 == 2 else b"") + content


def message(data, rng, max_size, level=0):
    """A message of protobuf with one changed field, of any message inside it, and the lengths that this needs."""
    try:
        spans = message_spans(data) if data and rng.random() < 0.95 else []
    except (ValueError, LookupError):
        spans = []
    if not spans:
        return bytes_of(data, rng, max_size)
    wanted = rng.choice([*{span[0]: 0 for span in spans}])  # most fields are pieces
    tag, start, begin, end = rng.choice([span for span in spans if span[0] == wanted])
    other = rng.choice(spans)
    content, kind = data[begin:end], rng.randrange(10)
    if kind == 0:
        new = b""
    elif kind == 1:
        new = data[start:end] + data[other[1] : other[3]]
    elif kind == 2:
        new = _field(tag, data[other[2] : other[3]]) if tag & 7 == other[0] & 7 else data[other[1] : other[3]]
    elif kind == 3:
        new = _field(rng.choice([tag ^ 8, rng.randrange(1, 60) << 3 | tag & 7]), content)
    elif tag & 7 == 2:
        deeper = level < 2 and rng.random() < 0.8
        new = _field(tag, message(content, rng, max_size, level + 1) if deeper else bytes_of(content, rng, max_size))
    elif tag & 7 == 0:
        new = _field(tag, _as_varint(rng.choice([rng.randrange(8), *rng.sample(SIZES, 2)])))
    else:
        number = struct.pack("<f", rng.choice([0.0, -0.0, 1.0, -1e30, 3e38, float("nan"), float("inf"), -float("inf")]))
        new = _field(tag, number if end - begin == 4 else bytes_of(content, rng, 8)[:8].ljust(8, b"\0"))
    return (data[:start] + new + data[end:])[:max_size]


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
         ".fr": lines, ".jinja": words, ".safetensors": safetensors, ".gguf": gguf, ".model": message,
         ".spm": message}  # fmt: skip


def mutate(data, max_size, seed):
    """libFuzzer's custom mutator: one file of a packed input is changed by the kind of its name."""
    rng = random.Random(seed)
    for _ in range(4):  # some changes change nothing
        files = unpack(data)
        if not files:
            break
        for _ in range(rng.choice([1, 1, 1, 2])):
            name = rng.choice([*files])
            suffix = name[name.rfind(".") :] if "." in name else ".json"
            files[name] = KINDS.get(suffix, bytes_of)(files[name], rng, max_size)
        if rng.random() < 0.8:
            repair_manifests(files)
        packed = pack(files)
        if packed != data and len(packed) <= max_size:
            return packed
    return data
