"""Flags of the programs that several processes run together, and how these processes join."""

from typing import Any

from absl import flags

from nanoflax import config as configs
from nanoflax import parallel

FLAGS = flags.FLAGS


def define_hosts() -> None:
    """Define the flags that `join` reads."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, where several processes train together. On Cloud TPU and under Slurm and Open MPI "
        "JAX finds it.",
    )
    flags.DEFINE_integer("processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("join_seconds", 300, "Seconds in which all processes must answer at the start.", 1)
    flags.DEFINE_integer("heartbeat_seconds", 50, "Seconds of silence after which a process counts as dead.", 1)


def join(config: configs.Config, **others: Any) -> None:
    """Join the processes of a run, if there are several. Their Configs, and `others`, must be equal.

    Raises: UserError if the processes do not find each other or differ, before anything is compiled.
    """
    parallel.join_processes(
        FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, FLAGS.join_seconds, FLAGS.heartbeat_seconds
    )
    values = configs.to_dict(config)
    for name in ("workers", "cache"):  # may differ between machines
        values["data"].pop(name, None)
    parallel.check_processes_agree("their configurations", {"config": values} | others)
