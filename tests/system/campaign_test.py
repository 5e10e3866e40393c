"""tests.campaign: its accidents strike. A campaign whose accidents never happen finds nothing and looks well."""

import importlib
import operator
import sys
import threading
import types

import pytest

from tests import processes
from tests.campaign import kills, signals, victim

FUNCTIONS = {aim[1] for aims in kills.AIMS.values() for aim in aims} | {of for of, _ in signals.MOMENTS.values()}


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_the_functions_in_which_programs_are_disturbed_exist(function):
    module, _, path = function.partition(":")
    assert callable(operator.attrgetter(path)(importlib.import_module(module)))


def test_an_accident_strikes_by_every_name_of_a_function(monkeypatch):
    owner, face = types.ModuleType("owner"), types.ModuleType("face")
    for module in (owner, face):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    owner.work = face.work = lambda: "done"
    struck = threading.Event()
    monkeypatch.setattr(victim, "strike", lambda accident: struck.set())
    victim.at_call({"of": "owner:work", "n": 2})
    assert face.work() == "done" and not struck.wait(0.05)
    assert owner.work() == "done" and struck.wait(10)


@pytest.mark.parametrize("flag", ["--minutes=0", "--minutes=-1", "--minutes=nan", "--jobs=0", "--parts=all"])
def test_a_campaign_without_time_or_parts_is_refused(flag):
    done = processes.run(["-m", "tests.campaign", flag])
    assert done.returncode == 2 and flag.partition("=")[2] in done.stderr and "Traceback" not in done.stderr
