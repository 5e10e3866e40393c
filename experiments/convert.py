"""Converts models between nanoflax and Hugging Face, in both directions.

    python -m experiments.convert --from=runs/pydocs_tiny --to=exported      # for AutoModel
    python -m experiments.convert --from=SmolLM2.gguf --to=runs/smollm2      # for sample --workdir=runs/smollm2
    python -m experiments.convert --from=owner/name --to=runs/x --dtype=float32
    python -m experiments.convert --from=runs/chat --to=chat.gguf --gguf_type=Q8_0  # for llama.cpp

--from is a run's workdir, a directory of Transformers, a hub name or a .gguf file. If --to ends in .gguf, it becomes
such a file, with the tokenizer and chat template. Else, if --from is a run, --to becomes a directory of Transformers;
otherwise --to becomes a run's workdir. The program prints a table of the converted tensors.
"""

import os
import time

from absl import flags

import nanoflax
from experiments.flags import launch
from nanoflax import hf, report, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("from", None, "workdir, Transformers directory, hub name or .gguf", required=True)
flags.DEFINE_string("to", None, "directory to write, which must not exist or be empty; or a .gguf file", required=True)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "dtype of the weights in --to; default: unchanged")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "checkpoint of the run")
flags.DEFINE_enum("gguf_type", None, [*hf.GGUF_TYPES], "type of the matrices in a .gguf file; default: F16")
flags.DEFINE_bool("to_transformers", False, "write a Transformers directory whatever --from is")


def main():
    source, target = FLAGS["from"].value, FLAGS.to
    if target.endswith(".gguf"):
        return write_gguf(source, target)
    if FLAGS.gguf_type:
        raise UserError(f"--gguf_type={FLAGS.gguf_type} is for a file, but --to={target} does not end in .gguf")
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"--to={target} exists and is not an empty directory; choose another")
    runs.setup_jax()
    run = nanoflax.open(source, FLAGS.checkpoint, FLAGS.dtype)
    to_transformers = run.workdir or FLAGS.to_transformers
    with runs.filled_directory(target) as part:
        (run.save_pretrained if to_transformers else run.save_run)(part)
    if to_transformers:
        print_mapping(run)
        print(
            f"{target}: open it with transformers.AutoModel.from_pretrained, or "
            f"python -m experiments.sample --model={target}"
        )
    else:
        if source.endswith(".gguf"):
            print(report.parameter_table(run.params))
        else:
            print_mapping(run)
        print(f"{target}: python -m experiments.sample --workdir={target}")


def write_gguf(source, target):
    """Write a .gguf file, and print its size and how fast it was written."""
    if os.path.exists(target):
        raise UserError(f"--to={target} exists; choose another name or remove it")
    if FLAGS.dtype or FLAGS.to_transformers:
        raise UserError(f"--dtype and --to_transformers do not go with --to={target}; --gguf_type decides its numbers")
    runs.setup_jax()
    run = nanoflax.open(source, FLAGS.checkpoint)
    run.params  # noqa: B018 (read before the clock starts)
    start = time.perf_counter()
    done = run.save_gguf(target, FLAGS.gguf_type or "F16")
    seconds = time.perf_counter() - start
    counts = " + ".join(f"{count} {kind}" for kind, count in sorted(done.tensors.items()))
    size = done.nbytes / 1e6
    print(f"{target}: {done.architecture}, {counts} tensors")
    print(f"{size:,.1f} MB in {seconds:.1f} s, {size / seconds:,.0f} MB/s")
    print(f"open it with llama.cpp, or python -m experiments.sample --model={target}")


def print_mapping(run):
    """Print a line for each tensor: its name in Transformers, our name, shape, dtype. Only block 0 is listed."""
    from flax import traverse_util

    config, ours = run.model.config, traverse_util.flatten_dict(run.params, sep="/")
    family = hf.family_of_config(config)
    mapping, lines = hf.tensor_mapping(family, config), []
    for row in mapping:
        names = " + ".join(row.paths)
        if "block_" not in names or "block_0/" in names:
            lines.append((row.name, names, "x".join(map(str, row.shape)), str(ours[row.paths[0]].dtype)))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, (*widths, 0), strict=True)))
    print(f"{family.model_type}: {len(mapping)} tensors; only the first block is listed")


if __name__ == "__main__":
    launch(main)
