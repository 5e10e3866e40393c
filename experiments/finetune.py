"""Teach a model a task from a file of examples, all of the model or a small adapter.

    python -m experiments.finetune --config=classify --workdir=runs/topics
    python -m experiments.finetune --config=classify --config.data.train=jsonl:train.jsonl \\
        --config.data.validation=jsonl:dev.jsonl --config.model.init_from=SOURCE \\
        --config.peft.kind=lora --workdir=runs/y

SOURCE is a workdir, a directory of Transformers, a name on the hub or a .gguf file; without one the
model is trained from scratch. The same command resumes. At the end the best step is measured on
the validation examples: a printed report, result.json, predictions.jsonl, and in final/ the
complete model, low-rank adapters merged (and beside it in adapter/, as the peft library reads them).
`evaluate --workdir=runs/y --data=jsonl:new.jsonl` gives the same for new examples, and
`sample --workdir=runs/y --prompt=TEXT` predicts; `convert` opens final/. Exit status, and several
hosts: as of pretrain.
"""

import os

from absl import flags

import nanoflax
from experiments.flags import HERE, launch, parsed_config
from experiments.hosts import define_hosts, join
from nanoflax import config as configs

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run", required=True)
define_hosts()


def main() -> int:
    config = parsed_config()
    join(config)
    run = nanoflax.finetune(config=config, workdir=FLAGS.workdir)
    return 128 + run.signal if run.signal else 0


if __name__ == "__main__":
    launch(main, os.path.join(HERE, "configs", "classify.py"), data=configs.ExampleData)
