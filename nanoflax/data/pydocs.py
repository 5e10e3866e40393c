"""The source pydocs, and the source files of the running Python."""

import ast
import functools
import inspect
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any

from nanoflax.tokenizers import well_formed

SKIPPED_MODULES = set(
    "test tests idle_test idlelib lib2to3 turtledemo pydoc_data site-packages dist-packages __pycache__".split()
)


def standard_modules(pattern: str, largest: int | None = None) -> Iterator[tuple[str, pathlib.Path, ast.Module]]:
    """Yields (name, path, syntax tree) of the source files of the running Python, sorted by path.

    largest: in bytes; files of this size or larger are left out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob(pattern)):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_MODULES & set(parts) or largest and path.stat().st_size >= largest:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about outdated escape sequences
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template or a file for another Python
        yield ".".join(parts).removesuffix(".__init__"), path, module


@functools.cache  # 2 MB: collecting takes 2 to 3 s, and each split needs all
def pydocs() -> list[str]:
    """The documentation of the running Python: its help topics, then the docstrings of its modules."""
    from pydoc_data.topics import topics

    found = [topics[name] for name in sorted(topics)]
    seen = set()
    for name, _, module in standard_modules("**/*.py"):
        if sections := list(_docstrings(module, name, "", seen)):
            found.append("\n\n".join(sections) + "\n")
    return found


def _docstrings(node: Any, heading: str, prefix: str, seen: set[str]) -> Iterator[str]:
    """Yields "name\\n\\ndocstring" of a module or class and its members; repeated docstrings only once."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text and text not in seen:
        seen.add(text)
        yield f"{heading}\n\n{well_formed(text)}"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                yield from _docstrings(child, name, name + ".", seen)
