"""The teacher of a distillation: a second model, frozen, in the subtree "teacher" of the parameters of a Job."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from nanoflax import nn, parallel, peft, tokenizers
from nanoflax.alignment import TEACHER
from nanoflax.config import DistillTask
from nanoflax.errors import UserError
from nanoflax.runs.on_policy import OwnSamples
from nanoflax.runs.opening import ModelSource, Params, base_fingerprint, initialize_from, open_source
from nanoflax.runs.trainer import Job


class Teacher:
    """The teacher of a configuration. It is opened and checked here; its parameters are read by `load`.

    Raises: UserError if task.teacher is no decoder with a tokenizer, is this run, or is too short for task.length.
    """

    def __init__(self, task: DistillTask, workdir: str, mesh: jax.sharding.Mesh):
        self.task, self.name, self.mesh = task, f"task.teacher={task.teacher}", mesh
        self.fingerprint = ""  # of the parameters, set by `load`
        self.source = self._open(workdir)
        self.tokenizer = self.source.tokenizer
        self.model = nn.build(parallel.pad_vocabulary(self.source.config, mesh))

    def _open(self, workdir: str) -> ModelSource:
        if not self.task.teacher:
            raise UserError(
                "task.teacher is empty; give the model to learn from: a workdir, a directory of Transformers, a hub "
                "name or a .gguf file"
            )
        own = {os.path.realpath(os.path.join(workdir, part)) for part in ("", "final")}
        if os.path.realpath(self.task.teacher) in own:
            raise UserError(f"{self.name} is the --workdir of the student; choose another --workdir")
        try:
            source = open_source(self.task.teacher)
        except UserError as error:
            raise UserError(f"{self.name} cannot be opened: {error}") from error
        m = source.config
        if m.architecture != "decoder" or m.head != "lm":
            raise UserError(
                f"{self.name} has model.architecture={m.architecture!r} and model.head={m.head!r}; a teacher must be a "
                "decoder with the head lm, which predicts the next token"
            )
        if source.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, so its vocabulary cannot be compared with the student's")
        if self.task.length > m.context:
            raise UserError(f"task.length={self.task.length} must be at most the context of {self.name}, {m.context}")
        return source

    @property
    def shapes(self) -> Params:
        """The shapes of `load`."""
        dtype = self.task.teacher_dtype
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), parallel.param_shapes(self.model))

    def load(self) -> Params:
        """The parameters on the mesh, in shards, in task.teacher_dtype. Sets `fingerprint`.

        Raises: UserError if parameters are missing.
        """

        def read():
            try:
                params = peft.merge(self.source.load())
            except UserError as error:
                raise UserError(f"{self.name} cannot be read: {error}") from error
            plain = parallel.param_shapes(nn.build(self.source.config))
            given, needed = (dict[str, Any](flatten_dict(tree, sep="/")) for tree in (params, plain))
            if wrong := [path for path, x in needed.items() if path not in given or given[path].shape != x.shape]:
                raise UserError(f"{self.name} has no parameter {wrong[0]} of shape {needed[wrong[0]].shape}")
            self.fingerprint = base_fingerprint(params, needed.keys())
            return params

        return initialize_from(self.model, read, 0, self.mesh, self.task.teacher_dtype)

    def check_vocabulary(self, tokenizer: Any, student: str) -> None:
        """Raises: UserError if a token of the student's tokenizer has another id in the teacher, or none.

        The teacher may have more tokens; the probabilities of the student's tokens are compared.
        """
        if tokenizer.fingerprint == self.tokenizer.fingerprint:
            return
        own, known = tokenizers.token_ids(tokenizer), tokenizers.token_ids(self.tokenizer)
        other = [token for token, i in own.items() if known.get(token) != i]
        if other:
            token = min(other, key=lambda token: own[token])
            raise UserError(
                f"{self.name} has another vocabulary than {student}: {len(other):,} of the student's {len(own):,} "
                f"tokens have another id there or none, such as {token!r} (id {own[token]}, there "
                f"{known.get(token, 'none')}); a teacher must have the tokenizer of its student"
            )

    def teach(self, objective: Callable, tokenizer: Any) -> Callable:
        """The objective with this teacher. tokenizer: of the student."""
        return partial(objective, teacher=self.model, vocab_size=tokenizer.vocab_size)

    def join(self, job: Job) -> Job:
        """The Job of the student, with the teacher in the parameters that it loads and does not train."""
        assert job.load is not None and job.trained is not None  # finetune sets both
        load, shapes = job.load, self.shapes
        return dataclasses.replace(
            job,
            shapes=job.shapes | {TEACHER: shapes},
            load=lambda: load() | {TEACHER: self.load()},
            trained=job.trained | {TEACHER: jax.tree.map(lambda _: False, shapes)},
            other_models=(*job.other_models, TEACHER),
            wrap_step=OwnSamples(job.config, job.model, job.mesh, job.tokenizer()) if self.task.on_policy else None,
        )
