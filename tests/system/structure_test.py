"""The structure of the code: rooms and floors, sizes, style, and imports without effects."""

import ast
import functools
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import grimp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACES = sorted(path.parent for path in ROOT.glob("nanoflax/*/__init__.py"))
ROOMS = [face.name for face in FACES]


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def lines(paths):
    return sum(path.read_text().count("\n") for path in paths)


def tool(name, *arguments):
    """The finished process of a tool that pip installs beside this Python."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[test]'"
    return subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True)


def imports(path):
    """The full name of every module or name that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Rooms.


def test_a_room_imports_only_lower_floors():
    done = tool("lint-imports", "--config", "setup.cfg", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_library_does_not_import_programs_or_tests():
    found = [
        f"{name_of(path)} imports {name}"
        for path in sources("nanoflax")
        for name in imports(path)
        if name.split(".")[0] in ("experiments", "tests")
    ]
    assert not found, "\n".join(found)


def test_other_rooms_are_imported_through_their_faces():
    found = []
    for path in sources("nanoflax", "experiments"):
        inside = path.parent.name if path.parent.parent.name == "nanoflax" else None
        for name in imports(path):
            top, room, file, *_ = [*name.split("."), "", ""]
            if top == "nanoflax" and room in ROOMS and room != inside and is_file(room, file):
                found.append(f"{name_of(path)} imports {name}")
    assert not found, "\n".join(found)


def test_files_of_other_rooms_are_not_reached_by_attributes():
    found = []
    for path in sources("nanoflax", "experiments"):
        tree = ast.parse(path.read_text())
        known = {
            alias.asname or alias.name: alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "nanoflax"
            for alias in node.names
        }
        known |= {f"nanoflax.{room}": room for room in ROOMS}
        for node in ast.walk(tree):
            room = known.get(ast.unparse(node.value)) if isinstance(node, ast.Attribute) else None
            if room and is_file(room, node.attr):
                found.append(f"{name_of(path)}:{node.lineno} uses {room}.{node.attr}")
    assert not found, "\n".join(found)


def is_file(room, name):
    """Whether room.name is a file of the room, and no name that its face exports."""
    return (ROOT / "nanoflax" / room / f"{name}.py").exists() and name not in exported(room)


@functools.cache
def exported(room):
    """The names that the face of a room imports."""
    tree = ast.parse((ROOT / "nanoflax" / room / "__init__.py").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imported for alias in node.names]


def test_no_file_imports_itself_through_others():
    graph = grimp.build_graph("nanoflax", cache_dir=None, exclude_type_checking_imports=True)
    faces = {"nanoflax", *(f"nanoflax.{room}" for room in ROOMS)}
    files = sorted(graph.modules - faces)
    remaining = {file: graph.find_modules_directly_imported_by(file) - faces for file in files}
    while free := [file for file, needs in remaining.items() if not needs & remaining.keys()]:
        for file in free:
            del remaining[file]
    assert not remaining, f"import circle among {sorted(remaining)}"


@pytest.mark.parametrize("face", FACES, ids=ROOMS)
def test_a_face_only_names_what_it_exports(face):
    tree = ast.parse((face / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    rest = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node.targets[0]) for node in rest if isinstance(node, ast.Assign)] == ["__all__"]
    assert len(rest) == 1
    assert sorted(exported(face.name)) == sorted(ast.literal_eval(rest[0].value)), "imports and __all__ differ"


def test_only_nn_and_one_file_of_planning_know_linen():
    users = {
        name_of(path)
        for path in sources("nanoflax", "experiments")
        if any(name.startswith("flax.linen") for name in imports(path))
    }
    outside = {name for name in users if not name.startswith("nanoflax/nn/")}
    assert outside == {"nanoflax/planning/attention_backends.py"}


# Sizes.


CORE_LINES = lines(sources("nanoflax/nn", "nanoflax/generate", "nanoflax/train"))


def test_what_everyone_reads_stays_small():
    assert CORE_LINES <= 3700


def test_files_of_the_library_stay_readable():
    long = {name_of(path): lines([path]) for path in sources("nanoflax") if lines([path]) > 400}
    assert not long, "fold them along a natural seam"


def test_the_readme_counts_what_everyone_reads():
    readme = " ".join((ROOT / "README.md").read_text().split())
    claimed = re.search(r"`nn`, `generate` and `train`\D*([\d,]+) lines", readme)
    assert claimed, "the README does not say how many lines nn, generate and train have"
    assert abs(int(claimed[1].replace(",", "")) - CORE_LINES) <= 50, (
        f"the README says {claimed[1]}, there are {CORE_LINES}"
    )


def test_functions_of_runs_and_programs_fit_on_a_screen():
    found = []
    for path in sources("nanoflax/runs", "experiments"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                found.append(f"{name_of(path)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not found, "\n".join(found)


def test_programs_are_short():
    programs = [path for path in (ROOT / "experiments").glob("*.py") if "__main__" in path.read_text()]
    found = {path.name: lines([path]) for path in programs if lines([path]) > 120}
    assert not found


# Style.


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_finds_nothing(command):
    done = tool("ruff", *command.split(), "--no-cache", "--quiet", "nanoflax", "experiments", "tests")
    assert done.returncode == 0, done.stdout + done.stderr


def test_json_is_written_by_one_function():
    # It is strict. The others write no numbers of ours: text of tokenizers, and messages between processes.
    free = {
        "nanoflax/report/strict_json.py",
        "nanoflax/parallel/hosts.py",
        "nanoflax/tasks/examples.py",
        "nanoflax/hf/family.py",
    }
    found = []
    for path in sources("nanoflax", "experiments"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps", "dump", "dumps"):
                strict = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
                if not strict and name_of(path) not in free and path.parent.name != "tokenizers":
                    found.append(f"{name_of(path)}:{node.lineno}: use report.to_json")
    assert not found, "\n".join(found)


# Effects of an import.

EFFECTS = """
import importlib, logging, pathlib, signal, sys, threading, warnings

import jax, flax.linen, optax, orbax.checkpoint  # their own effects come first

def settings():
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    return {
        "log filters, handlers and levels": [(x.name, x.filters[:], x.handlers[:], x.level) for x in loggers
                                             if x.filters or x.handlers or x.level],
        "hooks": [sys.unraisablehook, sys.excepthook, threading.excepthook],
        "signals": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "warning filters": warnings.filters[:],
        "jax settings": dict(jax.config.values),
        "threads": threading.active_count(),
        "matplotlib": "matplotlib" in sys.modules and sys.modules["matplotlib"].get_backend(),
    }

before = settings()
root = pathlib.Path("nanoflax")
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
    after = settings()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"import {name} changes {changed}"
assert not jax._src.xla_bridge.backends_are_initialized()
"""


def test_an_import_changes_nothing_outside():
    done = subprocess.run([sys.executable, "-c", EFFECTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("program", ["evaluate", "finetune", "pretrain", "sample", "serve"])
def test_a_program_imports_jax_after_it_has_restarted_with_huge_pages(program):
    # See experiments/flags.py: what is imported before is imported twice.
    code = f"import sys, experiments.{program}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_top_level_holds_what_the_repository_is_made_of():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no checkout of git")
    top = {name.strip('"').split("/")[0] for name in found.stdout.splitlines()}
    own = "nanoflax experiments tests tpu_scripts docs setup.cfg pyproject.toml constraints.txt LICENSE".split()
    assert sorted(name for name in top if not name.startswith(".") and not name.endswith(".md")) == sorted(own)
