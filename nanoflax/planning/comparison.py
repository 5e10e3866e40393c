"""Compare meshes for one machine: the memory and the least time of a training step on each mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nanoflax import parallel, tokenizers
from nanoflax.config import Config
from nanoflax.errors import UserError
from nanoflax.planning import step_cost
from nanoflax.report import format_count

USABLE_MEMORY = 0.8  # of a chip; the TPU compiler has reserved up to 1.22 times the estimate, 1.43 times with experts
GIB = 2**30


def for_accelerator(config: Config) -> Config:
    """The Config with the values of a run on an accelerator: bfloat16 for dtype "auto", and the
    tokenizer's vocabulary size if none is set."""
    model, size = config.model, config.model.vocab_size
    if not size:
        kind, size = tokenizers.parse(config.data.tokenizer)
        if kind in ("bytes", "path"):
            size = tokenizers.load(config.data.tokenizer).vocab_size
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=size, dtype=dtype))


def with_mesh_vocabulary(config: Config, mesh: parallel.AnyMesh) -> Config:
    """The Config with the vocabulary padded as a run on this mesh pads it."""
    return dataclasses.replace(config, model=parallel.pad_vocabulary(config.model, mesh))


def candidate_meshes(num_chips: int, dim: int, experts: int = 0) -> list[tuple[int, ...]]:
    """(data, fsdp, tensor) of the usual meshes: all chips along data; all along fsdp; fsdp so large
    that parts of D still have MIN_SPLIT_DIM or more, the rest along data; tensor 2, 4 or 8. With experts, the same
    with the fifth size: 4 or 8 chips along expert, the rest along fsdp and data."""
    fsdp = math.gcd(num_chips, max(1, dim // step_cost.MIN_SPLIT_DIM))
    shapes = [(num_chips, 1, 1), (1, num_chips, 1), (num_chips // fsdp, fsdp, 1)]
    shapes += [(1, num_chips // t, t) for t in (2, 4, 8) if num_chips % t == 0 and num_chips > t]
    for e in (4, 8):
        if experts and experts % e == 0 and num_chips % e == 0 and num_chips > e:
            fsdp = math.gcd(num_chips // e, max(1, dim // step_cost.MIN_SPLIT_DIM))
            shapes += [(1, num_chips // e, 1, 1, e), (num_chips // e // fsdp, fsdp, 1, 1, e)]
    return list(dict.fromkeys(shapes))


# The part of one chip.


def compare_meshes(
    config: Config, chip: parallel.Chip, num_chips: int, shapes: Sequence[str] = (), platform: str = "tpu"
) -> dict[str, Any]:
    """The plans of a Config on several meshes of a machine, as a dict for JSON.

    config: of `for_accelerator`; shapes: as in train.mesh, default that of the config and
    `candidate_meshes`; platform: "tpu" or "gpu".

    Returns {"chip": the fields of Chip, "meshes": a dict for each mesh, the best first, with the
    fields of Plan, memory, fits and projection, "refused": a message for each impossible mesh}.
    Raises: UserError if no mesh is possible, or one of the given shapes is not.
    """
    usual = candidate_meshes(num_chips, config.model.dim, config.model.moe.experts)
    default = [config.train.mesh, *(",".join(map(str, s)) for s in usual)]
    rows, refused = {}, []
    for shape in shapes or default:
        try:
            sizes = parallel.mesh_sizes(shape, num_chips)
            if sizes not in rows:
                rows[sizes] = _describe(config, parallel.abstract_mesh(sizes, platform), chip)
        except UserError as error:
            refused.append(f"{shape}: {error}")
    if not rows or shapes and refused:
        raise UserError("a mesh is not possible: " + "; ".join(refused))
    best_first = sorted(rows.values(), key=lambda row: (not row["fits"], row["projection"]["seconds"]))
    return {"chip": chip._asdict() | {"flops": chip.flops}, "meshes": best_first, "refused": refused}


def _describe(config: Config, mesh: parallel.AnyMesh, chip: parallel.Chip) -> dict[str, Any]:
    """The Plan on a mesh, and its projection on a chip."""
    plan, remat = step_cost.make_plan(with_mesh_vocabulary(config, mesh), mesh), config.train.remat
    limits = step_cost.roofline(plan, chip, remat)
    mfu = step_cost.projected_mfu(plan, chip, remat)
    return dataclasses.asdict(plan) | {
        "memory": plan.memory,
        "fits": plan.memory <= USABLE_MEMORY * chip.memory,
        "projection": limits._asdict() | {"seconds": limits.seconds, "bound": limits.bound, "mfu": mfu},
    }


def mesh_of_row(row: dict[str, Any]) -> str:
    """The mesh of a row of `compare_meshes`, in the form of train.mesh."""
    return parallel.mesh_name(tuple(row["mesh"].values()))


def comparison_table(comparison: dict[str, Any], config: Config, title: str, num_chips: int) -> str:
    """The result of `compare_meshes` as a printable table."""
    best, chip = comparison["meshes"][0], comparison["chip"]
    lines = [
        f"{title}: {num_chips} x {chip['kind']}, "
        f"{chip['memory'] / GIB:.1f} GiB and {chip['flops'] / 1e12:.0f} TFLOP/s each",
        f"{format_count(best['parameters'])} parameters"
        + (f", {format_count(best['active'])} active" if best["active"] < best["parameters"] else "")
        + f", {best['tokens']:,} tokens per step, "
        f"{format_count(best['flops_per_token'])} FLOPs per token",
        "",
        "Memory in GiB per chip; least seconds per step (a projection, not a measurement)",
        f"{'mesh':>10} {'weights':>8} {'optimizer':>9} {'gradients':>9} {'activations':>11} "
        f"{'total':>7} {'of chip':>7}  {'compute':>8} {'memory':>8} {'network':>8}  MFU at most",
        *(_table_row(row, chip) for row in comparison["meshes"]),
        *(f"not possible: {line}" for line in comparison["refused"]),
        "",
        f"take --config.train.mesh={mesh_of_row(best)}"
        if best["fits"]
        else "nothing fits: use more chips, --config.train.remat=blocks, a smaller batch or --config.train.accumulate",
        "a chip receives per step: "
        + (", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in best["collectives"].items()) or "nothing"),
        f"cache of keys and values, to generate a batch: {best['cache'] / GIB:.2f} GiB per chip",
    ]
    if config.model.reads_source:
        lines.append(f"assumed: sources and targets of {config.model.context} tokens each")
    if not chip["topologies"] and num_chips > 8:
        lines.append("the network's time is for GPUs joined by NVLink; a network between nodes is slower")
    return "\n".join(lines)


def _table_row(row: dict[str, Any], chip: dict[str, Any]) -> str:
    p = row["projection"]
    verdict = f"{p['mfu']:.0%} ({p['bound']} bound)" if row["fits"] else "does not fit"
    return (
        f"{mesh_of_row(row):>10} {row['weights'] / GIB:8.2f} {row['optimizer'] / GIB:9.2f} "
        f"{row['gradients'] / GIB:9.2f} {row['activations'] / GIB:11.2f} {row['memory'] / GIB:7.2f} "
        f"{row['memory'] / chip['memory']:7.0%}  {p['compute']:8.3f} {p['memory']:8.3f} {p['network']:8.3f}  {verdict}"
    )


def compiler_line(row: dict[str, Any], chip: parallel.Chip) -> str:
    """The memory that the compiler reports (row["compiler"] of `compile_for_topology`), and the estimate."""
    c = row["compiler"]
    return (
        f"the compiler reserves {c['reserved'] / GIB:.2f} GiB per chip "
        f"({c['reserved'] / chip.memory:.0%}): {c['arguments'] / GIB:.2f} for weights, optimizer "
        f"and batch, {c['temporary'] / GIB:.2f} for the rest; at most {c['live'] / GIB:.2f} GiB are in "
        f"use at once. The estimate differs from this maximum by {row['memory'] / c['live'] - 1:+.1%}"
    )
