"""Pretrain a decoder-only Transformer on a corpus.

    python -m experiments.pretrain                                  # the main job
    python -m experiments.pretrain --config=gpt2_124m --workdir=runs/gpt2
    python -m experiments.pretrain --config.model.dim=384 --config.train.steps=800 --workdir=runs/x
    python -m experiments.pretrain --config.model.init_from=SOURCE --workdir=runs/y
    python -m experiments.pretrain --config.data.train='web=text:web/*.jsonl; code=text:code/*.jsonl' \\
        --config.data.mixture='0: web=0.8,code=0.2; 800: web=0.5,code=0.5' --config.train.steps=1000 --workdir=runs/z

The same command resumes. SOURCE, a model to continue from, is a workdir, a directory of Transformers,
a hub name or a .gguf file. Exit status: 0 finished or stopped early; 2 a mistake of the user; 130
Ctrl-C and 143 SIGTERM: the state is saved, and the same command continues.

Several sources have names, and data.mixture their shares of the rows from each step on; without it, each source is
read as often as the others. --config.data.train=mixture:FILE reads both from a file, a source or a stage on each line.

On several hosts, run the command on each, with a shared workdir. JAX finds the other hosts on Cloud
TPU and under Slurm (srun) and Open MPI; elsewhere add --coordinator=HOST:PORT --processes=N
--process_id=I, with the address of process 0. If a process dies or hangs, the others print their
stacks and end with status 1, or by SIGABRT from JAX, within train.watchdog_seconds or
--heartbeat_seconds. The same command on any number of hosts continues.
"""

import os

from absl import flags

import nanoflax
from experiments.flags import launch, parsed_config
from experiments.hosts import define_hosts, join
from nanoflax import config as configs

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of the run, or gs://... or s3://...; empty: runs/NAME of the config")
flags.DEFINE_string("profile", "", "FROM:TO, steps whose trace is written to workdir/profile, such as 10:12")
define_hosts()
flags.DEFINE_bool(
    "restart_from_weights",
    False,
    "start a new run from the weights of the run in workdir; the old run is archived in workdir",
)


def main() -> int:
    config = parsed_config()
    workdir = FLAGS.workdir or os.path.join("runs", os.path.basename(FLAGS.config).removesuffix(".py"))
    join(config, restart_from_weights=FLAGS.restart_from_weights)
    run = nanoflax.pretrain(config, workdir, restart_from_weights=FLAGS.restart_from_weights, profile=FLAGS.profile)
    if run.signal:
        return 128 + run.signal
    if nanoflax.parallel.is_main_process():
        print(f'sample it:  python -m experiments.sample --workdir={workdir} --prompt="The function returns"')
    return 0


if __name__ == "__main__":
    launch(main, "pydocs_tiny", data=configs.TextData)
