"""Estimates the memory, FLOPs, communication and minimum time of a training run before a machine is rented.

    python -m experiments.plan --config=llama_8b --topology=v5e:16x16
    python -m experiments.plan --config=gpt2_124m --devices=8 --chip=h100 --meshes=1,8,1

Nothing is trained, and no accelerator is needed. With libtpu (pip install -e '.[tpu-plan]') the
step is compiled for the TPU slice on the best mesh, in a few minutes, and the memory that the
compiler reserves is printed beside the estimate; --nocompile skips this. Exit status: 0, or 2 for a
mistake of the user.
"""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from absl import flags

from experiments.flags import launch, parsed_config, write_json
from nanoflax import config as configs
from nanoflax import parallel, planning
from nanoflax.config import Config
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", "", "A TPU slice, such as v5e:16x16.")
flags.DEFINE_integer("devices", 0, "Number of GPUs, instead of --topology.", 0)
flags.DEFINE_enum("chip", "h100", ["a100", "h100", "h200"], "Kind of GPU, for --devices.")
flags.DEFINE_multi_string(
    "meshes",
    [],
    "Sizes along data,fsdp,tensor[,context[,expert]]; may be repeated. Default: of the config and the usual ones.",
)
flags.DEFINE_string("json", "", "File that the plan is written to.")
flags.DEFINE_bool("compile", True, "Also compile for the TPU slice, if libtpu is installed.")


def main() -> None:
    # Set before JAX starts its backends, so that no chip is opened and other processes can use libtpu.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    config, _ = configs.with_recipe(planning.for_accelerator(parsed_config()))
    if bool(FLAGS.topology) == bool(FLAGS.devices):
        raise UserError("plan needs one of --topology=v5e:16x16 and --devices=8")
    chip, count = parallel.tpu_slice(FLAGS.topology) if FLAGS.topology else (parallel.CHIPS[FLAGS.chip], FLAGS.devices)
    write_json("json", FLAGS.json)
    machine = FLAGS.topology or f"{FLAGS.chip} x {count}"
    found = {"config": FLAGS.config, "machine": machine}
    found |= planning.compare_meshes(config, chip, count, FLAGS.meshes, "tpu" if FLAGS.topology else "gpu")
    print(planning.comparison_table(found, config, f"{FLAGS.config} on {machine}", count), flush=True)
    write_json("json", FLAGS.json, found)
    if FLAGS.topology and FLAGS.compile and importlib.util.find_spec("libtpu"):
        print(f"compiling for {FLAGS.topology} ...", flush=True)
        best = found["meshes"][0]
        best["compiler"] = planning.compile_for_topology(on_best_mesh(config, best), FLAGS.topology)
        print(planning.compiler_line(best, chip))
        write_json("json", FLAGS.json, found)


def on_best_mesh(config: Config, best: dict[str, Any]) -> Config:
    """The Config for the compiler: with the best mesh, and the vocabulary padded for this mesh."""
    config = planning.with_mesh_vocabulary(config, parallel.abstract_mesh(tuple(best["mesh"].values())))
    train = dataclasses.replace(config.train, mesh=planning.mesh_of_row(best))
    return dataclasses.replace(config, train=train)


if __name__ == "__main__":
    launch(main, "gpt2_124m")
