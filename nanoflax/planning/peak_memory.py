"""The memory that a traced computation needs at once, as the TPU compiler would run it.

The rules for what the compiler fuses and keeps were found by comparison with the memory that libtpu
0.0.42 reports: see the table in the README.
"""

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jax.extend.core import Literal

# Matrix products and operations that move data are computed separately; the rest is fused into the
# operations that read it.
_UNFUSED = (
    "dot_general", "gather", "scatter", "reduce", "cum", "arg", "sort", "concatenate", "dynamic_update_slice", "scan",
    "while", "cond", "random", "threefry", "top_k", "pallas_call",
)  # fmt: skip
REREAD = 1.2  # an operation is fused if its inputs are at most this much larger than its result


class _Buffer:
    """An array in memory, from the operation that writes it to the last operation that reads it."""

    def __init__(self, size: int, born: int, fused: bool = False):
        self.size, self.born, self.last = 0 if fused else size, born, born
        self.read_size = size  # bytes of reading it again, which may mean computing it again


class _Value(NamedTuple):
    """Where the value of a variable comes from."""

    buffers: frozenset = frozenset()  # that it is computed from
    gathered: frozenset = frozenset()  # (variable, bytes) of gathered inputs that it is computed from


def peak(
    jaxpr: Any, gathered: Collection[Any], parts: Mapping[Any, int], carries: Collection[Any] = ()
) -> tuple[int, int]:
    """(bytes of the results, the largest number of bytes alive at once) of a jaxpr.

    The memory of the jaxpr's inputs is not counted. gathered: inputs that are gathered from the
    chips' parts, as two bytes a number, wherever they are used. parts: the number of chips over
    which a result is split as soon as it is computed. carries: results that are written in place.
    """
    trace = _Trace(parts, carries)
    sources = {v: _Value(gathered=frozenset([(v, math.prod(v.aval.shape) * 2)])) for v in gathered}
    outs = trace.run(jaxpr, sources)
    results, end, extra = set(), len(trace.extra), dict(enumerate(trace.extra))
    for v, value in zip(jaxpr.outvars, outs, strict=True):
        for b in value.buffers - results if v not in carries else ():
            b.last, num_parts = end, parts.get(v, 1)
            part = b.size // num_parts
            if not (num_parts > 1 and b in trace.stacked):  # whole for a moment, before it is split
                extra[b.born] = max(extra[b.born], trace.extra[b.born] + b.size - part)
            b.size = part
            results.add(b)
    changes = [0] * (end + 2)  # of the bytes alive, at each operation
    for b in trace.buffers:
        changes[b.born] += b.size
        changes[b.last + 1] -= b.size
    alive = itertools.accumulate(changes[:-1])
    most = max((n + extra.get(i, 0) for i, n in enumerate(alive)), default=0)
    return sum(b.size for b in results), most


class _Trace:
    """Goes through the operations of a jaxpr and notes the buffers that they write and read."""

    def __init__(self, parts: Mapping[Any, int], carries: Collection[Any]):
        self.parts, self.carries = parts, carries
        self.buffers: list[_Buffer] = []
        self.extra: list[int] = []  # bytes that each operation needs beside its buffers
        self.stacked: set[_Buffer] = set()  # results that a scan stacks, and splits itself

    def run(self, jaxpr: Any, values: dict[Any, _Value]) -> list[_Value]:
        """The values of a jaxpr's outputs. values: those of its inputs; absent ones use no memory."""

        def get(v):
            return _Value() if isinstance(v, Literal) else values.get(v, _Value())

        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [get(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            inner = getattr(inner, "jaxpr", inner)
            if name == "cond":  # chooses between kinds of layers, which need the same memory
                inner, ins = eqn.params["branches"][0].jaxpr, ins[1:]
            if inner is not None and name not in ("scan", "while", "pallas_call"):
                # A call may have more inputs than its jaxpr (those of its gradient rule).
                outs = self.run(inner, dict(zip(inner.invars, ins, strict=False)))
                values.update(zip(eqn.outvars, outs, strict=True))
                continue
            merged = _Value(*(frozenset().union(*sets) for sets in zip(*ins, strict=True))) if ins else _Value()
            if self.fuses(eqn, merged.buffers):
                values.update((v, merged) for v in eqn.outvars)
                continue
            for b in merged.buffers:
                b.last = len(self.extra)
            self.write(eqn, values)
            self.extra.append(self.extra_bytes(eqn, inner, ins, merged.gathered))
        return [get(v) for v in jaxpr.outvars]

    def fuses(self, eqn: Any, buffers: Collection[_Buffer]) -> bool:
        """Whether an operation is computed inside those that read its result."""
        out_bytes = sum(map(_bytes, eqn.outvars))
        if eqn.primitive.name == "reduce_sum" and out_bytes == sum(map(_bytes, eqn.invars)):
            return True  # over dimensions of 1: the chips' parts of the batch
        if eqn.primitive.name.startswith(_UNFUSED):
            return False
        return sum(b.read_size for b in buffers) <= REREAD * out_bytes or any(v in self.carries for v in eqn.outvars)

    def write(self, eqn: Any, values: dict[Any, _Value]) -> None:
        """Notes a buffer for each result of an operation."""
        name = eqn.primitive.name
        # The TPU compiler writes attention scores, [B, H, T, S] float32, only after the softmax, as
        # bfloat16.
        fused = (
            name == "dot_general"
            and eqn.params["dimension_numbers"][1][0]
            and eqn.outvars[0].aval.dtype != eqn.invars[0].aval.dtype
        )
        for i, v in enumerate(eqn.outvars):
            buffer = _Buffer(_bytes(v), len(self.extra), bool(fused))
            self.buffers.append(buffer)
            values[v] = _Value(buffers=frozenset([buffer]))
            if name == "scan" and i >= eqn.params["num_carry"]:
                self.stacked.add(buffer)

    def extra_bytes(self, eqn: Any, inner: Any, ins: list[_Value], gathered: Collection[tuple[Any, int]]) -> int:
        """Bytes of gathered inputs that an operation needs, and of the memory inside a scan."""
        if eqn.primitive.name != "scan":
            return sum(n for _, n in gathered) if eqn.primitive.name == "dot_general" else 0
        num_carry = eqn.params["num_carry"]
        first = eqn.params["num_consts"] + num_carry  # the first input that is scanned layer by layer
        layer = {v for v, value in zip(inner.invars[first:], ins[first:], strict=True) if value.gathered}
        stacks = zip(inner.outvars[num_carry:], eqn.outvars[num_carry:], strict=True)
        parts = {v: self.parts[out] for v, out in stacks if out in self.parts}
        constant = frozenset().union(*(value.gathered for value in ins[:first]))
        return peak(inner, layer, parts, inner.outvars[:num_carry])[1] + sum(n for _, n in constant)


def _bytes(v: Any) -> int:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize
