"""The text of --help and --helpfull."""

import os
import sys
import textwrap

from absl import flags

from nanoflax import config as configs
from nanoflax.config import fields

FLAGS = flags.FLAGS


def print_help(full: bool) -> None:
    """Print the program's docstring and flags. full: also the fields of the configuration, for all kinds."""
    own = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    shown = own | {flag.name: flag for flag in FLAGS.get_key_flags_for_module("experiments.hosts")} if full else own
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for name, flag in sorted(shown.items()):
        if full or not name.startswith("config."):
            lines += _entry(f"--{name}={_text(flag)}", flag.help)
    number = sum(name.startswith("config.") for name in own)
    if number and full:
        lines += ["", "Fields of other kinds (choose a kind with --config.peft.kind and --config.task.kind):"]
        for section, hint in fields.field_types(configs.Config).items():
            for (name, text), kinds in fields.fields_of_kinds(hint).items():
                if f"config.{section}.{name}" not in own:
                    lines += _entry(f"--config.{section}.{name}", f"{text} [{section}.kind={fields.either(kinds)}]")
    elif number:
        lines += ["", f"--config.SECTION.FIELD=VALUE changes the configuration; --helpfull lists all {number} fields."]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the pipe is closed; with /dev/null as stdout, Python's flush at exit does not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _entry(flag, text):
    return [f"  {flag}", *textwrap.wrap(" ".join(text.split()), 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _text(flag):
    if flag.value is None or isinstance(flag.value, bool):
        return str(flag.value).lower()
    return flag.serialize().partition("=")[2]
