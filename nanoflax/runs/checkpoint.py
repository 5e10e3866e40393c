"""Checkpoints: orbax saves and restores, a manifest proves them, a damaged one is stepped over.

A checkpoint directory holds

    <step>/state/            the arrays, written by orbax (OCDBT: a few files, whatever the tree)
    <step>/meta/metadata     the JSON given as `meta`
    <step>/manifest.json     the metric, and the size and CRC-32 of every file above
    damaged-<step>/          a step that failed its check, moved out of the way, never deleted

orbax writes a step under a temporary name and renames it when it is whole. The manifest is written
just before that rename, by the same background thread, so no committed step is without one: a kill
leaves either a step that can be proven or a temporary directory, which the next writer removes.
Nothing is synced to the disk, so a power cut may damage the newest step; the manifest tells.

Of several processes all write their own parts, so the directory lies on a file system that they
share; process 0 commits, writes manifests, and decides for all which step is read.
"""

import errno
import json
import logging
import math
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nanoflax import parallel
from nanoflax.errors import UserError
from nanoflax.runs import manifest
from nanoflax.runs.lock import make_writable

_DISK_ERRORS = [
    os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
]

# orbax narrates every save, and failed ones with tracebacks; what matters comes as an exception.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _unraisablehook(event, shown=sys.unraisablehook):
    # The first array that a full disk refuses closes orbax's event loop; tensorstore's threads
    # then print that they cannot tell it of the others.
    if not (event.exc_type is RuntimeError and str(event.exc_value) == "Event loop is closed"):
        shown(event)


sys.unraisablehook = _unraisablehook


# Reading: no function here changes a directory, so a sampler may use one that is being written.


def list_steps(directory):
    """Committed steps, ascending; [] when there is no such directory."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def read_metadata(directory, step=None, which="latest", log=print):
    """The `meta` saved with a step; chooses and raises as `restore_params` does."""
    return _read_meta(directory, _choose(directory, step, which, log))


def restore_params(directory, step=None, which="latest", shardings=None, subtree="params", log=print):
    """Reads one subtree of a saved state, its structure taken from the checkpoint itself.

    No other array is read. `shardings` is a sharding, a tree of them, or a function from the tree
    of ShapeDtypeStructs to either; None means the default device. Lists and dicts come back as
    they were, tuples as lists, stacked blocks as a tree per block. A damaged step is named through
    `log` and the one before it used. Of several processes all call it at once.

    Returns:
      (the subtree, meta).
    Raises:
      UserError: no usable step, `step` absent or damaged, no such subtree.
    """
    step = parallel.run_on_main_process(lambda: _choose(directory, step, which, log))
    saved = _saved_tree(directory, step)
    if subtree not in saved:
        raise UserError(f"{directory}: step {step} has no {subtree!r}, only {sorted(saved)}")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[subtree])
    if callable(shardings):
        shardings = shardings(target)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        target = jax.tree.map(lambda x: _placed(x, shardings), target)
    else:
        target = jax.tree.map(_placed, target, shardings)
    state = _read_arrays(directory, step, {subtree: target}, partial_restore=True)
    return parallel.unstack(state[subtree]), _read_meta(directory, step)


class Checkpoints:
    """The checkpoints of one run, opened for writing by all of its processes.

    Keeps the `keep` newest steps, the best one besides, and every multiple of `keep_every`.
    Opening removes the temporary directories that a kill left.

    Raises:
      UserError: the directory cannot be written, or is not a local path.
    """

    def __init__(self, directory, keep=2, keep_every=None, asynchronous=True, log=print):
        if keep < 1:
            raise UserError(f"keep={keep}: give 1 or more, to keep the newest checkpoint")
        self.directory = make_writable(directory)
        self._keep, self._keep_every = keep, keep_every
        self._asynchronous, self._log = asynchronous, log
        self._open()

    def _open(self):
        """Starts orbax on what is on the disk, also after a failure or a change behind its back."""
        if jax.process_index() == 0:  # by hand: orbax's own cleaning ends some time later
            for path in self.directory.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)
        parallel.gather_from_processes("opened")
        self._metrics = {step: manifest.read_metric(self.directory / str(step)) for step in self.steps()}
        self._saving = None
        registry = ocp.DefaultCheckpointHandlerRegistry()
        # Uncompressed: trained floats shrink by 8% for as much CPU time as all the rest of a save.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry.add("state", ocp.args.PyTreeSave, handler)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # metrics are read from our manifests instead
                save_root_metadata=False,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
            handler_registry=registry,
        )

    def should_preserve(self, checkpoints, *, context):
        """orbax's PreservationPolicy; old steps go only after the new one is committed."""
        del context
        found = [c.step for c in checkpoints]
        kept = set(sorted(found)[-self._keep :])
        kept.add(_best({s: self._metrics.get(s) for s in found}))
        if self._keep_every:
            kept.update(s for s in found if s % self._keep_every == 0)
        return [s in kept for s in found]

    def save(self, step, state, meta, metric=None):
        """Starts saving `state` (a tree of arrays) and `meta` (JSON) and returns.

        The caller may donate or change both at once. Waits first for the save before this one. A
        step that is saved already only gets the metric, if it has none.

        Returns:
          False if the step is saved already, else True.
        Raises:
          UserError: the disk refused this save or the one before it, or a later step exists.
        """
        self.wait()
        found = parallel.run_on_main_process(self.steps)
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        if step in found:
            if metric is not None and self._metrics.get(step) is None:
                self._metrics[step] = metric
                if jax.process_index() == 0:
                    manifest.set_metric(self.directory / str(step), metric)
            return False
        if found and step < found[-1]:
            raise UserError(f"{self.directory}: cannot save step {step} before step {found[-1]}")
        meta = json.loads(json.dumps(meta))
        self._metrics[step] = metric
        self._saving = step
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(jax.tree.map(_own, state)), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, force=True)  # force: the caller decides when
        except OSError as error:
            self._abandon(error)
        if not self._asynchronous:
            self.wait()
        return True

    def wait(self):
        """Blocks until the last save is committed; raises UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever type orbax or tensorstore chose for a full disk
            self._abandon(error)
        self._saving = None

    def close(self):
        """Waits, raising as `wait` does, and releases orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self):
        """Committed steps, ascending."""
        return list_steps(self.directory)

    def latest(self):
        """The newest committed step, or None; all processes ask at once."""
        return max(parallel.run_on_main_process(self.steps), default=None)

    def metric(self, step):
        """The metric that a step was saved with or got later, or None."""
        return self._metrics.get(step)

    def best(self):
        """The committed step of the lowest metric (of equals the newest), or None."""
        return _best({s: self._metrics.get(s) for s in self.steps()})

    def restore(self, abstract_state, step=None):
        """Restores onto the shardings of `abstract_state`, a tree of jax.ShapeDtypeStruct.

        Without `step` the newest sound one; damaged ones are named, and moved to `damaged-<step>`.
        It does not matter whether the run that saved it stacked its blocks.

        Returns:
          (state, meta).
        Raises:
          UserError: no sound step, `step` absent or damaged, or the saved paths, shapes or dtypes
            are not those asked for (the differences are listed).
        """
        self.wait()
        step = self._sound_step(step)
        stacked = parallel.is_stacked(abstract_state)
        if parallel.is_stacked(_saved_tree(self.directory, step)) != stacked:
            to, back = parallel.stack, parallel.unstack
            to, back = (to, back) if stacked else (back, to)
            state, meta = self.restore(back(abstract_state), step)
            places = jax.tree.map(lambda x: x.sharding, abstract_state)
            return jax.jit(to, out_shardings=places)(state), meta
        check_same_shapes(f"{self.directory}: step {step}", _saved_tree(self.directory, step), abstract_state)
        target = jax.tree.map(lambda x: _placed(x, getattr(x, "sharding", None)), abstract_state)
        return _read_arrays(self.directory, step, target), _read_meta(self.directory, step)

    def _sound_step(self, step):
        """As `_choose`, decided and damage moved aside by process 0 for all of them."""

        def choose():
            chosen, problem, moved = None, None, []
            try:
                chosen = _choose(self.directory, step, "latest", self._log, moved.append)
            except UserError as error:
                problem = str(error)
            for damaged in moved:
                _move_aside(self.directory, damaged, self._log)
            return chosen, problem, moved

        chosen, problem, moved = parallel.run_on_main_process(choose)
        if moved:
            self._manager.close()
            self._open()
        if problem:
            raise UserError(problem)
        return chosen

    def _abandon(self, error):
        """Turns a failed save into a UserError and leaves nothing of it on the disk.

        Of several processes the others may know of no failure: this one leaves, and they with it.
        """
        step = self._saving
        if jax.process_count() == 1:
            self._manager.close()
            self._open()
        reason = next((text for text in _DISK_ERRORS if text in str(error)), repr(error)[:200])
        raise UserError(f"{self.directory}: step {step} could not be saved: {reason}") from error

    def _write_manifest(self):
        """Runs in orbax's commit thread of process 0, when all hosts' files are in place."""
        (path,) = self.directory.glob(f"{self._saving}.*")
        manifest.write(path, self._metrics[self._saving])


# Helpers.


def _own(x):
    """On a CPU "device to host" is a view, and donating a viewed buffer quietly copies it."""
    if not isinstance(x, jax.Array) or next(iter(x.devices())).platform != "cpu":
        return x
    return jax.device_put(x, x.sharding, may_alias=False)


def _placed(x, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _state_path(directory, step):
    return epath.Path(pathlib.Path(directory).resolve()) / str(step) / "state"


def _saved_tree(directory, step):
    return ocp.PyTreeCheckpointHandler().metadata(_state_path(directory, step)).tree


def _read_arrays(directory, step, target, partial_restore=False):
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial_restore
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(_state_path(directory, step), args=args)


def _read_meta(directory, step):
    return ocp.JsonCheckpointHandler().restore(_state_path(directory, step).parent / "meta")


def check_same_shapes(what, saved, wanted):
    """Raises UserError where paths, shapes or dtypes of two trees differ: orbax would cast."""

    def leaves(tree):
        flat = ocp.tree.to_flat_dict(tree, keep_empty_nodes=True)
        return {
            ".".join(path): f"{np.dtype(x.dtype).name}{list(x.shape)}" if hasattr(x, "shape") else "nothing"
            for path, x in flat.items()
        }

    saved, wanted = leaves(saved), leaves(wanted)
    pairs = {
        path: (saved.get(path, "absent"), wanted.get(path, "absent")) for path in sorted(saved.keys() | wanted.keys())
    }
    lines = [f"{path} is {a}, not {b}" for path, (a, b) in pairs.items() if a != b]
    if lines:
        more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise UserError(f"{what} does not fit: {'; '.join(lines[:10])}{more}")


def _best(metrics):
    scored = [(metric, -step) for step, metric in metrics.items() if metric is not None]
    return -min(scored)[1] if scored else None


def _choose(directory, step, which, log, on_damage=lambda step: None):
    """The step to read: `step`, else the newest or best that is sound. Raises UserError."""
    if which not in ("latest", "best"):
        raise UserError(f"which={which!r}: give 'latest' or 'best'")
    directory = pathlib.Path(directory)
    found = list_steps(directory)
    if not found or (step is not None and step not in found):
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"{directory}: no checkpoint{wanted}; the steps there are {found}")
    if step is not None:
        if problem := manifest.find_damage(directory / str(step)):
            raise UserError(f"{directory}: step {step} is damaged: {problem}")
        return step
    candidates = found[::-1]
    if which == "best":  # then the newest
        metrics = {s: manifest.read_metric(directory / str(s)) for s in candidates}
        candidates.sort(key=lambda s: math.inf if metrics[s] is None else metrics[s])
    for candidate in candidates:
        problem = manifest.find_damage(directory / str(candidate))
        if problem is None:
            return candidate
        log(f"warning: {directory}: step {candidate} is damaged ({problem}) and is not used")
        on_damage(candidate)
    raise UserError(f"{directory}: every checkpoint is damaged: steps {found}")


def _move_aside(directory, step, log):
    target = directory / f"damaged-{step}"
    while target.exists():
        target = target.with_name(target.name + "-again")
    (directory / str(step)).rename(target)
    log(f"warning: {directory}: step {step} was moved to {target.name}")
