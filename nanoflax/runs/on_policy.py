"""On-policy distillation: at some steps the student continues texts itself and learns what the teacher says to them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from nanoflax import parallel, peft, tokenizers
from nanoflax.alignment import TEACHER, sample_completions, training_rows
from nanoflax.config import Config, DistillTask
from nanoflax.tasks import SHORTEST
from nanoflax.train import TrainState

NumpyBatch = dict[str, np.ndarray]


class OwnSamples:
    """`Job.wrap_step`: a share task.on_policy of the steps trains on completions by the current student.

    Which steps, and their random keys, depend only on train.seed and the step. The other steps are unchanged.
    """

    def __init__(self, config: Config, model: Any, mesh: jax.sharding.Mesh, tokenizer: Any):
        assert isinstance(config.task, DistillTask)
        self.task, self.seed, self.model, self.mesh = config.task, config.train.seed, model, mesh
        self.ends = {"eos_ids": tuple(tokenizers.stop_ids(tokenizer)), "vocab_size": tokenizer.vocab_size}

    def __call__(self, step: Callable, frozen: Any) -> Callable:
        own = {name: x for name, x in frozen.items() if name != TEACHER}
        at = None

        def with_samples(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
            nonlocal at
            at = int(state.step) if at is None else at + 1  # reading the number at each step would wait for the device
            rng = np.random.default_rng((self.seed, at))
            drawn = rng.random() < self.task.on_policy
            if drawn:
                key = jax.random.PRNGKey(rng.integers(2**31))
                rows = {name: parallel.fetch(x) for name, x in batch.items()}
                rows = self.completed(peft.join(state.params, own), rows, key)
                part = parallel.own_rows(self.mesh, len(rows["first"]))
                batch = parallel.put_batch({name: x[part] for name, x in rows.items()}, self.mesh)
            state, metrics = step(state, batch)
            return state, metrics | {"on_policy": np.float32(drawn)}

        return with_samples

    def completed(self, params: Any, batch: NumpyBatch, key: jax.Array) -> NumpyBatch:
        """The rows of a batch, completed by the student; equal in all processes.

        batch: first, targets, weights as in `train.causal_lm`. A chat whose prompt leaves no room for task.new_tokens
        stays as it is. The result also has drawn [B] float32: 1 for rows that the student completed.
        """
        N, width = self.task.new_tokens, batch["targets"].shape[1]
        lengths = prompt_lengths(batch, getattr(self.task, "prompt_length", None))
        P = getattr(self.task, "prompt_length", min(width, self.task.length - N))
        fits = lengths <= P
        kept = np.where(fits, lengths, 1)
        ids = np.concatenate([batch["first"][:, None], batch["targets"]], 1)
        prompts = [row[:n].tolist() for row, n in zip(ids, kept, strict=True)]
        tokens = np.array([[0] * (P - len(row)) + row for row in prompts], np.int32)
        found = sample_completions(
            self.model, params, tokens, kept, key, max_new_tokens=N, temperature=1.0, **self.ends
        )
        T = min(-(-max(width, P + N - 1) // SHORTEST) * SHORTEST, self.task.length)
        new = training_rows(tokens, kept, found, T)
        wide = {name: np.pad(batch[name], [(0, 0), (0, T - width)]) for name in ("targets", "weights")}
        old = {"first": batch["first"]} | wide
        keep = lambda name: np.where(fits.reshape(-1, *[1] * (old[name].ndim - 1)), new[name], old[name])
        return {name: keep(name) for name in old} | {"drawn": fits.astype(np.float32)}


def prompt_lengths(batch: NumpyBatch, prompt_length: int | None) -> Int[np.ndarray, " B"]:
    """The number of tokens of each row that the student continues, at least one.

    prompt_length: at most so many, and not the last token. None: all before the last reply of a chat.
    """
    weights = batch["weights"] > 0
    last = weights.shape[1] - weights[:, ::-1].argmax(1)  # tokens up to the end of the last reply, without first
    if prompt_length is not None:
        return np.clip(last, 1, prompt_length).astype(np.int32)
    before = ~weights & (np.arange(weights.shape[1]) < last[:, None])
    return (1 + np.where(before.any(1), weights.shape[1] - before[:, ::-1].argmax(1), 0)).astype(np.int32)
