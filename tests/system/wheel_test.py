"""The wheel: nanoflax alone, and it works where there is no checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree: a build writes beside its sources."""
    home = tmp_path_factory.mktemp("wheel")
    for folder in ("nanoflax", "experiments", "tests"):
        shutil.copytree(ROOT / folder, home / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, home / "tree")
    pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", home, home / "tree")
    return next(home.glob("*.whl"))


def test_the_wheel_holds_nanoflax_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nanoflax"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "nanoflax").rglob("*.py")}
    data = {"nanoflax/py.typed", "nanoflax/serve/page.html"}
    assert sources | data == {name for name in names if name.startswith("nanoflax/")}


USE = """
import importlib.util, pathlib, sys
import nanoflax
assert pathlib.Path(nanoflax.__file__).is_relative_to(sys.prefix), nanoflax.__file__
for name in nanoflax.__all__:
    getattr(nanoflax, name)
nanoflax.hf.load, nanoflax.hf.save, nanoflax.tokenizers.load, nanoflax.pretrain
assert importlib.util.find_spec("experiments") is None
"""


def test_an_installed_wheel_works_outside_the_checkout(wheel, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = tmp_path / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run([python, "-c", USE], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
