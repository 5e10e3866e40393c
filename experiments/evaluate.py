"""Measure a trained model on text: loss, perplexity and bits per byte, as one JSON object.

    python -m experiments.evaluate --workdir=runs/pydocs_tiny
    python -m experiments.evaluate --workdir=runs/pydocs_tiny --data='text:notes/*.md'
    python -m experiments.evaluate --workdir=runs/x --data=tfds:tiny_shakespeare --split=validation

Windows of the model's context are read side by side, each token predicted once.
"""

import json
import math

from absl import flags

from experiments import common

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run", required=True)
flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which of its checkpoints")
flags.DEFINE_string("data", "", "pydocs | text:GLOB | tfds:NAME[:FIELD]; empty is the run's own "
                    "validation split")
flags.DEFINE_enum("split", "all", ["all", "train", "validation"], "which part of --data")


def main():
    config, tokenizer = common.read_run(FLAGS.workdir)
    common.setup_jax()

    from nanoflax import data, sharding, train

    store = data.prepare(common.source_of(config.data, FLAGS.data), tokenizer,
                         FLAGS.split if FLAGS.data else "validation", config.data.cache or None)
    windows = data.Windows(store, config.model.context, config.data.packing == "isolated")
    model, params = common.restore_model(FLAGS.workdir, config, tokenizer, FLAGS.checkpoint)
    evaluate = train.make_evaluation(model, config, sharding.make_mesh("-1,1,1"))
    nats, tokens = evaluate(params, windows)
    print(json.dumps({
        "data": FLAGS.data or f"{config.data.train} (validation)",
        "loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / store.n_bytes,
        "documents": store.n_documents, "tokens": int(tokens), "bytes": store.n_bytes,
        "report": store.report}, indent=1))


if __name__ == "__main__":
    common.launch(main)
