"""Coverage-guided fuzzing of every parser of bytes that a stranger may have written.

    python -m tests.campaign.fuzz --runs=1000000 [--target=NAME] [--seconds=N] [--keep=DIRECTORY]

A target opens a directory of files. It may raise UserError, of one line; anything else is a finding: another exception,
more than 5 s of processor time, 2 GB or a crash, a file opened outside the directory or for writing, a program or
connection started. Needs atheris (pip install "nanoflax[fuzz]"). Each target runs in a process of its own. Exits 1 if
there is a finding.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable

from nanoflax.errors import UserError
from tests.campaign import Outcome, seeds
from tests.campaign.mutation import mutate, pack, unpack

MAX_SECONDS, MAX_BYTES = 5, 2**31
FORGET = 2_000  # inputs: JAX keeps what it traced of each
MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None
TEXTS = ["", "Hello world 12", " é日▁\n😀</s><0x0A>", "<|im_end|> a"]
CHAT = [{"role": "user", "content": "2+2?</s>"}, {"role": "assistant", "content": "4 <|im_end|>"}]


@dataclasses.dataclass(frozen=True)
class Target:
    """open(directory) reads the files of a seed, which are mutated. seeds() -> list of {name: bytes}."""

    open: Callable[[pathlib.Path], None]
    seeds: Callable[[], list[dict[str, bytes]]]


def ignore_refusal(function, *args, **kwargs):
    """The result, or None for a UserError of one line that can be printed."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        text = str(error)
        assert len(text) < 10_000 and not re.search("[\x00-\x1f\x7f-\x9f]", text), (
            f"not one line to print: {text[:300]!r}"
        )
        return None


def read_tensors(tensors):
    for tensor in (tensors or {}).values():
        ignore_refusal(tensor.read)
        ignore_refusal(tensor.read, (slice(0, 1),) * len(tensor.shape))


def open_safetensors(directory):
    from nanoflax.hf import safetensors_io

    read_tensors(ignore_refusal(safetensors_io.open_safetensors, directory))


def open_mxfp4(directory):
    from nanoflax.hf import mxfp4, safetensors_io

    if (tensors := ignore_refusal(safetensors_io.open_safetensors, directory)) is not None:
        settings = {"quantization_config": {"quant_method": "mxfp4"}}
        read_tensors(ignore_refusal(mxfp4.unpack, settings, tensors, directory))


def open_gguf(directory):
    from nanoflax import hf, tokenizers
    from nanoflax.hf import gguf_models

    path = directory / "model.gguf"
    if found := ignore_refusal(hf.open_gguf, path):
        read_tensors(found[1])
        use_tokenizer(ignore_refusal(tokenizers.from_gguf, found[0]))
        ignore_refusal(gguf_models.open_gguf_model, path)


def open_config(directory):
    from nanoflax import hf

    ignore_refusal(hf.load_config, directory)


def open_model(directory):
    from nanoflax import hf

    ignore_refusal(hf.load, directory)


def open_adapter(directory):
    from nanoflax import hf

    config, params = seeds.base()
    ignore_refusal(hf.base_of_adapter, directory)
    if (adapted := ignore_refusal(hf.adapted_config, directory, config)) is not None:
        ignore_refusal(hf.load_adapter, directory, adapted, params)


def open_tokenizer(directory):
    from nanoflax import tokenizers

    use_tokenizer(ignore_refusal(tokenizers.load, directory))


def open_model_file(directory):
    from nanoflax import tokenizers

    use_tokenizer(ignore_refusal(tokenizers.load, directory / "x.model"))


def use_tokenizer(tokenizer):
    from nanoflax import tokenizers

    if tokenizer is None:
        return
    for text in TEXTS:
        for encode in (tokenizer.encode, tokenizer.encode_source, tokenizer.encode_target):
            if (ids := ignore_refusal(encode, text)) is not None:
                ignore_refusal(tokenizer.decode, ids)
                assert all(0 <= i < tokenizer.vocab_size for i in ids), "an id outside the vocabulary"
    ignore_refusal(tokenizer.decode, range(min(tokenizer.vocab_size, 300)))
    tokenizer.framing.document(tokenizer.framing.whole([0]))
    if ignore_refusal(tokenizers.stop_ids, tokenizer) is not None:
        ignore_refusal(tokenizers.chat_ids, tokenizer, CHAT)
        ignore_refusal(tokenizers.chat_prompt, tokenizer, CHAT[:1], [{"name": "f"}])


def open_template(directory):
    import datetime

    from nanoflax.tokenizers import chat_template

    template = (directory / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "add_generation_prompt": True}
    specials = {"</s>": "|1|", "<|im_end|>": "|2|", "<s>": "|3|"}
    ignore_refusal(chat_template.render, template, CHAT, variables, specials)
    ignore_refusal(chat_template.with_date, template, datetime.datetime(2001, 2, 3))


def examples(scheme, *names):
    """A function that opens task data as one kind of examples, which their bytes choose."""

    def open_(directory):
        from nanoflax import data, tasks

        path = ",".join(f"{directory}/{name}" for name in names)
        kinds = (tasks.Classification, tasks.Tagging, tasks.Pair, tasks.Chat, tasks.Text, tasks.Preference)
        chosen = zlib.crc32((directory / names[0]).read_bytes())
        ignore_refusal(tasks.load, f"{scheme}:{path}", kinds[chosen % len(kinds)])
        if scheme == "jsonl" and chosen % 7 == 0:
            ignore_refusal(lambda: list(data.documents(f"text:{path}")))

    return open_


def open_text(directory):
    from nanoflax import data

    for split in ("train", "validation"):
        ignore_refusal(lambda split=split: list(data.documents(f"text:{directory}/x.*", split)))


def open_manifest(directory):
    from nanoflax.runs import manifest

    ignore_refusal(manifest.find_damage, directory)
    ignore_refusal(manifest.read_metric, directory)


def open_checkpoint(directory):
    from nanoflax.runs import checkpoint

    ignore_refusal(checkpoint.read_metadata, directory, log=lambda line: None)
    ignore_refusal(checkpoint.restore_params, directory, log=lambda line: None)


def open_run(directory):
    from nanoflax import report
    from nanoflax.runs import directory as runs

    ignore_refusal(runs.read_run, directory)
    ignore_refusal(report.read_metrics, directory / "metrics.jsonl")


TARGETS = {
    "safetensors": Target(open_safetensors, seeds.safetensors),
    "index": Target(open_safetensors, seeds.shards),
    "mxfp4": Target(open_mxfp4, seeds.mxfp4),
    "gguf": Target(open_gguf, seeds.gguf),
    "config": Target(open_config, seeds.configs),
    "model": Target(open_model, seeds.configs),
    "adapter": Target(open_adapter, seeds.adapters),
    "tokenizer_json": Target(open_tokenizer, seeds.tokenizer_json),
    "vocabularies": Target(open_tokenizer, seeds.vocabularies),
    "sentencepiece": Target(open_model_file, seeds.sentencepiece),
    "template": Target(open_template, seeds.templates),
    "jsonl": Target(examples("jsonl", "x.jsonl"), seeds.jsonl),
    "csv": Target(examples("csv", "x.csv"), seeds.tables),
    "tsv": Target(examples("tsv", "x.csv"), seeds.tables),
    "conll": Target(examples("conll", "x.conll"), seeds.conll),
    "pairs": Target(examples("pairs", "x.en", "x.fr"), seeds.pairs),
    "text": Target(open_text, seeds.texts),
    "manifest": Target(open_manifest, seeds.manifests),
    "checkpoint": Target(open_checkpoint, seeds.checkpoints),
    "run": Target(open_run, seeds.runs),
}


# The process of one target.

FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|remove|rename|rmdir|mkdir|link|symlink|truncate|chmod|chown|kill)"
    r"|subprocess\.Popen|pty\.spawn|socket\.(connect|bind|getaddrinfo|sendto)"
    r"|pickle\.find_class|ctypes\.dlopen|shutil\.\w+"
    r"|webbrowser\.open|ftplib\.connect|urllib\.Request"
)


class Watch:
    """Notes what Python does besides reading the files in a directory."""

    def __init__(self, directory):
        code = str(pathlib.Path(__file__).parents[2])  # read for tracebacks
        self.allowed = (str(directory), sys.prefix, sys.base_prefix, code)
        self.is_on, self.seen = False, []
        # The files are the harness's own, and no links: where a path leads does not change.
        self.real = functools.lru_cache(10_000)(os.path.realpath)
        self.is_forbidden = functools.cache(FORBIDDEN.fullmatch)
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if not self.is_on:
            return
        if (
            event == "subprocess.Popen"
            and "template_process.py" in str(args)
            or event == "open"
            and args[0] == "/dev/null"
        ):
            return  # the process of chat templates
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int):
                return
            real = self.real(os.fsdecode(path))
            writes = (
                isinstance(mode, str) and set(mode) & set("wax+") or mode is None and flags & (os.O_WRONLY | os.O_RDWR)
            )
            if writes or not real.startswith(self.allowed) and not real.startswith(("/proc/", "/sys/")):
                self.seen.append(f"open {path!r} {mode!r}")
        elif self.is_forbidden(event):
            self.seen.append(f"{event} {str(args)[:100]}")


def share_threads():
    """orbax opens each file in a thread of a new event loop: here one pool serves all loops."""
    pool, run = concurrent.futures.ThreadPoolExecutor(32), asyncio.BaseEventLoop.run_in_executor
    asyncio.BaseEventLoop.run_in_executor = lambda loop, executor, *call: run(loop, executor or pool, *call)


def child(name, results, corpus, scratch, arguments):
    """Fuzz one target; does not return. Findings are written to the directory `results`."""
    import atheris

    target, results = TARGETS[name], pathlib.Path(results)
    directory = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    os.chdir(directory)
    inputs = [path.read_bytes() for path in pathlib.Path(corpus).iterdir()]
    names = {name for data in inputs for name in unpack(data)}
    paths = {name: str(directory / name) for name in names}
    for path in paths.values():
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    watch, found, on_disk, number = Watch(directory), {}, {}, itertools.count(1)

    def keep(kind, data):
        if kind not in found:
            found[kind] = 0
            path = results / f"finding-{hashlib.sha1(kind.encode()).hexdigest()[:10]}"
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(kind)
        found[kind] += 1

    def one(data):
        files = unpack(data)
        if not files or not files.keys() <= names:
            return
        for path in on_disk.keys() - files.keys():
            os.unlink(paths[path])
            del on_disk[path]
        for path, content in files.items():
            if on_disk.get(path) != content:
                with open(paths[path], "wb", buffering=0) as file:
                    file.write(content)
                on_disk[path] = content
        if next(number) % FORGET == 0 and "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        watch.is_on, begin = True, time.process_time()
        try:
            target.open(directory)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            watch.is_on = False
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/nanoflax/" in f.filename] or [None]
            where = f"{frames[-1].filename.rpartition('/nanoflax/')[2]}:{frames[-1].lineno}" if frames[-1] else ""
            what = re.sub(r"0x\w+|[0-9]+|'.*'|\".*\"", "#", str(error).split("\n")[0])[:100]
            keep(f"{type(error).__name__} {where} {what}", data)
        finally:
            watch.is_on = False
        if time.process_time() - begin > MAX_SECONDS:  # once more, as Python collects JAX's objects now and then
            begin = time.process_time()
            with contextlib.suppress(Exception):
                target.open(directory)
            if time.process_time() - begin > MAX_SECONDS:
                keep(f"slow: more than {MAX_SECONDS} s", data)
        for event in watch.seen:
            keep(re.sub("[0-9a-f]{6,}|[0-9]+", "#", event)[:100], data)
        watch.seen.clear()

    share_threads()
    for data in inputs:  # imports what the target needs, before memory is limited
        one(data)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
    gc.collect()
    gc.freeze()  # JAX has a million objects: a search for garbage among them takes longer than an input
    atheris.Setup([name, *arguments], one, custom_mutator=mutate)
    atheris.Fuzz()


CHILD = """
import sys, atheris
with atheris.instrument_imports(include=["nanoflax"]):
    from nanoflax import data, hf, report, tasks, tokenizers
    from nanoflax.hf import gguf, safetensors_io
    from nanoflax.runs import checkpoint, directory, manifest
    from nanoflax.tokenizers import chat_template
    from tests.campaign import fuzz
fuzz.child(*sys.argv[1:5], sys.argv[5:])
"""


def fuzz(name, runs, seconds, seed, keep):
    """(inputs, seconds of processor time, findings) of a target. seconds: at most, of a clock."""
    keep = pathlib.Path(keep).absolute() / name
    corpus, fresh = keep / "corpus", keep / "seeds"
    shutil.rmtree(fresh, ignore_errors=True)
    for path in (corpus, fresh):
        path.mkdir(parents=True, exist_ok=True)
    for i, files in enumerate(TARGETS[name].seeds()):
        (fresh / str(i)).write_bytes(pack(files))
    done, begin, used = 0, time.monotonic(), _children_seconds()
    left = lambda: seconds - (time.monotonic() - begin)
    scratch = tempfile.TemporaryDirectory(prefix="nanoflax-fuzz-", dir=MEMORY_DISK)  # a disk takes ten times as long
    while done < runs and left() > 1:
        command = [sys.executable, "-c", CHILD, name, str(keep), str(fresh), scratch.name, str(corpus), str(fresh),
                   f"-runs={runs - done}", f"-max_total_time={int(left())}", f"-timeout={120 * MAX_SECONDS}",
                   "-max_len=400000", "-rss_limit_mb=8000", "-print_final_stats=1", "-reload=0",
                   f"-seed={seed + done + 1}", f"-artifact_prefix={keep}/finding-", "-verbosity=1"]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        (keep / "log.txt").write_text(ended.stderr)
        executed = re.search(r"number_of_executed_units: (\d+)", ended.stderr)
        done += int(executed[1]) if executed else 0
        if ended.returncode == 0 and executed:
            break
        last = re.findall(r"==\d+== ?(ERROR.*|.*deadly.*)", ended.stderr) or [ended.stderr[-500:]]
        print(f"{name}: the process ended with {ended.returncode}: {last[0]}", file=sys.stderr)
        said = re.split(r"(?m)^#\d+\t.*\n", ended.stderr)[-1]  # after libFuzzer's last line of progress
        (keep / f"finding-end-{done}.txt").write_text(said[:3000])
        if not executed:
            break
    scratch.cleanup()
    return done, _children_seconds() - used, sorted(path.read_text()[:300] for path in keep.glob("finding-*.txt"))


def _children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    """The part of `python -m tests.campaign`: an equal share of the time for every target, or for some, 20 s each."""
    names = rng.sample([*TARGETS], min(len(TARGETS), int(budget_seconds / 20) or 1))
    with tempfile.TemporaryDirectory(prefix="nanoflax-fuzz-", dir=MEMORY_DISK) as keep:
        share, seed = max(20, int(budget_seconds / len(names))), rng.randrange(2**30)
        found = {name: fuzz(name, 10**9, share, seed, keep) for name in names}
    return [Outcome(name, inputs, findings) for name, (inputs, _, findings) in found.items()]


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=86_400)
    parser.add_argument("--target", choices=[*TARGETS], action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="a directory for inputs and findings")
    options = parser.parse_args(arguments)
    total = 0
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="nanoflax-fuzz-", dir=MEMORY_DISK)
        keep = options.keep or stack.enter_context(temporary)
        print(f"{'target':16}{'inputs':>12}{'CPU s':>10}{'a second':>10}  findings")
        for name in options.target or TARGETS:
            done, seconds, findings = fuzz(name, options.runs, options.seconds, options.seed, keep)
            print(f"{name:16}{done:12,}{seconds:10.0f}{done / seconds:10.0f}  {len(findings) or 'none'}", flush=True)
            for finding in findings:
                print(f"    {finding}", flush=True)
            total += len(findings)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
