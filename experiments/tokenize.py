"""Turns a source of text into token files, once, for many runs of pretrain.

    python -m experiments.tokenize --data='text:corpus/*.parquet' --tokenizer=bpe:32000 --out=tokens/corpus
    python -m experiments.pretrain --config.data.train=tokens:tokens/corpus
    python -m experiments.tokenize --out=tokens/corpus --check        # compares all files with their checksums

--out is a directory, or gs://BUCKET/... or s3://BUCKET/... It gets train/, validation/ and tokenizer/. Processes of
this machine do the work, or the machines of a cluster, by an engine of Apache Beam; all of them write the same bytes:

    python -m experiments.tokenize --data='text:gs://B/corpus/*.parquet' --out=gs://B/tokens --beam_runner=FlinkRunner \
        --beam_options='--flink_master=HOST:8081 --parallelism=64'

If the work is killed, the same command continues with the first shard that is missing; with --check it also builds
damaged shards again. Other settings are --config.data.NAME, as for experiments.pretrain.
"""

import dataclasses
import os
import resource
import sys
import time

from absl import flags

from experiments.flags import launch, parsed_config
from nanoflax import data, report, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "source of text, such as text:GLOB; default: config.data.train")
flags.DEFINE_string("tokenizer", None, "bytes, bpe:V, unigram:V, a .model file or directory; default: of the config")
flags.DEFINE_string("out", None, "directory of the token files, or gs://... or s3://...", required=True)
flags.DEFINE_integer("workers", None, "processes that tokenize; default: one per core", lower_bound=1)
flags.DEFINE_string("beam_runner", "", "engine of Beam that tokenizes: DirectRunner, DaskRunner, FlinkRunner, ...")
flags.DEFINE_string(
    "beam_options", "", "options of Beam, separated by spaces; --data and --out are read by its workers"
)
flags.DEFINE_bool("check", False, "compare the token files with their checksums")


def main():
    begin = time.monotonic()
    if FLAGS.check and FLAGS.data is None:
        stores = runs.check_stores(FLAGS.out)
        print_sizes(stores)
        print(f"all shards are as their checksums say, after {report.format_duration(time.monotonic() - begin)}")
        return
    config = parsed_config()
    given = {"train": FLAGS.data, "tokenizer": FLAGS.tokenizer, "workers": FLAGS.workers}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **given))
    print_sizes(runs.tokenize(config, FLAGS.out, FLAGS.check, beam_engine()))
    print(f"in {report.format_duration(time.monotonic() - begin)}; peak memory: {peak_memory()}")
    print(f"train on it:  python -m experiments.pretrain --config.data.train=tokens:{FLAGS.out}")


def beam_engine():
    """The engine of --beam_runner for a title, or None for processes of this machine."""
    if not FLAGS.beam_runner:
        if FLAGS.beam_options:
            raise UserError(
                f"--beam_options={FLAGS.beam_options} needs --beam_runner, such as --beam_runner=DirectRunner"
            )
        return None
    if FLAGS.workers:
        raise UserError("--workers is for processes of this machine; --beam_options say how many workers an engine has")
    data.beam_engine(FLAGS.beam_runner, FLAGS.beam_options)  # raises UserError before the tokenizer is trained
    return lambda title: data.beam_engine(FLAGS.beam_runner, FLAGS.beam_options, title)


def print_sizes(stores):
    for name, store in stores.items():
        counts = [
            f"{store.n_documents:,} documents",
            f"{report.format_bytes(store.n_bytes)} of text",
            f"{report.format_count(store.n_tokens)} tokens",
            f"{len(store.shards)} shards" if len(store.shards) > 1 else "1 shard",
        ]
        print(f"{name or FLAGS.out}: {', '.join(counts)}")
        for line in store.report:
            print(f"  {line}")


def peak_memory():
    """Of this process and of its largest worker, as text."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, worker = (resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    workers = FLAGS.workers or FLAGS["config.data.workers"].value or os.cpu_count()
    of_worker = f", and of each of {workers} workers at most {report.format_bytes(worker)}"
    return f"{report.format_bytes(own)}{of_worker if worker and not FLAGS.beam_runner else ' of this process'}"


if __name__ == "__main__":
    launch(main, "pydocs_tiny")
