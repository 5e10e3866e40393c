"""Between nanoflax and the Hugging Face world, in both directions.

    python -m experiments.convert --from=runs/pydocs_tiny --to=exported      # AutoModel opens it
    python -m experiments.convert --from=SmolLM2.gguf --to=runs/smollm2      # sample --workdir= too
    python -m experiments.convert --from=owner/name --to=runs/x --dtype=float32

--from is a run's workdir, a directory of Transformers, a name on the hub or a .gguf file. From a
run, --to becomes a directory of Transformers; from anything else, a workdir. A table of what was
mapped is printed.
"""

import os

from absl import flags

from experiments.flags import launch
from nanoflax import config as configs
from nanoflax import runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("from", None, "workdir, Transformers directory, hub name or .gguf", required=True)
flags.DEFINE_string("to", None, "directory to write; must not exist or be empty", required=True)
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the weights written; default: as they are")
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which one of a run")
flags.DEFINE_bool("to_transformers", False, "write a Transformers directory whatever --from is")


def main():
    source, target = FLAGS["from"].value, FLAGS.to
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"--to={target} exists and is not an empty directory; choose another")
    runs.setup_jax()

    import jax

    from nanoflax import hf, report

    model, params, tokenizer = runs.open_model(source, FLAGS.checkpoint)
    if FLAGS.dtype:
        params = jax.tree.map(lambda x: x.astype(FLAGS.dtype), params)
    if runs.is_run(source) or FLAGS.to_transformers:
        family = hf.save(target, model.config, params, tokenizer, labels=labels_of(source))
        print_mapping(family, model.config, params)
        print(
            f"{target}: open it with transformers.AutoModel.from_pretrained, or "
            f"python -m experiments.sample --model={target}"
        )
    else:
        write_workdir(target, model.config, params, tokenizer)
        if source.endswith(".gguf"):
            print(report.parameter_table(params))
        else:
            print_mapping(hf.family_of_config(model.config), model.config, params)
        print(f"{target}: python -m experiments.sample --workdir={target}")
    return 0


def labels_of(source):
    """The class names of a run of finetune; of any other model ()."""
    if not runs.is_run(source):
        return ()
    source = runs.model_directory(source, FLAGS.checkpoint)
    config = runs.read_config(os.path.join(source, "config.json"))
    return (runs.read_labels(source, config) or ((), False))[0]


def print_mapping(family, config, params):
    """Their tensor, ours, shape and dtype of every row; blocks but the first are counted."""
    from flax import traverse_util

    from nanoflax import hf

    ours = traverse_util.flatten_dict(params, sep="/")
    rows = []
    for row in hf.tensor_mapping(family, config):
        names = " + ".join(path for path, _ in row.ours)
        if "block_" not in names or "block_0/" in names:
            rows.append((row.name, names, "x".join(map(str, row.shape)), str(ours[row.ours[0][0]].dtype)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, (*widths, 0))))
    print(f"{family.model_type}: {len(hf.tensor_mapping(family, config))} tensors; of the blocks, the first")


def write_workdir(workdir, config, params, tokenizer):
    """A run of no steps that holds imported weights."""
    from nanoflax import runs

    if tokenizer is None:
        raise UserError(f"--from={FLAGS['from'].value} has no tokenizer that nanoflax reads")
    run = configs.Config(model=config)
    os.makedirs(workdir, exist_ok=True)
    with runs.Checkpoints(os.path.join(workdir, "checkpoints")) as saves:
        saves.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint, "step": 0})
    runs.write_run(workdir, run, tokenizer)


if __name__ == "__main__":
    launch(main)
