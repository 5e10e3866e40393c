"""What the programs share: typed configuration flags, errors for people, opening a run."""

import contextlib
import dataclasses
import errno
import glob
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import traceback
import types
import typing

from absl import app, flags, logging

from nanoflax import config as configs
from nanoflax import distributed
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))


def launch(main, default_config=None, arguments=False):
    """Run a program: parse its flags, call main(), and turn what goes wrong into one line.

    default_config: the file of --config for a program that takes one; every leaf of it becomes a
    typed flag, such as --config.model.dim=256. arguments: the program takes words that are no
    flags, and finds them in FLAGS.arguments. Exit status: what main returns (0), 2 for anything
    the user can put right, 130 for Ctrl-C outside training, 1 for what is wrong in the program or
    with another process of the run.
    """
    def parse(argv):
        try:
            if default_config:
                path = config_path(argv)
                define_config(default_config if path is None else path)
            rest = FLAGS(argv)
            for name in ("workdir", "model", "from", "to", "out", "json", "prompt_file",
                         "candidates", "config.model.init_from", "config.data.cache"):
                if name in FLAGS and FLAGS[name].value:  # as a shell does not after "="
                    FLAGS[name].value = os.path.expanduser(FLAGS[name].value)
            if arguments:
                flags.DEFINE_multi_string("arguments", rest[1:], "", flag_values=FLAGS)
                FLAGS.arguments = rest[1:]
            elif len(rest) > 1:
                raise UserError(f"argument {rest[1]!r} is not understood; flags begin with --")
            return rest
        except (flags.Error, UserError) as error:
            fail(error)

    def guarded(_):
        try:
            sys.exit(main() or 0)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                fail(f"{error.filename or 'a file that is written'}: {error.strerror}")
            crash()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            distributed.leave(130)
        except Exception:
            crash()

    use_huge_pages()
    logging.set_verbosity(logging.WARNING)  # JAX tells there which backends it did not find
    app.run(guarded, flags_parser=parse)


def use_huge_pages():
    """On Linux, start the program again with huge pages for large arrays.

    glibc reads the setting at start alone. A training step on CPU otherwise takes 300,000 page
    faults, an eighth of its time.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def crash():
    traceback.print_exc()
    distributed.leave(1)


def fail(error):
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
    distributed.leave(2)


def config_path(argv):
    """The value of --config, read before the flags that its file defines can be."""
    found = None  # the last one, as of any flag
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        if re.match(r"--?config=", arg):
            found = arg.split("=", 1)[1]
        elif arg in ("--config", "-config"):
            found = following
    return found


def load_config(path):
    """The Config of a file's get_config(). A bare name is looked up in experiments/configs."""
    shipped = os.path.join(HERE, "configs", os.path.basename(path).removesuffix(".py") + ".py")
    where = path if os.path.isfile(path) else shipped
    if not os.path.isfile(where):
        known = sorted(f[:-3] for f in os.listdir(os.path.join(HERE, "configs"))
                       if f.endswith(".py") and not f.startswith("_"))
        raise UserError(f"--config={path} does not exist; shipped: {', '.join(known)}")
    if not where.endswith(".py"):
        raise UserError(f"--config={path} must be a Python file, named .py")
    spec = importlib.util.spec_from_file_location("nanoflax_user_config", where)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever is wrong in a person's own file
        raise UserError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, configs.Config):
        raise UserError(f"--config={path}: get_config() must return a nanoflax.config.Config, "
                        f"not {type(config).__name__}")
    return config


def define_config(path):
    """Define --config and a typed flag for every leaf of its file, with the file's values."""
    _define(flags.ArgumentParser(), "config", path, "file whose get_config() makes the Config")
    for name, kind, value in leaves(load_config(path), "config"):
        _define(_Leaf(kind), name, value, f"{configs.type_name(kind)} (nanoflax/config)")


def _define(parser, name, default, text):
    parser.syntactic_help = ""
    flags.DEFINE(parser, name, default, text, serializer=flags.ArgumentSerializer(),
                 module_name=sys.argv[0])


def parsed_config():
    """The Config after all flags, validated."""
    def fill(cls, prefix):
        values = {}
        for name, kind in typing.get_type_hints(cls).items():
            key = f"{prefix}.{name}"
            values[name] = (fill(kind, key) if dataclasses.is_dataclass(kind)
                            else FLAGS[key].value)
        return cls(**values)

    config = fill(configs.Config, "config")
    configs.validate(config)
    return config


def leaves(config, prefix):
    """(dotted name, type, value) of every leaf of a nested dataclass."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind):
            yield from leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", kind, value


class _Leaf(flags.ArgumentParser):
    """Reads text as the type of a configuration field; None is written none, a tuple 0,2,4."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def parse(self, text):
        try:
            return _read(self.kind, text) if isinstance(text, str) else text
        except (ValueError, KeyError) as error:
            raise ValueError(f"it must be {configs.type_name(self.kind)}") from error

    def flag_type(self):
        return configs.type_name(self.kind)


def _read(kind, text):
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(typing.get_args(kind)[0], part) for part in text.split(",") if text)
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    return kind(text)


def setup_jax():
    """Keep compiled programs between runs: a compile of 1.4 s becomes 0.13 s."""
    import jax

    from nanoflax.data import default_cache_dir

    jax.config.update("jax_compilation_cache_dir", os.path.join(default_cache_dir(), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def define_hosts():
    """The flags of a program that several processes run together, for `join`."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where several processes train "
                        "together; on Cloud TPU and under Slurm and Open MPI JAX finds it")
    flags.DEFINE_integer("processes", None, "how many there are")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    flags.DEFINE_integer("join_seconds", 300, "until all of them must have answered", 1)
    flags.DEFINE_integer("heartbeat_seconds", 50, "of silence after which a process counts as dead",
                         1)


def join(config, **others):
    """Make one run of its processes, if there are several: all of this Config, and of `others`.

    Raises: UserError if they do not find each other or differ, before anything is compiled.
    """
    distributed.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id,
                           FLAGS.join_seconds, FLAGS.heartbeat_seconds)
    values = configs.to_dict(config)
    for name in ("workers", "cache"):  # of its own machine
        values["data"].pop(name)
    distributed.check_same("their configurations", {"config": values} | others)


def read_run(workdir):
    """The Config and tokenizer of a run. Raises: UserError if workdir holds no run."""
    from nanoflax import tokenizers

    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir} holds no run (no config.json); give the directory "
                        "that pretrain wrote")
    return read_config(path), tokenizers.load(os.path.join(workdir, "tokenizer"))


def read_config(path):
    """The Config of a config.json. Raises: UserError if there is none in it."""
    try:
        with open(path) as f:
            return configs.from_dict(configs.Config, json.load(f))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def restore_model(workdir, config, tokenizer, which="best"):
    """The model of a run and its parameters (their moving average, if it keeps one), without the
    padding of its vocabulary.

    Those that finetune does not train are not in its checkpoints: they are taken again from
    config.model.init_from.
    Raises: UserError if there is no sound checkpoint or the tokenizer is not the run's.
    """
    import jax

    from nanoflax import checkpoint, models, peft, sharding

    subtree = "ema" if config.optim.ema else "params"
    params, meta = checkpoint.restore_params(os.path.join(workdir, "checkpoints"), which=which,
                                             subtree=subtree)
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the tokenizer in --workdir={workdir} (fingerprint "
                        f"{tokenizer.fingerprint[:12]}) is not the one that the checkpoint was "
                        f"trained with ({meta['tokenizer'][:12]}); put that one back")
    model = models.build(config.model)
    paths = jax.tree_util.tree_leaves_with_path

    def fits(params):
        own = dict(paths(params))  # adapters may be among them
        return all(path in own and own[path].shape == x.shape
                   for path, x in paths(sharding.shapes(model)))

    if not fits(params) and config.peft != configs.PeftConfig():
        given = open_model(config.model.init_from)[1] if config.model.init_from else None
        first = adapted(model, given, config, sharding.make_mesh("-1,1,1"))
        params = peft.join(params, peft.split(first, peft.trainable(first, config.peft))[1])
    if not fits(params):
        raise UserError(f"the checkpoint in --workdir={workdir} does not hold the parameters of its "
                        "config.json; it may be of an older nanoflax")
    model_config, params = models.without_padding(config.model, params)
    return models.build(model_config), params


def adapted(model, given, config, mesh):
    """What finetune begins from: `started`, with the adapters that config.peft adds."""
    import jax

    from nanoflax import peft, sharding

    seed = config.train.seed
    add = lambda params: peft.add(params, config.peft, jax.random.PRNGKey(seed + 1))  # noqa: E731
    params = started(model, given, seed, mesh)
    return jax.jit(add, donate_argnums=0, out_shardings=sharding.shardings(
        jax.eval_shape(add, params), mesh))(params)


def started(model, given, seed, mesh):
    """New parameters in float32, with those of the source in their places; says what is new.

    Raises: UserError for a source with adapters that cannot be merged.
    """
    import jax
    import numpy as np
    from flax import traverse_util

    from nanoflax import models, peft, sharding

    new = traverse_util.flatten_dict(sharding.init(model, jax.random.PRNGKey(seed), mesh), sep="/")
    if given is None:
        return traverse_util.unflatten_dict(new, sep="/")
    given = traverse_util.flatten_dict(peft.merge(given), sep="/")
    # Tokens that the source lacks (a mask, sentinels, padding) come after its own.
    for path in sorted(models.VOCABULARY & new.keys() & given.keys()):  # so on all processes
        old = given[path]
        if old.shape != new[path].shape:
            given[path] = np.array(sharding.fetch(new[path]))
            given[path][tuple(map(slice, old.shape))] = old
    fits = {path for path in new if path in given and given[path].shape == new[path].shape}
    fresh = sorted({path.split("/")[0] for path in new.keys() - fits})
    if fresh and writes():
        print(f"not in the source, drawn anew: {', '.join(fresh)}", file=sys.stderr)
    left = sorted({path.split("/")[0] for path in given.keys() - fits})
    if left and writes():
        print(f"in the source, not needed: {', '.join(left)}", file=sys.stderr)
    new |= sharding.put({path: given[path].astype(new[path].dtype) for path in fits}, mesh)
    return traverse_util.unflatten_dict(new, sep="/")


def examples_of(data, name=None):
    """The TaskSource of a DataConfig (or of another source string, read and cleaned the same way,
    the whole of it)."""
    from nanoflax.examples import TaskSource

    fields = data.fields or ("" if data.field == "text" else f"text={data.field}")
    return TaskSource(name or data.train, "" if name else data.validation,
                      data.validation_fraction, fields=fields, unicode=data.unicode,
                      whitespace=data.whitespace, keep_duplicates=data.keep_duplicates,
                      limit=0 if name else data.limit)


def write_labels(workdir, labels, several):
    """labels.json, which marks a run of finetune: the classes, and whether a text may have several
    of them (or none)."""
    with open(os.path.join(workdir, "labels.json"), "w") as f:
        json.dump({"labels": labels, "several": several}, f)


def read_labels(workdir, config):
    """(class names, whether a text may have several) of a finetune run; None of another run.

    Raises: UserError if the run's task has classes and labels.json is not there or not readable.
    """
    path = os.path.join(workdir, "labels.json")
    try:
        with open(path) as f:
            found = json.load(f)
            return tuple(found["labels"]), bool(found["several"])
    except FileNotFoundError:
        if config.task.kind in ("classify", "tag"):
            raise UserError(f"{path} does not exist: it names the classes of "
                            f"task.kind={config.task.kind!r}; finetune wrote it") from None
        return ((), False) if config.task.kind != "language_model" else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def whole(workdir, which="best"):
    """Where the whole model of a run is: in final/, once finetune has ended."""
    final = os.path.join(workdir, "final")
    return final if which == "best" and is_run(final) else workdir


def write_jsonl(path, records):
    """A JSON object a line. Raises: UserError if the file cannot be written."""
    try:
        with open(path, "w", encoding="utf-8") as f:
            for record in records:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def numbers(found):
    """Figures on a line."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())


def is_run(path):
    """Whether a path is the workdir of a run."""
    return os.path.isdir(os.path.join(path, "checkpoints"))


def open_model(source, which="best"):
    """(model, params, tokenizer or None) of a run's workdir, a directory of Transformers, a name on
    the hub, a .gguf file, or a directory of the peft library: low-rank adapters, which are folded
    into the model that it names.

    Raises: UserError for what cannot be opened, or a tokenizer that the embedding is too small for.
    """
    from nanoflax import gguf, hf, hf_tokenizers, models, peft, peft_format, tokenizers

    if is_run(source):
        source = whole(source, which)
        config, tokenizer = read_run(source)
        return *restore_model(source, config, tokenizer, which), tokenizer
    if base := peft_format.base_of(source):
        if peft_format.base_of(base):
            raise UserError(f"{source} belongs to {base}, which holds adapters too; merge those first")
        model, params, tokenizer = open_model(base, which)
        params, _ = peft_format.load(source, model.config, params)
        return model, peft.merge(params), tokenizer
    path = hf.find(source)
    config, params = hf.load(path)
    if path.suffix == ".gguf":
        tokenizer = hf_tokenizers.from_gguf(gguf.open(path)[0], str(path))
    else:
        tokenizer = tokenizers.load(path)
    tokenizers.check_fits(tokenizer, config.vocab_size)
    return models.build(config), params, tokenizer


def prompt_ids(tokenizer, text, architecture="decoder"):
    """The ids of a prompt as its model expects them, with the tokens that begin (and, of a source,
    end) a text."""
    if hasattr(tokenizer, "encode_with_template"):
        return tokenizer.encode_with_template(text) or [
            i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
    if architecture != "decoder":
        return [*tokenizer.encode(text), tokenizer.eos_id]
    return [tokenizer.bos_id, *tokenizer.encode(text)]


# Fields that may change between a run and its resumption: they do not touch the trajectory.
FREE = {"data": ("workers", "cache"), "model": ("attention_backend",),
        "train": ("loss_chunks", "remat", "scan_layers", "max_skipped", "evaluate_every",
                  "evaluate_batches", "patience", "checkpoint_every", "checkpoint_seconds", "keep",
                  "sample_prompt", "sample_tokens", "mesh", "watchdog_seconds", "tensorboard",
                  "wandb")}


def resumable(workdir, config, restart=False):
    """(the Config of the run in workdir or None, the directory of the run whose weights a new one
    begins with or None).

    restart: that is asked for; what it began before is gone on with by the same command.
    Raises: UserError with a diff if the run is not this one in what determines the numbers, or if
    there is no run to begin from.
    """
    from nanoflax import checkpoint

    path, kept = os.path.join(workdir, "config.json"), previous(workdir)
    if kept and not checkpoint.steps(os.path.join(workdir, "checkpoints")):
        if not restart:
            raise UserError(f"--workdir={workdir}: a new run from the weights of {kept[-1]} was "
                            "begun and has saved nothing yet; begin it again with "
                            "--restart_from_weights")
        set_aside(workdir)  # the rest of it
        saved = read_config(os.path.join(kept[-1], "config.json"))
        return refuse_other_tokenizer(saved, config), kept[-1]
    if not os.path.exists(path):
        if restart:
            raise UserError(f"--restart_from_weights: --workdir={workdir} holds no run to begin "
                            "from")
        return None, None
    saved = read_config(path)
    old, new = configs.to_dict(saved), configs.to_dict(config)
    new["model"] |= configs.to_dict(settled(config.model, saved))  # on another mesh too
    for section, names in FREE.items():
        for name in names:
            old[section].pop(name), new[section].pop(name)
    changed = configs.diff(old, new)
    if changed and not restart:
        begin = ("--restart_from_weights" if "restart_from_weights" in FLAGS
                 else f"--config.model.init_from={workdir} and another --workdir")
        raise UserError(f"--workdir={workdir} holds a run with another configuration "
                        f"({'; '.join(changed)}); choose another --workdir, or begin a new run from "
                        f"its weights with {begin}")
    if not restart or kept and not changed:  # the latter: this command began it
        return saved, None
    return refuse_other_tokenizer(saved, config), workdir


def refuse_other_tokenizer(saved, config):
    """The saved Config. Raises: UserError if the other one has another tokenizer."""
    old, new = saved.data.tokenizer, config.data.tokenizer
    if old != new:
        raise UserError(f"--config.data.tokenizer={new}: --restart_from_weights keeps the tokenizer "
                        f"of the weights, {old}")
    return saved


def previous(workdir):
    """The directories of the runs that were set aside in workdir, the newest last."""
    found = glob.glob(os.path.join(glob.escape(workdir), "previous-*", "checkpoints"))
    return sorted(map(os.path.dirname, found), key=lambda path: int(path.rsplit("-", 1)[1]))


def settled(model, saved):
    """The ModelConfig with the padded vocabulary that a saved Config has, if it asks for that
    vocabulary or for the tokenizer's."""
    old = saved.model
    if model.vocab_padding or model.vocab_size not in (0, old.vocab_size - old.vocab_padding):
        return model
    return dataclasses.replace(model, vocab_size=old.vocab_size, vocab_padding=old.vocab_padding)


def check_metric(config, measured):
    """Raises: UserError if train.metric is neither validation_loss nor among `measured`."""
    known = ("validation_loss", *measured)
    if config.train.metric not in known:
        raise UserError(f"train.metric={config.train.metric!r} is not measured here; choose one of "
                        f"{', '.join(known)}")


def refuse_other_data(meta, identity):
    """Raises: UserError if a checkpoint was trained with another tokenizer or other text."""
    for key, what in [("tokenizer", "tokenizer/ of the workdir"),
                      ("data", "text of data.train"), ("validation", "validation text")]:
        if meta[key] != identity[key]:
            raise UserError(f"the {what} is not the one that the checkpoint was trained with "
                            f"(fingerprint {identity[key][:12]}, not {meta[key][:12]}); restore "
                            "it or choose another --workdir (pretrain also takes "
                            "--restart_from_weights)")


def set_aside(workdir):
    """Move a run into a directory of its own inside workdir; returns that directory.

    checkpoints/ goes first and config.json last: who finds the one moved and not the other goes on.
    """
    from nanoflax import checkpoint

    kept = previous(workdir)
    if not kept or checkpoint.steps(os.path.join(workdir, "checkpoints")):
        last = int(kept[-1].rsplit("-", 1)[1]) if kept else 0
        kept.append(os.path.join(workdir, f"previous-{last + 1}"))
        os.makedirs(kept[-1], exist_ok=True)
    if not os.path.exists(os.path.join(kept[-1], "config.json")):
        for name in ("checkpoints", "tokenizer", "metrics.jsonl", "tensorboard", "loss.png", "wandb",
                     "config.json"):
            if os.path.exists(path := os.path.join(workdir, name)):
                os.rename(path, os.path.join(kept[-1], name))
    return kept[-1]


def write_run(workdir, config, tokenizer):
    """config.json and tokenizer/ of a new run; config.json last, so that it marks a whole run."""
    final, part = (os.path.join(workdir, name) for name in ("tokenizer", ".tokenizer.tmp"))
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save(part)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    temporary = os.path.join(workdir, ".config.json.tmp")
    with open(temporary, "w") as f:
        json.dump(configs.to_dict(config), f, indent=1)
    os.replace(temporary, os.path.join(workdir, "config.json"))


def writes():
    """Whether this process prints, logs and plots: the first one of a run on several hosts."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def displays(workdir, config, start_step, tokens_per_step, flops_per_token=None, peak_flops=None):
    """The (log, progress) of `train.fit`; silent ones on processes that do not write. With the last
    two (of all devices together) progress shows the MFU."""
    from nanoflax import report

    if not writes():
        yield report.Silent(), report.Silent()
        return
    t = config.train
    with (report.MetricsLog(workdir, t.tensorboard, t.wandb or None, start_step,
                            configs.to_dict(config)) as log,
          report.Progress(t.steps, start_step, tokens_per_step, flops_per_token,
                          peak_flops) as progress):
        yield log, progress


def source_of(config, name=None):
    """The Source of a DataConfig (or of another source string, read the same way)."""
    from nanoflax import sources

    return sources.Source(name or config.train, config.field, "" if name else config.validation,
                       config.validation_fraction)


def trained_once(train, directory):
    """The tokenizer of train(); of several processes the first trains, the others read it."""
    import jax

    from nanoflax import tokenizers

    if jax.process_count() == 1:
        return train()
    part = f"{directory}.part"
    distributed.first(lambda: train().save(part))
    tokenizer = tokenizers.load(part)
    distributed.gather("read")
    if writes():
        shutil.rmtree(part)
    return tokenizer


def get_tokenizer(config, directory, texts):
    """The tokenizer of the run in directory if there is one, else the one that data.tokenizer names
    or asks to train on texts(), an iterable of str."""
    from nanoflax import tokenizers

    kind, size = tokenizers.parse(config.tokenizer)
    own = os.path.join(directory, "tokenizer")
    if os.path.exists(os.path.join(directory, "config.json")):
        return tokenizers.load(own)
    if kind in ("bytes", "path"):
        return tokenizers.load(config.tokenizer)
    return trained_once(lambda: tokenizers.train_sentencepiece(texts(), size, kind), own)


def check_wandb(config):
    """Raises: UserError if train.wandb asks for what is not installed."""
    if config.train.wandb and not importlib.util.find_spec("wandb"):
        raise UserError(f"train.wandb={config.train.wandb} needs Weights & Biases: "
                        "pip install nanoflax[wandb]")


def with_vocabulary(model, tokenizer, mesh, saved=None):
    """The ModelConfig with model.vocab_size settled: as in the saved Config of a run, or the
    tokenizer's (if not set), padded where the mesh needs it.

    Raises: UserError if it is too small.
    """
    from nanoflax import sharding

    model = settled(model, saved) if saved else model
    if not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if (size := model.vocab_size - model.vocab_padding) < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={size} is less than the tokenizer's "
                        f"{tokenizer.vocab_size}; set it to 0 or at least that")
    return model if saved else sharding.padded(model, mesh)
