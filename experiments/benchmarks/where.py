"""`benchmark where`: the time of each kind of operation in a training step on a CPU, from a trace of the step.

An operation lasts from its event in the trace to its "end:" event; operations that run at the same time share that
time equally, so the kinds add up to the step. A fusion counts as the kind of its last operation.
"""

import collections
import glob
import math
import re
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

from experiments.benchmarks import sides
from nanoflax import parallel, train
from nanoflax.errors import UserError

KINDS = {  # the first whose pattern is in "OPCODE SHAPE op_name" of an operation
    "sums of bias gradients": r"^dot \(1,|transpose\(jvp.*/(query|key|value|out|up|gate|down)/reduce_sum",
    "products with weights": r"^(dot|custom-call.*dot_general)(?!.*attention\.attend/(?!out/))",
    "attention: scores, softmax, values": r"attention\.attend/(?!out/)",
    "attention: layout of heads": r"attention.*transpose$|_heads/(transpose|reshape)|rotat",
    "norms": r"norm",
    "activations and bias": r"/mlp/|/(query|key|value|out|up|gate|down)/",
    "embeddings": r"embed|_add_positions|_whole_texts|scatter-add",
    "loss": r"jvp\(",
    "optimizer, clipping, checks": r"jit\(step\)",
    "copies": r"^(copy|bitcast|transpose) ",
}
DIMS = r"(\w+)_dims=\{([\d,]+)\}"  # of a product, in the text of a program
CONTAINERS = ("while", "conditional", "call")  # the operations inside have their own events


class Op(NamedTuple):
    """An instruction of the compiled step."""

    opcode: str
    shape: tuple[int, ...]
    operands: list[str]
    text: str
    op_name: str

    @property
    def kind(self) -> str:
        text = f"{self.opcode} {self.shape} {self.op_name}"
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, text)), "other")


def parse_program(text: str) -> dict[str, Op]:
    """The instructions of a compiled program by their names. text: of `as_text()`."""
    ops = {}
    for line in text.splitlines():
        if m := re.match(r"\s*(?:ROOT )?%([\w.-]+) = (?:\w+\[([\d,]*)\]\S*|\(.*?\)) ([\w-]+)\((.*)", line):
            name, operands = re.search(r'op_name="([^"]*)"', line), re.findall(r"%([\w.-]+)", m[4].split(")")[0])
            shape = tuple(map(int, re.findall(r"\d+", m[2] or "")))
            ops[m[1]] = Op(m[3], shape, operands, line, name[1] if name else "")
    return ops


def seconds_of_ops(events: list[tuple[float, float, str]]) -> dict[str, float]:
    """The time of each name. events: (begin, end, name); at each moment, the open events share the time."""
    changes = sorted([(b, 1, name) for b, _, name in events] + [(e, -1, name) for _, e, name in events])
    found, running, before = collections.defaultdict(float), collections.Counter(), 0.0
    for now, change, name in changes:
        for other in running:
            found[other] += (now - before) * running[other] / running.total()
        running[name] += change
        running, before = +running, now
    return found


def read_events(path: str, ops: dict[str, Op]) -> list[tuple[float, float, str]]:
    """(begin, end, name) in seconds of the operations in a trace."""
    begins, ends = {}, {}
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for event in (event for line in plane.lines for event in line.events):
            name, stats = event.name.removeprefix("end: "), dict(event.stats)
            if name not in ops or ops[name].opcode in CONTAINERS:
                continue
            if event.name != name:
                ends[name, stats.get("_c")] = event.end_ns / 1e9
            elif "hlo_op" in stats:
                begins[name, stats.get("_p")] = event.start_ns / 1e9, event.end_ns / 1e9
    return [(begin, max(end, ends.get(key, end)), key[0]) for key, (begin, end) in begins.items()]


def alone(op: Op, ops: dict[str, Op]) -> tuple[float, float]:
    """(seconds, FLOPs) of a product of matrices that runs alone on this machine."""
    sizes = [ops[name].shape for name in op.operands]
    dims = {key: tuple(map(int, found.split(","))) for key, found in re.findall(DIMS, op.text)}
    contracted = dims["lhs_contracting"], dims["rhs_contracting"]
    numbers, options = (contracted, (dims.get("lhs_batch", ()), dims.get("rhs_batch", ()))), parallel.compiler_options
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, numbers), compiler_options=options("cpu"))
    arrays, times = jax.device_put([np.random.default_rng(0).standard_normal(s, np.float32) for s in sizes]), []
    for _ in range(6):
        begin = time.perf_counter()
        product(*arrays).block_until_ready()
        times.append(time.perf_counter() - begin)
    return min(times), 2.0 * math.prod(op.shape) * math.prod(sizes[0][i] for i in contracted[0])


def trace(job: sides.Job) -> tuple[dict[str, Op], list[tuple[float, float, str]], float]:
    """(the program, the events, seconds) of job.steps training steps."""
    _, mesh, state, batch, step = sides.prepare_step(job.decoder, batch_size=job.sizes[-1])
    step, options = train.compile_step(step, state, batch, mesh), jax.profiler.ProfileOptions()
    ops, options.python_tracer_level = parse_program(step.as_text()), 0
    state = jax.block_until_ready(step(state, batch)[0])
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            begin = time.perf_counter()
            for _ in range(job.steps):
                state, metrics = jax.block_until_ready(step(state, batch))
            seconds = time.perf_counter() - begin
        (path,) = glob.glob(f"{directory}/plugins/profile/*/*.xplane.pb")
        return ops, read_events(path, ops), seconds


def print_table(job: sides.Job) -> None:
    """Print the time of each kind of operation in a training step, and of its products when each runs alone."""
    if jax.default_backend() != "cpu":
        raise UserError("where reads the trace of a CPU; on an accelerator use pretrain --profile=10:12")
    ops, events, seconds = trace(job)
    times, kinds, products = seconds_of_ops(events), collections.defaultdict(float), collections.defaultdict(float)
    for name, t in times.items():
        kinds[ops[name].kind] += t
    kinds["between operations"] = max(0.0, seconds - sum(kinds.values()))
    measured, work = {}, 0.0
    for name, count in collections.Counter(name for _, _, name in events).items():
        if (op := ops[name]).opcode == "dot":
            key = op.shape, *(ops[operand].shape for operand in op.operands), *re.findall(DIMS, op.text)
            measured[key] = measured.get(key) or alone(op, ops)
            products[op.kind] += measured[key][0] * count
            work += measured[key][1] * count
    print(f"a training step, L D H T V B = {job.sizes}: {seconds / job.steps * 1e3:.1f} ms, mean of {job.steps}")
    print(f"{'':38}     ms  of step  its products, each alone")
    for kind, t in sorted(kinds.items(), key=lambda pair: -pair[1]):
        one = f"{products[kind] / job.steps * 1e3:10.1f} {products[kind] / seconds:7.1%}" if products[kind] else ""
        print(f"{kind:38} {t / job.steps * 1e3:7.1f} {t / seconds:7.1%} {one}".rstrip())
    least = sum(products.values())
    print(
        f"all products, each alone: {least / job.steps * 1e3:.1f} ms, {least / seconds:.1%} of the step, "
        f"{work / least / 1e9:.0f} GFLOP/s\nthe longest operations without the products:"
    )
    others = sorted((t / job.steps, name) for name, t in times.items() if ops[name].opcode != "dot")
    for t, name in others[:-11:-1]:
        print(f"  {t * 1e3:6.1f} ms  {ops[name].kind}: {name} {ops[name].shape} {ops[name].op_name[-70:]}")
