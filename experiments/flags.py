"""Shared by all programs: flags, one typed flag for each field of a configuration, help, errors and exit status."""

import dataclasses
import difflib
import gc
import io
import itertools
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging

import nanoflax
from experiments.help import print_help
from nanoflax import config as configs
from nanoflax import storage
from nanoflax.config import fields
from nanoflax.errors import DISK_ERRORS, UserError

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))
HELP = {"--help", "-help", "-h", "--helpshort", "-helpshort", "--helpfull", "-helpfull"}
PATHS = "workdir model from to out json prompt_file candidates config.model.init_from config.data.cache".split()
PATHS += ["draft", "json_schema", "grammar", "include_path"]


def launch(
    main: Callable[[], int | None],
    default_config: str | None = None,
    arguments: bool = False,
    data: type[configs.DataConfig] | None = None,
) -> None:
    """Run a program: parse its flags, call main(), and print a mistake of the user as one line.

    default_config: the default of --config; each field of its Config becomes a typed flag (--config.model.dim=256).
    arguments: allow words that are not flags; they become FLAGS.arguments. data: the only allowed kind of data.
    Exit status: the result of main(), or 0; 2 for a mistake of the user; 130 for Ctrl-C outside training; else 1.
    """

    def parse(argv):
        try:
            if default_config:
                path = last_value(argv, "config")
                _define_config(default_config if path is None else path, argv, data)
            if asked := HELP & {*argv[1:]}:
                sys.exit(print_help(full=any(flag.endswith("full") for flag in asked)))
            rest = FLAGS(argv)
            for name in PATHS:  # the shell does not expand ~ after "="
                if name in FLAGS and (path := FLAGS[name].value):
                    FLAGS[name].value = os.path.expanduser(path)
                    storage.check_name(path)
            if arguments:
                flags.DEFINE_multi_string("arguments", rest[1:], "", flag_values=FLAGS)
                FLAGS.arguments = rest[1:]
            elif len(rest) > 1:
                raise UserError(f"argument {rest[1]!r} is unknown; flags begin with --")
            return rest
        except flags.UnrecognizedFlagError as error:
            _fail(_no_such_flag(error.flagname))
        except (flags.Error, UserError) as error:
            missing = re.findall("Flag --(\\S+) must have a value other than None", str(error))
            _fail("; ".join(f"--{name} is missing: {FLAGS[name].help}" for name in missing) or error)

    def guarded(_):
        try:
            sys.exit(main() or 0)
        except UserError as error:
            _fail(error)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                _fail(f"{error.filename or 'a file that is written'}: {error.strerror}")
            _crash()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            _exit(130)
        except Exception:
            _crash()

    _use_huge_pages()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in a script's job in the background
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _interrupt_again
    _drop_output_that_nobody_reads()
    logging.set_verbosity(logging.WARNING)  # hides JAX's messages about missing backends
    gc.set_threshold(20_000)  # the default 700 visits JAX's many objects so often that Python is half as fast
    app.run(guarded, flags_parser=parse)


def _use_huge_pages():
    """On Linux, restart with huge pages (glibc reads this setting at the start): page faults took 1/8 of a CPU step.

    Programs that are started often import JAX in main(), as nanoflax.ROOM, not at their top: only once.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class _Output(io.TextIOWrapper):
    """Standard output or errors. After the reader has ended (`head`), text is dropped and the program goes on."""

    def write(self, text):
        try:
            return super().write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            super().flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _drop_output_that_nobody_reads():
    for fd, name in ((1, "stdout"), (2, "stderr")):
        out = getattr(sys, name)
        if isinstance(out, io.TextIOWrapper) and out.fileno() == fd:
            out.flush()
            file = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
            setattr(sys, name, _Output(file, out.encoding, out.errors, line_buffering=out.line_buffering))


def _crash():
    traceback.print_exc()
    _exit(1)


def _fail(error):
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
    _exit(2)


def _exit(status):
    """End the program after an error; JAX is not imported for it."""
    hosts = sys.modules.get("nanoflax.parallel.hosts")
    (hosts.exit_process if hosts else sys.exit)(status)


def _interrupt(_, frame):
    """Ctrl-C. It ends the program at once while a module is imported: an exception there can be lost, or a crash."""
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\ninterrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _interrupt_again(dropped):
    """Ctrl-C in a callback of the garbage collector, as JAX has one, which drops exceptions: it comes again soon."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(dropped)


def _no_such_flag(name):
    """The message for an unknown flag: the flags with this last word, or else the most similar one."""
    plain, known = name.replace("-", "_"), [*FLAGS]
    last = {flag: flag.rpartition(".")[2] for flag in known}
    found = [flag for flag in known if last[flag] == plain.rpartition(".")[2]]
    near = found or difflib.get_close_matches(plain, known, 1, 0.7)
    near = near or [flag for flag in known if last[flag] in difflib.get_close_matches(plain, last.values(), 1)]
    hint = f"did you mean {fields.either([f'--{flag}' for flag in near])}?" if near else "--help lists all flags"
    return f"flag --{name} does not exist; {hint}"


def write_json(flag: str, path: str, value: Any = None) -> None:
    """Write a value to the file that a flag names, if any. None: only check that this is possible, before long work.

    Raises: UserError if the file cannot be written.
    """
    if not path:
        return
    try:
        with open(path, "a" if value is None else "w") as f:
            f.write("" if value is None else nanoflax.report.to_json(value, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written: {error.strerror}") from error


# The configuration.


def last_value(argv: list[str], name: str) -> str | None:
    """The value of the last --name=value or --name value, or None. For flags that decide which flags are defined."""
    found = None
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        flag, equals, value = arg.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else following
    return found


def load_config(path: str) -> configs.Config:
    """The Config that get_config() of a file returns. A name without a path is a file in experiments/configs."""
    folder = os.path.join(HERE, "configs")
    in_folder = os.path.join(folder, os.path.basename(path).removesuffix(".py") + ".py")
    file = path if os.path.isfile(path) else in_folder
    if not os.path.isfile(file):
        known = sorted(name[:-3] for name in os.listdir(folder) if name.endswith(".py") and name[0] != "_")
        raise UserError(f"--config={path} does not exist; included configs: {', '.join(known)}")
    if not file.endswith(".py"):
        raise UserError(f"--config={path} must be a Python file with the suffix .py")
    try:
        config = runpy.run_path(file)["get_config"]()
    except UserError:
        raise
    except Exception as error:  # any mistake in the user's file
        raise UserError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, configs.Config):
        raise UserError(f"--config={path}: get_config() must return a nanoflax.config.Config, not {config!r:.60}")
    return config


def _define_config(path, argv, data):
    """Define --config, --config.SECTION.kind and a typed flag for every field, with the file's values as defaults.

    If a flag in argv chooses another kind than the file, the fields of both kinds keep the file's values.
    Raises: UserError for a flag in argv that is not a field of the chosen kinds.
    """
    config = load_config(path)
    _define(flags.ArgumentParser(), "config", path, "Python file whose get_config() returns the configuration.")
    for section, hint in fields.field_types(configs.Config).items():
        values, known = getattr(config, section), fields.kinds(hint)
        if section == "data" and data:
            values, known = configs.as_kind(data, values), {data.kind: data}
        if known:
            kind = last_value(argv, f"config.{section}.kind") or values.kind
            if kind not in known:
                raise UserError(f"--config.{section}.kind={kind!r} is not one of {', '.join(known)}")
            values = configs.as_kind(known[kind], values)
            text = f"Chooses the fields of config.{section}. (one of {', '.join(known)})"
            _define(flags.EnumParser([*known]), f"config.{section}.kind", kind, text)
        for name, kind, value, text in leaves(values, f"config.{section}"):
            _define(_FieldParser(kind), name, value, text)
        for arg in argv[1:]:
            name = arg.lstrip("-").split("=")[0]
            if arg.startswith("-") and name.startswith(f"config.{section}.") and name not in FLAGS:
                field = name.removeprefix(f"config.{section}.")
                raise UserError(fields.no_such_field(field, type(values), fields.kinds(hint), f"config.{section}"))


def _define(parser, name, default, text):
    parser.syntactic_help = ""
    flags.DEFINE(parser, name, default, text, serializer=flags.ArgumentSerializer(), module_name=sys.argv[0])


def leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, value, help) of every field of a nested dataclass."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), fields.field_types(type(config))[field.name]
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", kind, value, fields.describe(field, kind)


def parsed_config() -> configs.Config:
    """The Config after all flags, validated."""
    sections = {}
    for section, hint in fields.field_types(configs.Config).items():
        known = fields.kinds(hint)
        cls = known[str(FLAGS[f"config.{section}.kind"].value)] if known else hint
        sections[section] = _values(cls, f"config.{section}")
    config = _without_other_recipe(configs.Config(**sections))
    configs.validate(config)
    return config


def _without_other_recipe(config):
    """The Config without the file's settings of the optimizer and the batch that are for other trained parameters.

    The rates of a file without model.init_from are for a model from scratch. If flags change what is trained, these
    settings become open, and `with_recipe` chooses them. The same for a warmup longer than the steps of a flag.
    """
    file = load_config(FLAGS["config"].value)
    given = lambda name: FLAGS[f"config.{name}"].present
    open_fields = []
    if configs.recipe_of(file) != configs.recipe_of(config):
        open_fields = [name for name in configs.RECIPE_FIELDS if not given(f"optim.{name}")]
        if not given("train.batch_size"):
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=0))
    elif (config.optim.warmup_steps or 0) >= config.train.steps and not given("optim.warmup_steps"):
        open_fields = ["warmup_steps"]
    optim = dataclasses.replace(config.optim, **dict.fromkeys(open_fields))
    return dataclasses.replace(config, optim=optim)


def _values(cls, prefix):
    """A configuration of class `cls` from the flags that begin with `prefix`."""
    found = {}
    for name, kind in fields.field_types(cls).items():
        path = f"{prefix}.{name}"
        found[name] = _values(kind, path) if dataclasses.is_dataclass(kind) else FLAGS[path].value
    return cls(**found)


class _FieldParser(flags.ArgumentParser):
    """Parses the text of a flag as the type of a configuration field. See `fields.parse`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def parse(self, text):
        try:
            return fields.parse(self.kind, text) if isinstance(text, str) else text
        except ValueError as error:
            raise ValueError(f"it must be {fields.type_name(self.kind)}") from error

    def flag_type(self):
        return fields.type_name(self.kind)
