"""Damage to a file of bytes, for the tests of readers."""

import tracemalloc

from nanoflax.errors import UserError


def damaged(data, rng, header):
    """`data` after one to three accidents, half of them in its first `header` bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = header if rng.random() < 0.5 else len(data)
        at, kind = rng.randrange(max(min(end, len(data)), 1)), rng.randrange(8)
        if kind < 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 3:  # digits and punctuation of a JSON header
            data[at : at + 1] = rng.choice(b'0123456789-.eE"[]{},: \\FIUB').to_bytes()
        elif kind == 4:  # huge and negative numbers
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"])
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            del data[at : at + rng.choice([1, 4, 8])]
    return bytes(data)


def read_all(open_, path, most):
    """{name: array} of all tensors, or None if refused; never more than `most` bytes at once."""
    tracemalloc.start()
    try:
        tensors = open_(path)
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert (tensor.name, tensor.shape, tensor.dtype) == (name, arrays[name].shape, arrays[name].dtype)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 10_000
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most
    return arrays
