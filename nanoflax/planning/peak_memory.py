"""An estimate of the peak memory of a traced computation.

The rules for what the compiler fuses and keeps come from comparisons with the memory that libtpu 0.0.42 reports (see
the table in the README), and with that of XLA for an H200.
"""

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jax.extend.core import Literal

# Matrix products and operations that move data; every other operation is fused into the operations
# that read its result.
_UNFUSED = (
    "dot_general", "ragged_dot", "gather", "scatter", "reduce", "cum", "arg", "sort", "concatenate",
    "dynamic_update_slice", "scan", "while", "cond", "random", "threefry", "top_k", "pallas_call", "ffi_call",
    "dot_product_attention",
)  # fmt: skip
_PRODUCTS = ("dot_general", "ragged_dot", "ffi_call", "dot_product_attention")
_SAME_NUMBERS = ("reshape", "transpose", "squeeze", "expand_dims")  # a view of the operand: it needs no buffer
MAX_FUSED_INPUTS = 1.2  # an operation is fused if its inputs have at most this many times the bytes of its result


class _Buffer:
    """An array in memory, from the operation `first` that writes it to the operation `last` that reads it."""

    def __init__(self, size: int, first: int, fused: bool = False):
        self.size, self.first, self.last = 0 if fused else size, first, first
        self.read_size = size  # bytes that an operation reads; also if the buffer is fused, and has size 0


class _Value(NamedTuple):
    """The buffers and gathered inputs from which a variable is computed."""

    buffers: frozenset = frozenset()
    gathered: frozenset = frozenset()  # (variable, bytes)
    # A list that all views of the variable share: the buffer that holds it, or nothing yet if it is fused.
    operand: list | None = None


def peak(
    jaxpr: Any,
    gathered: Collection[Any],
    parts: Mapping[Any, int],
    carries: Collection[Any] = (),
    writes_operands: bool = False,
) -> tuple[int, int]:
    """(bytes of the results, the largest number of bytes in use at once) of a jaxpr.

    The memory of the jaxpr's inputs is not counted. writes_operands: a product reads its operands from memory, as on a
    GPU; a TPU computes them inside the product. gathered: inputs of which each chip stores a
    part; each use gathers the complete input, with two bytes per number. parts: result -> number of
    chips over which it is split immediately. carries: results that are written in place.
    """
    trace = _Trace(parts, carries, writes_operands)
    sources = {v: _Value(gathered=frozenset([(v, math.prod(v.aval.shape) * 2)])) for v in gathered}
    outs = trace.run(jaxpr, sources)
    results, end, extra = set(), len(trace.extra), dict(enumerate(trace.extra))
    for v, value in zip(jaxpr.outvars, outs, strict=True):
        for b in value.buffers - results if v not in carries else ():
            b.last, num_parts = end, parts.get(v, 1)
            part = b.size // num_parts
            if not (num_parts > 1 and b in trace.stacked):  # complete until it is split
                extra[b.first] = max(extra[b.first], trace.extra[b.first] + b.size - part)
            b.size = part
            results.add(b)
    changes = [0] * (end + 2)  # of the bytes in use, at each operation
    for b in trace.buffers:
        changes[b.first] += b.size
        changes[b.last + 1] -= b.size
    in_use = itertools.accumulate(changes[:-1])
    most = max((n + extra.get(i, 0) for i, n in enumerate(in_use)), default=0)
    return sum(b.size for b in results), most


class _Trace:
    """Records the buffers that the operations of a jaxpr write and read."""

    def __init__(self, parts: Mapping[Any, int], carries: Collection[Any], writes_operands: bool):
        self.parts, self.carries, self.writes_operands = parts, carries, writes_operands
        self.buffers: list[_Buffer] = []
        self.extra: list[int] = []  # bytes that each operation needs in addition to its buffers
        self.stacked: set[_Buffer] = set()  # results that a scan splits while it stacks them

    def run(self, jaxpr: Any, values: dict[Any, _Value]) -> list[_Value]:
        """The values of a jaxpr's outputs. values: the values of its inputs; an absent input uses no memory."""

        def get(v):
            return _Value() if isinstance(v, Literal) else values.get(v, _Value())

        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [get(v) for v in eqn.invars]
            inner = _open(eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr"))
            if name == "cond":  # its branches are kinds of layers, which need the same memory
                inner, ins = _open(eqn.params["branches"][0]), ins[1:]
            if inner is not None and name not in ("scan", "while", "pallas_call"):
                # A call may have more inputs than its jaxpr: the inputs of its gradient rule.
                outs = self.run(inner, dict(zip(inner.invars, ins, strict=False)))
                values.update(zip(eqn.outvars, outs, strict=True))
                continue
            if self.writes_operands and name.startswith(_PRODUCTS):
                ins = [self.written(v, value) for v, value in zip(eqn.invars, ins, strict=True)]
            buffers = frozenset().union(*(value.buffers for value in ins))
            merged = _Value(buffers, frozenset().union(*(value.gathered for value in ins)))
            if self.fuses(eqn, merged.buffers):
                same = name in _SAME_NUMBERS
                values.update((v, merged._replace(operand=ins[0].operand if same else [])) for v in eqn.outvars)
                continue
            for b in merged.buffers:
                b.last = len(self.extra)
            self.write(eqn, values, inner)
            self.extra.append(self.extra_bytes(eqn, inner, ins, merged.gathered))
        return [get(v) for v in jaxpr.outvars]

    def fuses(self, eqn: Any, buffers: Collection[_Buffer]) -> bool:
        """Whether an operation is computed inside the operations that read its result."""
        out_bytes = sum(map(_bytes, eqn.outvars))
        if eqn.primitive.name == "reduce_sum" and out_bytes == sum(map(_bytes, eqn.invars)):
            return True  # a sum over dimensions of size 1, the number of chips along the batch
        if eqn.primitive.name.startswith(_UNFUSED):
            return False
        in_bytes = sum(b.read_size for b in buffers)
        return in_bytes <= MAX_FUSED_INPUTS * out_bytes or any(v in self.carries for v in eqn.outvars)

    def written(self, v: Any, value: _Value) -> _Value:
        """The value of an operand that is in a buffer of its own."""
        if value.operand is None or not value.buffers:
            return value  # an input of the jaxpr, or the cast of one
        if not value.operand:
            value.operand.append(_Buffer(_bytes(v), len(self.extra)))
            self.buffers += value.operand
        return _Value(value.buffers | {*value.operand}, value.gathered)

    def write(self, eqn: Any, values: dict[Any, _Value], inner: Any) -> None:
        """Record a buffer for each result of an operation."""
        name = eqn.primitive.name
        # The TPU compiler does not write attention scores, [B, H, T, S] float32: it writes the
        # weights after the softmax, in bfloat16.
        fused = (
            name == "dot_general"
            and eqn.params["dimension_numbers"][1][0]
            and eqn.outvars[0].aval.dtype != eqn.invars[0].aval.dtype
        )
        for i, v in enumerate(eqn.outvars):
            buffer = _Buffer(_bytes(v), len(self.extra), bool(fused))
            self.buffers.append(buffer)
            values[v] = _Value(frozenset([buffer]), operand=[buffer])
            if name == "scan" and i >= _scan_sizes(eqn, inner)[1]:
                self.stacked.add(buffer)

    def extra_bytes(self, eqn: Any, inner: Any, ins: list[_Value], gathered: Collection[tuple[Any, int]]) -> int:
        """Bytes of the gathered inputs of an operation, or of the memory inside a scan."""
        if eqn.primitive.name != "scan":
            return sum(n for _, n in gathered) if eqn.primitive.name.startswith(("dot_general", "ragged_dot")) else 0
        num_consts, num_carry = _scan_sizes(eqn, inner)
        first = num_consts + num_carry  # the first input that is scanned layer by layer
        layer = {v for v, value in zip(inner.invars[first:], ins[first:], strict=True) if value.gathered}
        stacks = zip(inner.outvars[num_carry:], eqn.outvars[num_carry:], strict=True)
        parts = {v: self.parts[out] for v, out in stacks if out in self.parts}
        constant = frozenset().union(*(value.gathered for value in ins[:first]))
        inside = peak(inner, layer, parts, inner.outvars[:num_carry], self.writes_operands)[1]
        return inside + sum(n for _, n in constant)


def _bytes(v: Any) -> int:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize


def _open(jaxpr: Any) -> Any:
    """The Jaxpr of a ClosedJaxpr; anything else unchanged. An equation may hold either, by the version of JAX."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _scan_sizes(eqn: Any, inner: Any) -> tuple[int, int]:
    """(constants, carries) of a scan, from its shapes: the parameters that say it differ between versions of JAX."""

    def stacked(outside, inside):  # arrays with one dimension more outside of the scan
        return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))

    num_carry = len(eqn.outvars) - stacked(eqn.outvars, inner.outvars)
    return len(eqn.invars) - stacked(eqn.invars, inner.invars) - num_carry, num_carry
