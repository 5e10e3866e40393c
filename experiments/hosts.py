"""Flags for training with several processes; connects the processes."""

from typing import Any

from absl import flags

import nanoflax
from nanoflax import config as configs

FLAGS = flags.FLAGS


def define_hosts() -> None:
    """Define the flags that `join` reads."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, if several processes train together. Not needed on Cloud TPU or under Slurm or Open "
        "MPI.",
    )
    flags.DEFINE_integer("processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("join_seconds", 300, "Longest time in seconds until all processes have started.", 1)
    flags.DEFINE_integer("heartbeat_seconds", 50, "Seconds of silence after which a process counts as dead.", 1)


def join(config: configs.Config, **others: Any) -> None:
    """Connect the processes of a run, if there are several. All must have the same Config and `others`.

    Raises: UserError if processes are missing or their settings differ, before anything is compiled.
    """
    nanoflax.parallel.join_processes(
        FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, FLAGS.join_seconds, FLAGS.heartbeat_seconds
    )
    values = configs.to_dict(config)
    for name in ("workers", "cache"):  # may differ between machines
        values["data"].pop(name, None)
    nanoflax.parallel.check_processes_agree("their configurations", {"config": values} | others)
