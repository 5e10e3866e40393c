"""Flags of the programs that read a model: a run, with a choice of its checkpoint, or a published model."""

from absl import flags

import nanoflax
from nanoflax import config as configs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags are those of the program, so --help lists them


def define_source() -> None:
    """Define --workdir, --model, --checkpoint, --quantize, --cache_dtype and --mesh."""
    flags.DEFINE_string("workdir", "", "directory of a run, or gs://... or s3://...")
    flags.DEFINE_string("model", "", "instead of --workdir: a directory of Transformers, a hub name or a .gguf file")
    flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "checkpoint of the run")
    flags.DEFINE_enum(
        "quantize", "", [*configs.QUANTIZE], "matrices in 8 or 4 bits; file: as in a .gguf file; empty: as floats"
    )
    flags.DEFINE_enum("cache_dtype", "", [*configs.CACHE_DTYPES], "int8: keys and values of generated text in 8 bits")
    flags.DEFINE_string("mesh", "", "DATA,FSDP,TENSOR: split the parameters over all devices, as 1,1,-1; empty: on one")


def check_source() -> None:
    """Raises: UserError unless the flags name one of a run and a model."""
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir, of a run, or --model, of a published model")
    if FLAGS.model and FLAGS["checkpoint"].present:
        raise UserError(f"--checkpoint={FLAGS.checkpoint} is of a run, so it needs --workdir, not --model")
    if FLAGS.workdir and not nanoflax.runs.is_run(FLAGS.workdir):
        raise UserError(f"--workdir={FLAGS.workdir} holds no run (no checkpoints/); for a published model give --model")


def open_source():
    """The run or model of the flags."""
    placed = dict(quantize=FLAGS.quantize, cache_dtype=FLAGS.cache_dtype, mesh=FLAGS.mesh)
    return nanoflax.open(FLAGS.workdir or FLAGS.model, FLAGS.checkpoint, **placed)
