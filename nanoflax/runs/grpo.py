"""The steps of group relative policy optimization: draw completions, reward them, update.

One step of a run is one batch of completions and task.updates updates of the policy from them. The numbers of a step
depend only on the state before it, so a resumed run repeats them, and writes the same lines of rollouts.jsonl.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nanoflax import alignment, parallel, peft, report, tasks, tokenizers
from nanoflax import config as configs
from nanoflax.alignment import Completions, Reward
from nanoflax.config import GRPO, Config
from nanoflax.errors import UserError
from nanoflax.runs.opening import Params, base_fingerprint
from nanoflax.runs.trainer import Job
from nanoflax.train import TrainState

ROLLOUTS = 1  # folded into the key of a step, whose first use is dropout
FILE = "rollouts.jsonl"


class Policy:
    """What a run of grpo adds to its Job.

    batches: a tasks.PromptBatches. load: the initial parameters on the mesh, for a reference that is a copy.
    Raises: UserError if the reward needs answers, or prompts that are texts, and the problems have none.
    """

    def __init__(
        self,
        workdir: str,
        config: Config,
        model: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        batches: Any,
        reward: Reward,
        load: Callable[[], Params],
    ):
        self.workdir, self.config, self.model, self.tokenizer, self.mesh = workdir, config, model, tokenizer, mesh
        self.task: GRPO = config.task  # type: ignore  # see finetune
        self.batches, self.reward, self._load = batches, reward, load
        check_problems(reward, batches.rows.examples)
        self._told = False  # about the first completion without a reward
        self._copy: Params | None = None  # of the initial parameters, if the reference needs one
        self._log: Any = None
        full = batches.length + self.task.target_length - 1
        # T of training rows, a multiple for attention kernels
        self.length = min(full + -full % tasks.SHORTEST, config.model.context)
        self._reference = jax.jit(parallel.with_mesh(mesh, self._reference_log_probabilities))

    # For the trainer.

    def join(self, job: Job) -> Job:
        """The Job with batches of completions, which its steps draw."""
        B, T = self.config.train.batch_size, self.length
        shapes = {"first": (B,), "targets": (B, T), "weights": (B, T), "old": (B, T), "advantages": (B,), "scale": (B,)}
        shapes |= {"reference": (B, T)} if self.task.beta else {}
        dtypes = {"first": jnp.int32, "targets": jnp.int32}

        def shape(name):
            sharding = parallel.batch_sharding(self.mesh, len(shapes[name]))
            return jax.ShapeDtypeStruct(shapes[name], dtypes.get(name, jnp.float32), sharding=sharding)

        batch = {name: shape(name) for name in shapes}
        return dataclasses.replace(job, batch=batch, wrap_step=self.wrap_step, keeps_initial=self.needs_copy)

    @property
    def needs_copy(self) -> bool:
        """Whether the reference is a copy of the initial parameters: parameters under adapters are their own."""
        p = self.config.peft
        only_adapters = not isinstance(p, configs.FullFineTuning) and p.trained in ("", "adapters")
        return self.task.beta > 0 and not only_adapters

    def load_reference(self) -> str:
        """Load the copy. Returns its fingerprint, by which a resumed run recognizes it."""
        self._copy = peft.without_adapters(self._load())
        fingerprint = base_fingerprint(self._copy, flatten_dict(self._copy, sep="/").keys())
        if self.config.train.scan_layers:
            self._copy = parallel.stack(self._copy, self.config.model.layer_groups)
        return fingerprint

    def wrap_step(self, step: Callable, frozen: Params) -> Callable:
        """The step (state, prompts of PromptBatches on the mesh) -> (state, metrics)."""

        def rollout_step(state: TrainState, prompts: dict) -> tuple[TrainState, dict]:
            batch, metrics = self.rollout(state, frozen, {name: parallel.fetch(x) for name, x in prompts.items()})
            at, sharding, mismatch = np.int32(state.step), state.step.sharding, None
            for update in range(self.task.updates):
                if update:  # all updates count as one step
                    state = state._replace(step=jax.device_put(at, sharding))
                state, found = step(state, batch)
                mismatch = found["mismatch"] if mismatch is None else mismatch
            return state, found | metrics | {"mismatch": mismatch}

        return rollout_step

    # A step.

    def rollout(
        self, state: TrainState, frozen: Params, prompts: dict[str, np.ndarray]
    ) -> tuple[dict[str, jax.Array], dict[str, float]]:
        """(a batch of completions on the mesh, its metrics). Writes the completions to rollouts.jsonl.

        Raises: UserError if the reward fails for all completions.
        """
        task, params = self.task, peft.join(state.params, frozen) if frozen else state.params
        tokens, lengths = prompts["prompts"], prompts["lengths"]
        found = alignment.sample_completions(
            self.model,
            params,
            tokens,
            lengths,
            jax.random.fold_in(jax.random.fold_in(np.asarray(state.rng), int(state.step)), ROLLOUTS),
            max_new_tokens=task.target_length,
            eos_ids=tokenizers.stop_ids(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            **{name: getattr(task, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        )
        problems = [self.batches.rows.examples[i] for i in prompts["problems"]]
        texts = self.texts(found)
        values, failures = parallel.run_on_main_process(lambda: self._rewards(texts, problems))
        rewards = np.array(values, np.float64)
        advantages, std = alignment.advantages(rewards, task.group, task.scale_rewards)
        used = ~np.isnan(rewards) & (found.ended | (not task.mask_truncated))
        batch = alignment.training_rows(tokens, lengths, found, self.length)
        batch["weights"] *= used[:, None]
        batch["advantages"] = advantages
        batch["scale"] = alignment.row_scales(batch["weights"].sum(1), task.normalization, task.target_length)
        own = parallel.own_rows(self.mesh, len(tokens))
        placed = parallel.put_batch({name: x[own] for name, x in batch.items()}, self.mesh)
        if task.beta:
            reference = self._copy if self._copy is not None else peft.without_adapters(params)
            placed["reference"] = self._reference(reference, placed)
        self._write(int(state.step) + 1, problems, texts, found, rewards, advantages)
        known = rewards[~np.isnan(rewards)]
        return placed, {
            "rollout_reward": known.mean(),
            "rollout_reward_std": known.std(),
            "equal_groups": float((std == 0).mean()),
            "completion_length": found.mask.sum(1).mean(),
            "truncated": 1 - found.ended.mean(),
            "rewards_failed": len(failures),
        }

    def texts(self, found: Completions) -> list[str]:
        """The texts of completions, without the ids that end them."""
        counts = found.mask.sum(1) - found.ended
        return [self.tokenizer.decode(row[:n].tolist()) for row, n in zip(found.tokens, counts, strict=True)]

    def _rewards(self, texts: list[str], problems: list) -> tuple[list[float], list[str]]:
        values, failures = self.reward(texts, problems)
        if failures and not self._told:
            self._told = True
            print(f"{failures[0]}; such completions get no weight, and rewards_failed counts them")
        return values.tolist(), failures

    def _reference_log_probabilities(self, params, batch):
        return alignment.log_probabilities(self.model, params, batch, temperature=self.task.temperature)

    def _write(self, step, problems, texts, found, rewards, advantages):
        """Add the lines of a step to rollouts.jsonl, on process 0."""
        if not parallel.is_main_process():
            return
        if self._log is None:  # lines after the restored checkpoint are written again
            self._log = report.MetricsLog(self.workdir, tensorboard=False, resume_step=step - 1, name=FILE)
        for i, problem in enumerate(problems):
            self._log.log(
                step,
                prompt=problem.prompt,
                completion=texts[i],
                reward=float(rewards[i]),
                advantage=float(advantages[i]),
                tokens=int(found.mask[i].sum()),
                ended=bool(found.ended[i]),
                place=problem.place,
            )

    def close(self) -> None:
        if self._log:
            self._log.close()


def open_reward(task: GRPO, open_run: Callable[[str], Any], function: Callable | None = None) -> Reward:
    """The Reward of a task configuration, or of a function that was given from Python. open_run: opens the reward
    model of model:SOURCE, whose reward is the score of a prompt with its completion.

    Raises: UserError if task.reward names no reward.
    """
    if function is not None:
        return Reward(task.reward, function, task.reward_seconds)
    kind, _, source = task.reward.partition(":")
    if kind != "model" or not source:
        return alignment.open_reward(task.reward, task.reward_seconds)
    if jax.process_count() > 1:
        raise UserError(f"task.reward={task.reward} works in one process, not in {jax.process_count()}")
    try:
        scorer = open_run(source)
    except UserError as error:
        raise UserError(f"task.reward={task.reward} cannot be opened: {error}") from error
    if not (scorer.task and scorer.task.gives_score):
        raise UserError(f"task.reward={task.reward} is no reward model; train one with --config.task.kind=reward")

    def whole(problem, completion):
        if isinstance(problem.prompt, str):
            return problem.prompt + completion
        return [*problem.prompt, {"role": "assistant", "content": completion}]

    def scores(completions, problems):
        return scorer.rewards([whole(*pair) for pair in zip(problems, completions, strict=True)])

    return Reward(task.reward, scores, task.reward_seconds, takes_all=True)


def check_problems(reward: Reward, problems: list) -> None:
    """Print how many problems lack the answer that the reward needs. Raises: UserError if all do, or if a prompt is a
    chat and the reward continues a text."""
    chats = [problem for problem in problems if not isinstance(problem.prompt, str)] if reward.continues_prompt else []
    if chats:
        raise UserError(
            f"task.reward={reward.name} continues the program in the prompt, but the prompt of {chats[0].place} is a "
            "chat; use tests"
        )
    missing = [problem for problem in problems if not problem.answer] if reward.needs_answer else []
    if missing and len(missing) == len(problems):
        raise UserError(
            f"task.reward={reward.name} compares with the answer of a problem, and no problem has one; name the field "
            "with --config.data.fields=answer=NAME, or choose another task.reward"
        )
    if missing:
        print(f"{len(missing):,} problems have no answer, the first is {missing[0].place}; task.reward={reward.name} "
              "says nothing about them")  # fmt: skip


def reward_to_evaluate(task: Any, open_run: Callable[[str], Any], given: Any) -> Reward | None:
    """The reward for an evaluation of an opened run: a function or name, or None for that of the run.

    Raises: UserError if the run's reward is a function: the directory may be a stranger's.
    """
    if not isinstance(task, GRPO):
        if given:
            raise UserError(f"reward={given!r} is for a run of grpo, not of task.kind={task.kind!r}")
        return None
    if not given and task.reward.partition(":")[0] in ("python", "function"):
        raise UserError(
            f"the reward of this run is {task.reward}, and code that a directory names is not executed; give it: "
            "evaluate --reward=python:FILE.py:FUNCTION, or from Python evaluate(reward=function)"
        )
    if isinstance(given, str):
        task = dataclasses.replace(task, reward=given)
    return open_reward(task, open_run, given if callable(given) else None)


def with_reward(config: Config, function: Callable | None) -> Config:
    """The Config with the name of a reward function, and with the metric of its task if that measures no loss."""
    task, row = config.task, tasks.TASKS.get(config.task.kind)
    if function is not None and not isinstance(task, GRPO):
        raise UserError(f"reward={function!r} is for task='grpo', not task.kind={task.kind!r}")
    if function is not None:
        name = function if isinstance(function, str) else alignment.name_of(function)
        config = dataclasses.replace(config, task=dataclasses.replace(task, reward=name))
    if row and not row.measures_loss and config.train.metric == "validation_loss":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, metric=row.metrics[0]))
    return config
