"""The text of --help and --helpfull."""

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
            lines += _entry(f"--{name}={_text(flag.value)}", flag.help)
    number = sum(name.startswith("config.") for name in own)
    if number and full:
        lines += ["", "Fields of other kinds (choose a kind with --config.peft.kind and --config.task.kind):"]
        for section, hint in fields.field_types(configs.Config).items():
            for (name, text, default), kinds in fields.fields_of_kinds(hint).items():
                if f"config.{section}.{name}" not in own:
                    flag = f"--config.{section}.{name}={_text(default)}"
                    lines += _entry(flag, f"{text} [{section}.kind={fields.either(kinds)}]")
    elif number:
        lines += ["", f"--config.SECTION.FIELD=VALUE changes the configuration; --helpfull lists all {number} fields."]
    print("\n".join(lines))


def _entry(flag, text):
    return [f"  {flag}", *textwrap.wrap(" ".join(text.split()), 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _text(value):
    """A value as it is written after the equals sign of its flag."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
