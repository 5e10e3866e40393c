"""Checkpoints: every bit comes back, and no damage, kill or full disk costs more than one step."""

import errno
import itertools
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import runs
from nanoflax.errors import UserError
from nanoflax.runs import Checkpoints, checkpoint, manifest, orbax_io
from nanoflax.runs.lock import WorkdirLock
from tests import processes

ROOT = str(pathlib.Path(__file__).resolve().parents[2])


class Moments(NamedTuple):  # stands for optax's states: namedtuples in tuples, with empty ones
    count: jax.Array
    mu: dict


class Empty(NamedTuple):
    pass


def make_state(seed=0, size=64):
    rng = np.random.default_rng(seed)

    def bits(shape, dtype):  # any bit pattern, NaNs and denormals too
        words = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
        return jnp.asarray(words.view(dtype)[..., 0])

    params = {
        "embed": {"w": bits((size, 8), jnp.float32)},
        "blocks": [{"w": bits((8, 8), jnp.bfloat16)}, {"w": bits((8,), jnp.float16)}],
    }
    return {
        "params": params,
        "opt": (Empty(), Moments(jnp.int32(7), jax.tree.map(jnp.copy, params)), Empty()),
        "step": jnp.int32(3),
        "key": bits((2,), jnp.uint32),
        "scale": bits((), jnp.float32),
        "flag": jnp.array(True),
        "host": np.arange(3, dtype=np.int32),
        "ema": None,
    }


def abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_steps(directory, n=3, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in range(1, n + 1):
            checkpoints.save(step, make_state(step), {"position": step})


def run(code, *args, wait=True, **options):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests/runs",
        "JAX_PLATFORMS": "cpu",
        **options.pop("env", {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    if not wait:
        return process
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


# What is saved comes back.


def test_every_bit_returns(tmp_path):
    state, meta = make_state(), {"position": 12, "config": {"dim": 8}, "best": None}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        assert checkpoints.save(5, state, meta)
        meta["position"] = 13  # the caller may go on at once
        assert not checkpoints.save(5, state, meta), "saved already"
        restored, restored_meta = checkpoints.restore(abstract(state))
    assert_same_bits(restored, state)
    assert restored_meta == {"position": 12, "config": {"dim": 8}, "best": None}
    assert jax.tree.leaves(restored)[0].sharding == jax.tree.leaves(abstract(state))[0].sharding


def test_a_new_process_reads_it_quietly_and_onto_another_mesh(tmp_path):
    save_steps(tmp_path, 1)
    code = """
        import sys, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from checkpoint_test import make_state, assert_same_bits
        from nanoflax.runs.checkpoint import Checkpoints, restore_params
        state = make_state(1)
        meshes = [jax.sharding.Mesh(np.array(jax.devices()).reshape(s), ("a", "b"))
                  for s in ((4, 2), (2, 4))]
        for step, mesh in enumerate(meshes, 1):
            place = lambda x: NamedSharding(mesh, P("a", "b") if x.ndim == 2 else P())
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)
            with Checkpoints(sys.argv[1]) as checkpoints:
                restored, _ = checkpoints.restore(target)
                assert_same_bits(restored, state)
                for x, t in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                    assert x.sharding == t.sharding
                checkpoints.save(step + 1, restored, {})
            params, _ = restore_params(sys.argv[1], shardings=lambda t: jax.tree.map(place, t))
            assert_same_bits(params, state["params"])
            assert params["embed"]["w"].sharding == place(params["embed"]["w"])
    """
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run(code, tmp_path, env=env, stderr=subprocess.STDOUT) == ""


def test_donating_right_after_save_changes_nothing_saved(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    state = step({f"w{i}": jnp.full((300, 300), i, jnp.float32) for i in range(12)})
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        expected = {}
        for i in range(12):
            expected[i] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            given = state
            checkpoints.save(i, given, {})
            state = step(step(given))
            assert jax.tree.leaves(given)[0].is_deleted(), "saving must not hold up donation"
        checkpoints.wait()
        for i in expected:
            assert_same_bits(checkpoints.restore(abstract(state), i)[0], expected[i])


def test_params_alone_without_reading_the_optimizer(tmp_path):
    import tensorstore

    state = make_state(0, size=200)
    state["opt"] = {"mu": jnp.arange(2_000_000, dtype=jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"a": 1}, metric=2.0)
        checkpoints.save(2, make_state(2), {"a": 2}, metric=3.0)

    def bytes_read():
        metric = "/tensorstore/kvstore/file/bytes_read"
        found = tensorstore.experimental_collect_matching_metrics(metric)
        return sum(v["value"] for m in found for v in m["values"])

    before = bytes_read()
    params, meta = runs.restore_params(tmp_path, which="best")
    assert 0 < bytes_read() - before < 1_000_000
    assert meta == {"a": 1}
    assert_same_bits(params, state["params"])
    assert_same_bits(runs.restore_params(tmp_path)[0], make_state(2)["params"])
    assert runs.restore_params(tmp_path, step=1)[1] == {"a": 1}
    assert checkpoint.read_metadata(tmp_path) == {"a": 2}
    with pytest.raises(UserError, match="has no 'ema_params', only"):
        runs.restore_params(tmp_path, subtree="ema_params")
    with pytest.raises(UserError, match="no checkpoint of step 9"):
        runs.restore_params(tmp_path, step=9)
    with pytest.raises(UserError, match="no checkpoint"):
        runs.restore_params(tmp_path / "absent")


# Which steps are kept.


def test_the_newest_and_the_best_are_kept_also_after_reopening(tmp_path):
    state = {"w": jnp.zeros(3)}
    losses = {1: 5.0, 2: 2.0, 3: None, 4: float("nan"), 5: 3.0, 6: None, 7: None}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, state, {}, metric=losses[step])
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best() == 2 and checkpoints.latest() == 7
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, loss in ((8, None), (9, 1.0), (10, None)):
            checkpoints.save(step, state, {}, loss)
        checkpoints.wait()
        assert checkpoints.steps() == [9, 10] and checkpoints.best() == 9
        with pytest.raises(UserError, match="cannot save step 4 before step 10"):
            checkpoints.save(4, state, {})


# Damage.


def test_a_step_that_is_there_gets_its_metric_later(tmp_path):
    state = make_state()
    with runs.Checkpoints(tmp_path) as checkpoints:
        for step, metric in ((1, 2.0), (2, None)):
            checkpoints.save(step, state, {}, metric)
    with runs.Checkpoints(tmp_path) as checkpoints:
        for metric in (None, float("nan"), 1.0, 3.0):  # the first finite one
            assert checkpoints.save(2, state, {}, metric) is False
        assert checkpoints.best() == 2
    assert manifest.read_metric(tmp_path / "2") == 1.0 and manifest.find_damage(tmp_path / "2") is None
    assert not list((tmp_path / "2").glob("*.tmp"))
    with runs.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == 2


@pytest.mark.parametrize("swapped", [False, True])
def test_a_copy_of_another_step_is_damage(swapped, tmp_path):
    save_steps(tmp_path, 2)
    (tmp_path / "2").rename(tmp_path / "other")
    if swapped:
        (tmp_path / "1").rename(tmp_path / "2")
        (tmp_path / "other").rename(tmp_path / "1")
    else:
        shutil.copytree(tmp_path / "1", tmp_path / "2")
        shutil.rmtree(tmp_path / "other")
    said = []
    with Checkpoints(tmp_path, log=said.append) as checkpoints:
        if swapped:
            with pytest.raises(UserError, match="every checkpoint is damaged"):
                checkpoints.restore(abstract(make_state(1)))
        else:
            assert checkpoints.restore(abstract(make_state(1)))[1] == {"position": 1}
    assert "step 2 is damaged (it is a copy of step 1)" in said[0] and (tmp_path / "damaged-2").is_dir()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    save_steps(directory, 2)
    return directory


def test_damage_to_any_file_is_noticed_and_the_step_before_is_used(two_steps, tmp_path):
    state = make_state(1)
    names = [p.relative_to(two_steps) for p in (two_steps / "2").rglob("*") if p.is_file()]
    names = [p for p in names if p.name not in manifest.WRITTEN_LATER or len(p.parts) > 2]
    assert len(names) > 5 and any("d" in p.parts for p in names)
    for i, name in enumerate(names):
        for break_it in (flip, halve, os.unlink) if "d" in name.parts else (flip,):
            directory = tmp_path / f"{i}-{break_it.__name__}"
            shutil.copytree(two_steps, directory)
            break_it(directory / name)
            said = []
            assert checkpoint.read_metadata(directory, log=said.append) == {"position": 1}, name
            assert "step 2 is damaged" in said[0] and name.name in said[0]
            assert checkpoint.list_steps(directory) == [1, 2], "a reader changes nothing"
            with Checkpoints(directory, log=said.append) as checkpoints:
                assert_same_bits(checkpoints.restore(abstract(state))[0], state)
                assert checkpoints.latest() == 1
                assert checkpoints.save(2, state, {}), "its number is free again"
            assert (directory / "damaged-2").is_dir() and "damaged-2" in said[-1]
            shutil.rmtree(directory)


def test_orbax_s_own_records_are_not_needed(two_steps, tmp_path):
    for i, break_it in enumerate((flip, halve, os.unlink)):
        directory = shutil.copytree(two_steps, tmp_path / str(i))
        break_it(directory / "2" / "_CHECKPOINT_METADATA")
        with Checkpoints(directory) as checkpoints:
            restored, _ = checkpoints.restore(abstract(make_state(2)))
            assert_same_bits(restored, make_state(2))
            checkpoints.save(3, restored, {})
        assert checkpoints.steps() == [2, 3]


def test_nothing_sound_left(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "c")
    for step in "12":
        flip(next((directory / step / "state" / "d").iterdir()))
    with Checkpoints(directory, log=lambda line: None) as checkpoints:
        with pytest.raises(UserError, match="step 1 is damaged: state/d/"):
            checkpoints.restore(abstract(make_state(1)), step=1)
        assert checkpoints.steps() == [1, 2]
        with pytest.raises(UserError, match="every checkpoint is damaged"):
            checkpoints.restore(abstract(make_state(1)))
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoints.restore(abstract(make_state(1)))
    assert sorted(p.name for p in directory.iterdir()) == ["damaged-1", "damaged-2"]


def test_a_state_of_another_shape_is_refused_with_its_differences(two_steps):
    def refused(change, *messages):
        target = abstract(make_state(2))
        change(target)
        with pytest.raises(UserError) as error:
            checkpoints.restore(target)
        assert all(m in str(error.value) for m in messages), error.value
        assert "\n" not in str(error.value)

    struct = jax.ShapeDtypeStruct
    with Checkpoints(two_steps) as checkpoints:
        refused(lambda t: t.update(scale=struct((), jnp.bfloat16)), "scale is float32[], not bfloat16[]")
        refused(
            lambda t: t["params"]["embed"].update(w=struct((64, 9), jnp.float32)),
            "params.embed.w is float32[64, 8], not float32[64, 9]",
        )
        refused(lambda t: t.pop("key"), "key is uint32[2], not absent")
        refused(lambda t: t.update(ema=struct((2,), jnp.int32)), "ema is nothing, not int32[2]")
        refused(lambda t: t.update(opt=t["opt"][:2]), "opt.2 is nothing, not absent")
        refused(
            lambda t: t.update({f"x{i}": struct((), jnp.int32) for i in range(13)}),
            "x0 is absent, not int32[]",
            "and 3 more",
        )


# Kills, full disks, second processes.


def test_a_kill_at_any_time_leaves_a_directory_to_resume_from(tmp_path):
    code = """
        import sys
        from tests.runs.checkpoint_test import *
        with Checkpoints(sys.argv[1]) as checkpoints, WorkdirLock(sys.argv[1]):
            step = 0
            if checkpoints.latest() is not None:
                state, meta = checkpoints.restore(abstract(make_state(0, 20_000)))
                step = meta["position"]
                assert_same_bits(state, make_state(step, 20_000))
            print(step, flush=True)
            while True:
                step += 1
                checkpoints.save(step, make_state(step, 20_000), {"position": step})
                print(step, flush=True)
    """

    def printed(child, least):
        """The steps that a child has printed, when there are so many, however slow it is."""
        while child.out.read_text().count("\n") < least and child.poll() is None:
            time.sleep(0.005)
        return [int(line) for line in child.out.read_text().splitlines()]

    rng, saved = random.Random(0), 0
    for _ in range(6):
        child = processes.start(["-c", textwrap.dedent(code), tmp_path])
        # `save` of a step first commits the one before it, so that one may not be lost.
        assert saved - 1 <= printed(child, 1)[0] <= saved + 1
        printed(child, 1 + rng.randint(2, 5))
        time.sleep(rng.uniform(0.0, 0.1))
        child.kill()
        child.wait()
        saved = printed(child, 1)[-1]
    assert saved > 6
    with Checkpoints(tmp_path, log=pytest.fail) as checkpoints:
        _, meta = checkpoints.restore(abstract(make_state(0, 20_000)))
        assert meta["position"] == checkpoints.latest()


def test_only_a_writer_removes_what_a_kill_left(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "c")
    left = directory / "3.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2", left)
    assert runs.restore_params(directory)[1] == {"position": 2} and left.exists()
    Checkpoints(directory).close()
    assert not left.exists() and checkpoint.list_steps(directory) == [1, 2]


def fill_disk(directory):
    """Two saves that fit and one that does not; run in a child or on a small file system."""
    small = {"w": jnp.ones(1000)}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, small, {})
        with pytest.raises(UserError) as error:
            rng = np.random.default_rng(0)
            big = {"w": jnp.asarray(rng.normal(size=3_000_000), jnp.float32)}
            checkpoints.save(2, big, {})
            checkpoints.wait()
        assert str(directory) in str(error.value) and "step 2" in str(error.value)
        assert "\n" not in str(error.value)
        assert [p.name for p in pathlib.Path(directory).iterdir()] == ["1"]
        assert checkpoints.latest() == 1
        assert_same_bits(checkpoints.restore(abstract(small))[0], small)
        checkpoints.save(3, small, {})
    assert checkpoints.steps() == [1, 3]
    # A save while the disk is full is reported by the next save, which succeeds.
    said = []
    with Checkpoints(directory, log=said.append) as checkpoints:
        checkpoints.save(4, big, {})
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 0:  # a file that is too large is no full disk
            checkpoints.save(5, small, {})
            assert len(said) == 1 and "step 4 could not be saved: No space" in said[0] and "step 5" in said[0]
        else:
            with pytest.raises(UserError, match="File too large"):
                checkpoints.save(5, small, {})
            checkpoints.save(5, small, {})
    assert checkpoints.steps() == [3, 5] and checkpoints.metric(4) is None
    return str(error.value)


def test_a_refused_write_is_one_line_and_costs_no_step(tmp_path):
    code = """
        import resource, signal, sys, checkpoint_test
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        print(checkpoint_test.fill_disk(sys.argv[1]))
    """
    out = run(code, tmp_path / "c", stderr=subprocess.STDOUT)
    assert out.count("\n") == 1 and "File too large" in out


def test_arrays_refused_after_the_first_print_no_traceback():
    code = """
        import asyncio, sys, threading
        import tensorstore
        from nanoflax.runs import orbax_io

        def end_in_a_thread(callback=None):
            promise, future = tensorstore.Promise.new()
            loop = asyncio.new_event_loop()
            async def wait():
                await future
            if callback:
                future.add_done_callback(callback)
            else:  # as orbax does when another array's write has failed
                task = loop.create_task(wait())
                loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            thread = threading.Thread(target=promise.set_result, args=(1,))
            thread.start()
            thread.join()
        with orbax_io.quiet_orbax():
            end_in_a_thread()
            print("then", file=sys.stderr)
            end_in_a_thread(lambda future: 1 / 0)
        raise RuntimeError("Event loop is closed")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True)
    late, others = done.stderr.split("then\n")
    assert late == "" and "ZeroDivisionError" in others, "others are still shown"
    assert "RuntimeError: Event loop is closed" in others and done.returncode == 1


def test_a_clock_that_is_set_during_a_save_changes_nothing(tmp_path, monkeypatch):
    real, jumps = time.time, itertools.cycle([0, 1e9])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with Checkpoints(tmp_path, log=pytest.fail) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {})
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(abstract(make_state(2)))[0], make_state(2))


def test_a_failed_save_stays_quiet(tmp_path, caplog):
    """asyncio logs the error of each further array when the task is freed, which may be after the context."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match="could not be saved: No space"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        checkpoints._failure = full
    logger = logging.getLogger("asyncio")
    logger.error("Task exception was never retrieved")
    assert not caplog.records
    orbax_io._until_exit.close()


def test_the_end_of_a_process_after_a_failed_save_is_quiet():
    code = "from nanoflax.runs import orbax_io; orbax_io.stay_quiet()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failed_save_whose_threads_fail_again_later_is_abandoned(tmp_path):
    full, logged = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), []
    with Checkpoints(tmp_path, log=logged.append) as checkpoints:
        manager, close = checkpoints._manager, checkpoints._manager.close
        manager.close = lambda: (close(), (_ for _ in ()).throw(full))
        checkpoints._saving, checkpoints._failure = 1, full
        checkpoints.save(2, make_state(2), {})
        late = tmp_path / "1.orbax-checkpoint-tmp" / "state"  # by a thread of the failed save
        late.mkdir(parents=True)
    assert len(logged) == 1 and "step 1 could not be saved: No space left" in logged[0]
    assert not late.parent.exists() and runs.restore_params(tmp_path)
    orbax_io._until_exit.close()


def test_logs_and_hooks_are_changed_only_while_checkpoints_are_open(tmp_path):
    logger = logging.getLogger("absl")
    before = sys.unraisablehook, logger.filters[:]
    first, second = Checkpoints(tmp_path / "1"), Checkpoints(tmp_path / "2")
    assert sys.unraisablehook is not before[0] and len(logger.filters) == len(before[1]) + 1
    first.close()  # not in the reverse order of opening
    assert sys.unraisablehook is not before[0]
    second.save(1, make_state(), {})
    second.close()
    assert (sys.unraisablehook, logger.filters) == before
    runs.restore_params(tmp_path / "2")
    with pytest.raises(UserError), Checkpoints(tmp_path / "2") as third:
        third.restore({})
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.manifest, "read_metric", lambda path: (_ for _ in ()).throw(RuntimeError))
        Checkpoints(tmp_path / "2")
    assert (sys.unraisablehook, logger.filters) == before


def test_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        assert "No space left on device" in fill_disk(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_one_process_per_workdir_and_the_lock_dies_with_it(tmp_path):
    code = """
        import os, sys, time
        from nanoflax.runs.lock import WorkdirLock
        lock = WorkdirLock(sys.argv[1])
        worker = os.fork()
        if worker: print(worker, flush=True)
        time.sleep(60)
    """
    child = run(code, tmp_path, wait=False)
    worker = int(child.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {child.pid} on {os.uname().nodename}"):
            WorkdirLock(tmp_path)
        child.kill()
        child.wait()
        with WorkdirLock(tmp_path):  # though its forked worker lives on
            os.kill(worker, 0)
            with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                WorkdirLock(tmp_path)
        WorkdirLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        child.stdout.close()


@pytest.mark.parametrize("opener", [Checkpoints, WorkdirLock])
def test_directories_that_cannot_be_written(tmp_path, opener, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: "):
        opener(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="not a local path"):
        opener("hdfs://cluster/run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written"):
        opener(tmp_path)
