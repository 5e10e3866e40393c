"""What the programs share: typed configuration flags, errors for people, opening a run."""

import dataclasses
import errno
import importlib.util
import itertools
import os
import sys
import traceback
import types
import typing

from absl import app, flags, logging

from nanoflax import config as configs
from nanoflax import parallel
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))


def launch(main, default_config=None, arguments=False, data=None):
    """Run a program: parse its flags, call main(), and turn what goes wrong into one line.

    default_config: the file of --config for a program that takes one; every field of it becomes a
    typed flag, such as --config.model.dim=256. data: TextData or ExampleData, where the program
    reads only one of them. arguments: the program takes words that are no
    flags, and finds them in FLAGS.arguments. Exit status: what main returns (0), 2 for anything
    the user can put right, 130 for Ctrl-C outside training, 1 for what is wrong in the program or
    with another process of the run.
    """

    def parse(argv):
        try:
            if default_config:
                path = last_value(argv, "config")
                define_config(default_config if path is None else path, argv, data)
            rest = FLAGS(argv)
            for name in (
                "workdir",
                "model",
                "from",
                "to",
                "out",
                "json",
                "prompt_file",
                "candidates",
                "config.model.init_from",
                "config.data.cache",
            ):
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
            parallel.exit_process(130)
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
    parallel.exit_process(1)


def fail(error):
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
    parallel.exit_process(2)


def last_value(argv, name):
    """The value of the last --name=value or --name value, or None: read before all flags can be defined."""
    found = None
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        flag, equals, value = arg.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else following
    return found


def load_config(path):
    """The Config of a file's get_config(). A bare name is looked up in experiments/configs."""
    shipped = os.path.join(HERE, "configs", os.path.basename(path).removesuffix(".py") + ".py")
    where = path if os.path.isfile(path) else shipped
    if not os.path.isfile(where):
        known = sorted(
            f[:-3] for f in os.listdir(os.path.join(HERE, "configs")) if f.endswith(".py") and not f.startswith("_")
        )
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
        raise UserError(
            f"--config={path}: get_config() must return a nanoflax.config.Config, not {type(config).__name__}"
        )
    return config


def define_config(path, argv, data):
    """Define --config and a typed flag for every field of its Config, with the file's values.

    The kinds of its sections are those that flags in argv choose.
    """
    config = load_config(path)
    if data is not None:
        config = dataclasses.replace(config, data=configs.as_kind(data, config.data))
    for section, hint in configs.hints(configs.Config).items():
        if (kind := last_value(argv, f"config.{section}.kind")) is not None and (known := configs.kinds(hint)):
            if kind not in known:
                raise UserError(f"--config.{section}.kind={kind!r} is not one of {', '.join(known)}")
            config = dataclasses.replace(config, **{section: configs.as_kind(known[kind], getattr(config, section))})
    _define(flags.ArgumentParser(), "config", path, "Python file whose get_config() returns the Config")
    for section, hint in configs.hints(configs.Config).items():
        if known := configs.kinds(hint):
            text = f"Chooses the fields of config.{section} (one of {', '.join(known)})"
            _define(flags.EnumParser([*known]), f"config.{section}.kind", getattr(config, section).kind, text)
    for name, kind, value, text in leaves(config, "config"):
        _define(_Leaf(kind), name, value, text)
    for arg in argv[1:]:
        name = arg.split("=")[0].lstrip("-")
        if arg.startswith("-") and name.startswith("config.") and name not in FLAGS:
            raise UserError(_no_such_flag(name, config))


def leaves(config, prefix):
    """(dotted name, type, value, help) of every field of a nested dataclass."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), configs.hints(type(config))[field.name]
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", kind, value, configs.describe(field, kind)


def _no_such_flag(name, config):
    _, section, *rest = name.split(".", 2)
    hints = configs.hints(configs.Config)
    if section not in hints or not rest:
        return configs.no_such_field(section, configs.Config, {}, "config")
    values = getattr(config, section)
    return configs.no_such_field(rest[0], type(values), configs.kinds(hints[section]), f"config.{section}")


def _define(parser, name, default, text):
    parser.syntactic_help = ""
    flags.DEFINE(parser, name, default, text, serializer=flags.ArgumentSerializer(), module_name=sys.argv[0])


def parsed_config():
    """The Config after all flags, validated."""

    sections = {}
    for section, hint in configs.hints(configs.Config).items():
        known = configs.kinds(hint)
        cls = known[FLAGS[f"config.{section}.kind"].value] if known else hint
        sections[section] = cls(**{name: FLAGS[f"config.{section}.{name}"].value for name in configs.hints(cls)})
    config = configs.Config(**sections)
    configs.validate(config)
    return config


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


def define_hosts():
    """The flags of a program that several processes run together, for `join`."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, where several processes train "
        "together; on Cloud TPU and under Slurm and Open MPI JAX finds it",
    )
    flags.DEFINE_integer("processes", None, "how many there are")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    flags.DEFINE_integer("join_seconds", 300, "until all of them must have answered", 1)
    flags.DEFINE_integer("heartbeat_seconds", 50, "of silence after which a process counts as dead", 1)


def join(config, **others):
    """Make one run of its processes, if there are several: all of this Config, and of `others`.

    Raises: UserError if they do not find each other or differ, before anything is compiled.
    """
    parallel.join_processes(
        FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, FLAGS.join_seconds, FLAGS.heartbeat_seconds
    )
    values = configs.to_dict(config)
    for name in ("workers", "cache"):  # of its own machine
        values["data"].pop(name, None)
    parallel.check_processes_agree("their configurations", {"config": values} | others)
