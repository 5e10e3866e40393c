"""Checkpoints: orbax saves and restores them, a manifest with checksums reveals damage, damaged steps are skipped.

A checkpoint directory holds

    <step>/state/            the arrays, written by orbax (OCDBT: a few files for any number of arrays)
    <step>/meta/metadata     the argument `meta` of `save`, as JSON
    <step>/manifest.json     the step, the metric, and the size and CRC-32 of every file above
    damaged-<step>/          a damaged step, renamed and never deleted

orbax writes a step under a temporary name and renames it when it is complete. A callback writes the
manifest just before the renaming, so every committed step has a manifest. A killed run leaves complete
steps and perhaps a temporary directory, which the next run removes. Files are not synced to the disk,
so a power failure may damage the newest step; the manifest shows the damage.

In object storage (a local directory points there, or the name begins with gs:// or s3://) nothing is renamed: see
`step_files`. `before_commit` of `remote` is called before a step is committed there.

In a run of several processes each process writes its own parts, so all must share the file system.
Process 0 commits, writes manifests, and chooses the step that all processes read.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from nanoflax import parallel, report, untrusted
from nanoflax.errors import DISK_ERRORS, FULL, UserError, listed
from nanoflax.runs import manifest, orbax_io, remote, step_files
from nanoflax.runs.lock import Path, make_writable
from nanoflax.runs.step_files import AnyPath
from nanoflax.storage import RemotePath

Log = Callable[[str], Any]  # receives warnings, each of one line


# Reading. These functions do not change a directory, so another process may write it at the same time.


REPAIR = "copy an undamaged one there, choose another --workdir, or move the directory away to begin again"


def check_not_all_damaged(directory: Path) -> None:
    """Raises: UserError if all steps of a run were moved to damaged-<step>: the run must not begin again in silence."""
    damaged = step_files.list_damaged(step_files.path_of(directory))
    if damaged and not list_steps(directory):
        raise UserError(f"{directory}: every checkpoint is damaged: {', '.join(damaged)}; {REPAIR}")


def list_steps(directory: Path) -> list[int]:
    """Committed steps, ascending; [] if there is no such directory."""
    return step_files.list_steps(step_files.path_of(directory))


def read_metadata(directory: Path, step: int | None = None, which: str = "latest", log: Log = print) -> Any:
    """The `meta` saved with a step. Arguments and errors are those of `restore_params`."""
    path = step_files.path_of(directory)
    return _read_meta(path, _choose_step(path, step, which, log))


def restore_params(
    directory: Path,
    step: int | None = None,
    which: str = "latest",
    shardings: Any = None,
    subtree: str = "params",
    log: Log = print,
) -> tuple[PyTree, Any]:
    """Reads only one subtree of a saved state. All processes must call it.

    step: default the newest (which="latest") or the best step; a damaged step is reported to `log`, and
    the next one is tried. shardings: a sharding, a tree of shardings, or a function that makes one of
    these from a tree of ShapeDtypeStructs; None means the default device.

    Returns (the subtree, meta). Tuples become lists, and stacked blocks become one tree for each block.
    Raises: UserError if no step is usable, or `step` does not exist, is damaged or lacks the subtree.
    """
    path = step_files.path_of(directory)
    chosen: int = parallel.run_on_main_process(lambda: _choose_step(path, step, which, log))
    saved = orbax_io.read_shapes(path, chosen)
    if subtree not in saved:
        raise UserError(f"{path}: step {chosen} has no {subtree!r}, only {sorted(saved)}")
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[subtree])
    if callable(shardings):
        shardings = shardings(target)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        target = jax.tree.map(lambda x: orbax_io.with_sharding(x, shardings), target)
    else:
        target = jax.tree.map(orbax_io.with_sharding, target, shardings)
    state = orbax_io.read_arrays(path, chosen, {subtree: target}, partial_restore=True)
    return parallel.unstack(state[subtree]), _read_meta(path, chosen)


class DiskFull(UserError):
    """A save failed, and may succeed later, when there is room."""


class Checkpoints:
    """The checkpoints of one run, for writing by all of its processes. Use as a context manager.

    Keeps the `keep` newest steps and the best one. Opening removes temporary directories of a killed
    run. In the context, orbax logs nothing (`orbax_io.quiet_orbax`).

    Raises: UserError if the directory cannot be written.
    """

    def __init__(self, directory: Path, keep: int = 2, log: Log = print):
        if keep < 1:
            raise UserError(f"keep={keep}: give 1 or more, to keep the newest checkpoint")
        path = step_files.path_of(directory)
        self.directory = path if isinstance(path, RemotePath) else make_writable(directory)
        self._keep, self._log = keep, log
        with contextlib.ExitStack() as stack:
            stack.enter_context(orbax_io.quiet_orbax())
            self._open()
            self._on_close = stack.pop_all()

    def _open(self):
        """Starts orbax with the steps on the disk."""
        orbax_io.use_steady_clock()
        self._remove_unfinished()  # orbax would do this too, but later
        parallel.gather_from_processes("opened")
        self._metrics = {step: manifest.read_metric(self.directory / str(step)) for step in self.steps()}
        self._saving = self._failure = None
        registry = ocp.DefaultCheckpointHandlerRegistry()
        # Compression would save 8% of the size and double the CPU time of a save.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry.add("state", ocp.args.PyTreeSave, handler)
        self._manager = ocp.CheckpointManager(
            orbax_io.directory_for_orbax(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # metrics are read from our manifests instead
                save_root_metadata=False,
                # If a full disk stops a thread that makes directories, orbax waits for it for twenty minutes.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._write_manifest, create_directories_asynchronously=False
                ),
            ),
            handler_registry=registry,
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """orbax's PreservationPolicy; orbax calls it after the new step is committed."""
        del context
        steps = [c.step for c in checkpoints]
        kept = self._kept(steps)
        return [s in kept or isinstance(self.directory, RemotePath) for s in steps]

    def _kept(self, steps: Sequence[int]) -> set[int | None]:
        return {*sorted(steps)[-self._keep :], _best_step({s: self._metrics.get(s) for s in steps})}

    def _remove_old_remote_steps(self):
        """orbax would delete the files of a remote step in any order; here its commit marker is deleted first."""
        if isinstance(self.directory, RemotePath) and jax.process_index() == 0:
            steps = self.steps()
            for step in set(steps) - self._kept(steps):
                step_files.remove_step(self.directory, step)

    def save(self, step: int, state: PyTree, meta: Any, metric: float | None = None) -> bool:
        """Saves `state` (a tree of arrays) and `meta` (JSON) in the background, after the previous save.

        When this method returns, the caller may donate or change both. If the step is already saved, only
        a missing metric is added. For the previous save see `finish_previous`; `wait` raises for the last one.

        Returns False if the step is already saved, else True.
        Raises: UserError if this save or the previous one failed for another reason, or a later step exists.
        """
        self.finish_previous(step)
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
        meta = json.loads(report.to_json(meta))
        self._metrics[step] = metric
        self._saving = step
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(orbax_io.copy_on_cpu, state)), meta=ocp.args.JsonSave(meta)
        )
        try:
            self._manager.save(step, args=args, force=True)  # force: the caller decides when
        except (OSError, UserError) as error:
            self._failure = error  # for `wait`
        return True

    def finish_previous(self, step: int) -> None:
        """Blocks until the save before that of `step` is committed. If it failed because the disk is full, a line is
        logged. Raises: UserError if it failed for another reason."""
        try:
            self.wait()
        except DiskFull as error:
            self._log(f"warning: {error}; the training goes on, and step {step} is saved instead")

    def wait(self) -> None:
        """Blocks until the last save is committed. Raises: UserError if it failed."""
        error, self._failure = self._failure, None
        try:
            self._manager.wait_until_finished()
        except Exception as later:  # orbax and tensorstore raise several types for a full disk
            error = error or later
        if error:
            self._abandon(error)
        if self._saving is not None:
            self._remove_old_remote_steps()
        self._saving = None

    def close(self) -> None:
        """Waits, raising as `wait` does, and releases orbax's threads."""
        try:
            self.wait()
        finally:
            self._close_manager()
            self._remove_unfinished()  # threads of a failed save may have made files after it was abandoned
            self._on_close.close()

    def _close_manager(self):
        with contextlib.suppress(Exception):  # the errors of a failed save, of which `wait` has raised the first
            self._manager.close()

    def _remove_unfinished(self):
        if jax.process_index() == 0:
            step_files.remove_unfinished(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return step_files.list_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step, or None. All processes must call it."""
        return max(parallel.run_on_main_process(self.steps), default=None)

    def metric(self, step: int) -> float | None:
        """The metric of a step, or None."""
        return self._metrics.get(step)

    def best(self) -> int | None:
        """The committed step with the lowest metric (if equal, the newest), or None."""
        return _best_step({s: self._metrics.get(s) for s in self.steps()})

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, Any]:
        """Restores a state with the shardings of `abstract_state`, a tree of jax.ShapeDtypeStruct.

        step: default the newest undamaged step; damaged steps are reported and renamed to
        damaged-<step>. Blocks may be stacked in the saved state and not in `abstract_state`, or the
        reverse.

        Returns (state, meta).
        Raises: UserError if all steps are damaged, `step` does not exist or is damaged, or paths,
        shapes or dtypes differ from the saved ones (the message lists the differences).
        """
        self.wait()
        chosen: int = self._choose_undamaged(step)
        stacked, saved = parallel.is_stacked(abstract_state), orbax_io.read_shapes(self.directory, chosen)
        if parallel.is_stacked(saved) != stacked:
            groups = parallel.groups_of(abstract_state if stacked else saved)
            convert, revert = partial(parallel.stack, groups=groups), parallel.unstack
            if not stacked:
                convert, revert = revert, convert
            state, meta = self.restore(revert(abstract_state), chosen)
            places = jax.tree.map(lambda x: x.sharding, abstract_state)
            return jax.jit(convert, out_shardings=places)(state), meta
        check_same_shapes(f"{self.directory}: step {chosen}", saved, abstract_state)
        target = jax.tree.map(lambda x: orbax_io.with_sharding(x, getattr(x, "sharding", None)), abstract_state)
        return orbax_io.read_arrays(self.directory, chosen, target), _read_meta(self.directory, chosen)

    def _choose_undamaged(self, step):
        """`_choose_step`, called by process 0 for all processes. Damaged steps are renamed."""

        def choose():
            chosen, problem, damaged = None, None, []
            try:
                chosen = _choose_step(self.directory, step, "latest", self._log, damaged.append)
            except UserError as error:
                problem = str(error)
            for s in damaged:
                step_files.set_aside(self.directory, s, self._log)
            return chosen, problem, damaged

        chosen, problem, damaged = parallel.run_on_main_process(choose)
        if damaged:
            self._manager.close()
            self._open()
        if problem:
            raise UserError(problem)
        return chosen

    def _abandon(self, error):
        """Removes the files of a failed save and raises a UserError.

        In a run of several processes, the others learn of the failure when this process has exited.
        """
        step, kind = self._saving, UserError
        orbax_io.stay_quiet()
        reason = next((text for text in map(os.strerror, DISK_ERRORS) if text in str(error)), repr(error)[:200])
        if jax.process_count() == 1:
            self._close_manager()
            self._open()
            if reason in map(os.strerror, FULL):
                kind = DiskFull
        raise kind(f"{self.directory}: step {step} could not be saved: {reason}") from error

    def _write_manifest(self):
        """Called by orbax's commit thread on process 0 when all processes have written their files."""
        step = self._saving
        assert step is not None
        manifest.write(step_files.being_written(self.directory, step), step, self._metrics[step])
        remote.before_commit(self.directory)


def check_same_shapes(what: str, saved: PyTree, wanted: PyTree) -> None:
    """Raises: UserError if paths, shapes or dtypes of two trees differ. (orbax would cast without a message.)"""

    def describe(tree):
        flat = ocp.tree.to_flat_dict(tree, keep_empty_nodes=True)
        return {
            ".".join(path): f"{np.dtype(x.dtype).name}{list(x.shape)}" if hasattr(x, "shape") else "nothing"
            for path, x in flat.items()
        }

    old, new = describe(saved), describe(wanted)
    pairs = {path: (old.get(path, "absent"), new.get(path, "absent")) for path in sorted(old.keys() | new.keys())}
    if lines := [f"{path} is {a}, not {b}" for path, (a, b) in pairs.items() if a != b]:
        raise UserError(f"{what} does not fit: {listed(lines, 10)}")


def _read_meta(directory, step):
    path = directory / str(step) / "meta"
    if isinstance(path, RemotePath):
        return untrusted.json_object((path / "metadata").read_bytes(), str(path / "metadata"))
    return untrusted.json_object(untrusted.read_bytes(path, "metadata"), path / "metadata")


def _best_step(metrics: Mapping[int, float | None]) -> int | None:
    """The step with the lowest metric (if equal, the newest); None if no step has a metric."""
    scored = [(metric, -step) for step, metric in metrics.items() if metric is not None]
    return -min(scored)[1] if scored else None


def _choose_step(
    directory: AnyPath, step: int | None, which: str, log: Log, on_damage: Callable[[int], None] = lambda step: None
) -> int:
    """The step to read: `step`, else the newest or best undamaged one. Raises: UserError.

    on_damage: called with each damaged step that is skipped.
    """
    if which not in ("latest", "best"):
        raise UserError(f"which={which!r}: give 'latest' or 'best'")
    found = step_files.list_steps(directory)
    if not found or (step is not None and step not in found):
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"{directory}: no checkpoint{wanted}; the steps there are {found}")
    if step is not None:
        if problem := manifest.find_damage(directory / str(step)):
            raise UserError(f"{directory}: step {step} is damaged: {problem}")
        return step
    candidates = found[::-1]
    if which == "best":  # sort by metric; without a metric, or if equal, the newest first
        metrics = {s: manifest.read_metric(directory / str(s)) for s in candidates}
        candidates.sort(key=lambda s: math.inf if (metric := metrics[s]) is None else metric)
    for candidate in candidates:
        problem = manifest.find_damage(directory / str(candidate))
        if problem is None:
            return candidate
        log(f"warning: {directory}: step {candidate} is damaged ({problem}) and is not used")
        on_damage(candidate)
    raise UserError(f"{directory}: every checkpoint is damaged: steps {found}; {REPAIR}")
