"""Fine-tune a model for a task on examples: all parameters, or small adapters.

    python -m experiments.finetune --config=classify --workdir=runs/topics
    python -m experiments.finetune --config=classify --config.data.train=jsonl:train.jsonl \\
        --config.data.validation=jsonl:dev.jsonl --config.model.init_from=SOURCE \\
        --config.peft.kind=lora --workdir=runs/y

SOURCE is a workdir, a directory of Transformers, a hub name or a .gguf file; without SOURCE the model
is trained from scratch. The same command resumes. At the end the best step is measured on the
validation examples. The program prints a report and writes result.json, predictions.jsonl, the complete
model in final/ (with low-rank adapters merged), and adapter/ for the peft library if possible.
`evaluate --workdir=runs/y --data=jsonl:new.jsonl` measures new examples, `sample --workdir=runs/y
--prompt=TEXT` predicts, `convert` opens final/. Exit status and several hosts: see pretrain.
"""

import os

from absl import flags

import nanoflax
from experiments.flags import HERE, launch, parsed_config
from experiments.hosts import define_hosts, join
from nanoflax import config as configs

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "directory of the run, or gs://... or s3://...", required=True)
flags.DEFINE_string("profile", "", "FROM:TO, steps whose trace is written to workdir/profile, such as 10:12")
define_hosts()


def main() -> int:
    config = parsed_config()
    join(config)
    run = nanoflax.finetune(config=config, workdir=FLAGS.workdir, profile=FLAGS.profile)
    return 128 + run.signal if run.signal else 0


if __name__ == "__main__":
    launch(main, os.path.join(HERE, "configs", "classify.py"), data=configs.ExampleData)
