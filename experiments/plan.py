"""What a training run needs, before a machine is rented: memory, work, traffic and time at best.

    python -m experiments.plan --config=llama_8b --topology=v5e:16x16
    python -m experiments.plan --config=gpt2_124m --devices=8 --chip=h100 --meshes=1,8,1

Nothing is trained, and no accelerator is needed. With libtpu (pip install -e '.[tpu-plan]') the
step is compiled for the TPU slice on the best mesh, in some minutes, and the compiler's own memory
stands beside the estimate; --nocompile leaves that out. Exit status: 0, or 2 for something to put
right.
"""

import dataclasses
import importlib.util
import json
import os

from absl import flags

from experiments.flags import launch, parsed_config
from nanoflax import tokenizers
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
GPUS = ("a100", "h100", "h200")
ROOM = 0.8  # of a chip: the TPU compiler was seen to reserve 1.22 times the estimate
flags.DEFINE_string("topology", "", "a TPU slice, such as v5e:16x16")
flags.DEFINE_integer("devices", 0, "or so many GPUs", 0)
flags.DEFINE_enum("chip", "h100", GPUS, "of --devices")
flags.DEFINE_multi_string(
    "meshes",
    [],
    "sizes along data,fsdp,tensor[,context], once for each; none means that of the config and the usual ones",
)
flags.DEFINE_string("json", "", "file to write the plan into")
flags.DEFINE_bool("compile", True, "ask the TPU compiler too, where it is installed")


def main():
    config = resolved(parsed_config())
    # Set before JAX starts: no chip is opened, and other processes may be using libtpu too.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from nanoflax import parallel, planning
    from nanoflax.planning import step_cost

    if bool(FLAGS.topology) == bool(FLAGS.devices):
        raise UserError("plan needs one of --topology=v5e:16x16 and --devices=8")
    chip, count = parallel.tpu_slice(FLAGS.topology) if FLAGS.topology else (parallel.CHIPS[FLAGS.chip], FLAGS.devices)
    shapes = FLAGS.meshes or [
        config.train.mesh,
        *(",".join(map(str, s)) for s in planning.candidate_meshes(count, config.model.dim)),
    ]
    rows, refused, seen = [], [], set()
    if FLAGS.json:
        write(FLAGS.json)  # refuses what cannot be written, before minutes of work

    def on(mesh):  # with the vocabulary that a run there has
        return dataclasses.replace(config, model=parallel.pad_vocabulary(config.model, mesh))

    for shape in shapes:
        try:
            size = parallel.mesh_sizes(shape, count)
            if size in seen:
                continue
            seen.add(size)
            mesh = parallel.abstract_mesh(size, "tpu" if FLAGS.topology else "gpu")
            rows.append(report(step_cost, on(mesh), mesh, chip))
        except UserError as error:
            refused.append(f"{shape}: {error}")
    if not rows or FLAGS.meshes and refused:
        raise UserError("no plan for the mesh " + "; ".join(refused))
    rows.sort(key=lambda row: (not row["fits"], row["projection"]["seconds"]))
    found = {
        "config": FLAGS.config,
        "machine": FLAGS.topology or f"{FLAGS.chip} x {count}",
        "chip": chip._asdict() | {"flops": chip.flops},
        "meshes": rows,
        "refused": refused,
    }
    print(text(found, config, count), flush=True)
    if FLAGS.json:
        write(FLAGS.json, found)
    if FLAGS.topology and FLAGS.compile and importlib.util.find_spec("libtpu"):
        best = rows[0]
        config = on(parallel.abstract_mesh(tuple(best["mesh"].values())))
        train = dataclasses.replace(config.train, mesh=mesh_name(best))
        print(f"compiling for {FLAGS.topology} ...", flush=True)
        best["compiler"] = planning.compile_for_topology(dataclasses.replace(config, train=train), FLAGS.topology)
        print(compiler_text(best, chip))
        if FLAGS.json:
            write(FLAGS.json, found)


def write(path, found=None):
    """A plan as JSON; without one only see that it could be written, and leave what is there."""
    try:
        with open(path, "w" if found else "a") as f:
            if found:
                json.dump(found, f, indent=1)
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from error


def resolved(config):
    """The Config as it will be on the accelerator: in bfloat16, with its vocabulary's size."""
    size, dtype = config.model.vocab_size, config.model.dtype
    if not size:
        kind, size = tokenizers.parse(config.data.tokenizer)
        if kind in ("bytes", "path"):
            size = tokenizers.load(config.data.tokenizer).vocab_size
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=size, dtype="bfloat16" if dtype == "auto" else dtype)
    )


def report(plan, config, mesh, chip):
    """A row for JSON: the Plan on a mesh, and what follows on a chip."""
    found = plan.make_plan(config, mesh)
    bounds = plan.roofline(found, chip, config.train.remat)
    return dataclasses.asdict(found) | {
        "memory": found.memory,
        "fits": found.memory <= ROOM * chip.memory,
        "projection": bounds._asdict()
        | {
            "seconds": bounds.seconds,
            "bound": bounds.bound,
            "mfu": plan.projected_mfu(found, chip, config.train.remat),
        },
    }


def mesh_name(row):
    from nanoflax import parallel

    return parallel.mesh_name(tuple(row["mesh"].values()))


def text(found, config, count):
    from nanoflax.report import format_count as short

    best, chip, gib = found["meshes"][0], found["chip"], 2**30
    lines = [
        f"{found['config']} on {found['machine']}: {count} x {chip['kind']}, "
        f"{chip['memory'] / gib:.1f} GiB and {chip['flops'] / 1e12:.0f} TFLOP/s each",
        f"{short(best['parameters'])} parameters, {best['tokens']:,} tokens a step, "
        f"{short(best['flops_per_token'])} FLOPs a token",
        "",
        "GiB a chip; seconds a step at least (a projection, not a measurement)",
        f"{'mesh':>10} {'weights':>8} {'optimizer':>9} {'gradients':>9} {'activations':>11} "
        f"{'total':>7} {'of chip':>7}  {'compute':>8} {'memory':>8} {'network':>8}  MFU at most",
    ]
    for row in found["meshes"]:
        p = row["projection"]
        lines.append(
            f"{mesh_name(row):>10} {row['weights'] / gib:8.2f} "
            f"{row['optimizer'] / gib:9.2f} {row['gradients'] / gib:9.2f} "
            f"{row['activations'] / gib:11.2f} {row['memory'] / gib:7.2f} "
            f"{row['memory'] / chip['memory']:7.0%}  {p['compute']:8.3f} {p['memory']:8.3f} "
            f"{p['network']:8.3f}  " + (f"{p['mfu']:.0%} ({p['bound']} bound)" if row["fits"] else "does not fit")
        )
    lines += [f"not possible: {line}" for line in found["refused"]]
    lines += [
        "",
        f"take --config.train.mesh={mesh_name(best)}"
        if best["fits"]
        else "nothing fits: more chips, --config.train.remat=blocks, a smaller batch or --config.train.accumulate",
        "a chip receives in a step: "
        + (", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in best["collectives"].items()) or "nothing"),
        f"keys and values, were the batch sampled: {best['cache'] / gib:.2f} GiB a chip",
    ]
    if config.model.reads_source:
        lines.append(f"sources and targets are both taken to be {config.model.context} tokens long")
    if not chip["topologies"] and count > 8:
        lines.append("the network's time is for GPUs joined by NVLink; between nodes it is slower")
    return "\n".join(lines)


def compiler_text(row, chip):
    c, gib = row["compiler"], 2**30
    return (
        f"the compiler reserves {c['reserved'] / gib:.2f} GiB a chip "
        f"({c['reserved'] / chip.memory:.0%}): {c['arguments'] / gib:.2f} of weights, optimizer "
        f"and batch, {c['temporary'] / gib:.2f} for the rest; at most {c['live'] / gib:.2f} are in "
        f"use at once. The estimate is {row['memory'] / c['live'] - 1:+.1%} of that"
    )


if __name__ == "__main__":
    launch(main, "gpt2_124m")
