"""How much memory a traced computation needs at once, as the TPU compiler would run it.

What it fuses and keeps was learnt from libtpu 0.0.42's own figures: see the README's table.
"""

import math

import jax

# Products and what moves data are computed by themselves; the rest is fused into its readers.
_UNFUSED = (
    "dot_general",
    "gather",
    "scatter",
    "reduce",
    "cum",
    "arg",
    "sort",
    "concatenate",
    "dynamic_update_slice",
    "scan",
    "while",
    "cond",
    "random",
    "threefry",
    "top_k",
    "pallas_call",
)


class _Buffer:
    """An array in memory, from the operation that makes it to the last that reads it."""

    def __init__(self, size, born, fused=False):
        self.size, self.born, self.last = 0 if fused else size, born, born
        self.worth = size  # of reading it again, which may cost a recomputation


def peak(jaxpr, gathered, parts, carries=()):
    """(bytes of the results, the most bytes alive at once) of a jaxpr whose inputs lie elsewhere.

    gathered: inputs that are put together from the chips' parts, in two bytes a number, wherever
    they are used; parts: into how many each result is split over the chips as soon as it is made;
    carries: results that are written in place.
    """
    buffers, extra, stacked = [], [], set()  # extra[i]: bytes that operation i alone needs
    nothing = (frozenset(), frozenset())

    def size(v):
        return math.prod(v.aval.shape) * v.aval.dtype.itemsize

    def fuses(eqn, sources, out_bytes):
        if eqn.primitive.name == "reduce_sum" and out_bytes == sum(map(size, eqn.invars)):
            return True  # over dimensions of 1: the chips' parts of the batch
        if eqn.primitive.name.startswith(_UNFUSED):
            return False
        return sum(b.worth for b in sources) <= 1.2 * out_bytes or any(v in carries for v in eqn.outvars)

    def run(jaxpr, values):
        """values: variable -> (the buffers that it is computed from, the gathered inputs)."""

        def get(v):
            return nothing if isinstance(v, jax.extend.core.Literal) else values.get(v, nothing)

        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [get(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            inner = getattr(inner, "jaxpr", inner)
            if name == "cond":  # of the kinds of layers: they need the same
                inner, ins = eqn.params["branches"][0].jaxpr, ins[1:]
            if inner is not None and name not in ("scan", "while", "pallas_call"):
                values.update(zip(eqn.outvars, run(inner, dict(zip(inner.invars, ins)))))
                continue
            sources = frozenset().union(*(s for s, _ in ins))
            inputs = frozenset().union(*(g for _, g in ins))
            if fuses(eqn, sources, sum(map(size, eqn.outvars))):
                values.update((v, (sources, inputs)) for v in eqn.outvars)
                continue
            for b in sources:
                b.last = len(extra)
            # The TPU compiler writes products of heads, [B, H, T, S] float32, only after the
            # softmax around them, as bfloat16.
            fused = (
                name == "dot_general"
                and eqn.params["dimension_numbers"][1][0]
                and eqn.outvars[0].aval.dtype != eqn.invars[0].aval.dtype
            )
            for i, v in enumerate(eqn.outvars):
                buffers.append(_Buffer(size(v), len(extra), fused))
                values[v] = (frozenset(buffers[-1:]), frozenset())
                if name == "scan" and i >= eqn.params["num_carry"]:
                    stacked.add(buffers[-1])
            if name == "scan":  # it splits what it stacks by itself
                carry, once = eqn.params["num_carry"], eqn.params["num_consts"]
                first = once + carry  # of what it takes a layer of at a time
                layer = {v for v, (_, whole) in zip(inner.invars[first:], ins[first:]) if whole}
                cut = {v: parts[out] for v, out in zip(inner.outvars[carry:], eqn.outvars[carry:]) if out in parts}
                inputs = frozenset().union(*(g for _, g in ins[:first]))
                need = peak(inner, layer, cut, inner.outvars[:carry])[1]
                extra.append(need + sum(n for _, n in inputs))
            else:
                extra.append(sum(n for _, n in inputs) if name == "dot_general" else 0)
        return [get(v) for v in jaxpr.outvars]

    outs = run(jaxpr, {v: (frozenset(), frozenset([(v, math.prod(v.aval.shape) * 2)])) for v in gathered})
    results, whole = set(), dict(enumerate(extra))
    for v, (sources, _) in zip(jaxpr.outvars, outs):
        for b in sources - results if v not in carries else ():
            b.last, n = len(extra), parts.get(v, 1)
            part = b.size // n
            if not (n > 1 and b in stacked):
                whole[b.born] = max(whole[b.born], extra[b.born] + b.size - part)
            b.size = part
            results.add(b)
    change = [0] * (len(extra) + 2)
    for b in buffers:
        change[b.born] += b.size
        change[b.last + 1] -= b.size
    alive, most = 0, 0
    for i, change in enumerate(change[:-1]):
        alive += change
        most = max(most, alive + whole.get(i, 0))
    return sum(b.size for b in results), most
