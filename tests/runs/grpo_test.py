"""Runs of grpo: what they write, resuming to the bit, rewards that fail, references, misuse."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import alignment, config, peft, tasks, tokenizers
from nanoflax.config import GRPO, Config, ExampleData, LoRA, ModelConfig, OptimConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, grpo
from nanoflax.runs.finetune import Finetuning
from nanoflax.runs.trainer import run_job
from nanoflax.train import TrainState, make_optimizer
from tests import processes

MODEL = ModelConfig(
    context=32, layers=1, dim=16, heads=2, norm="rmsnorm", bias=False, positions="rotary", dropout=0.1, tied=False
)
TASK = GRPO(length=16, target_length=4, group=4, show=2)
RUN = Config(
    model=MODEL,
    data=ExampleData(train="arithmetic:1", tokenizer="bytes"),
    optim=OptimConfig(learning_rate=3e-2, warmup_steps=1),
    task=TASK,
    train=TrainConfig(steps=4, batch_size=16, evaluate_every=2, checkpoint_every=2, tensorboard=False),
)


def digits(completion, problem):
    """The share of characters that are digits: easy to learn."""
    return sum(c.isdigit() for c in completion) / 4


def with_fields(run=RUN, **changes):
    """RUN with changed fields: task__beta=1 is task.beta."""
    for name, value in changes.items():
        section, _, name = name.partition("__")
        value = dataclasses.replace(getattr(run, section), **{name: value}) if name else value
        run = dataclasses.replace(run, **{section: value})
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with two updates each and all filters."""
    workdir = tmp_path_factory.mktemp("grpo") / "run"
    run = with_fields(task__updates=2, task__top_p=0.9, task__attempts=2, task__normalization="dapo")
    return workdir, nanoflax.finetune(config=run, workdir=str(workdir), reward=digits), run


def test_a_run_writes_rollouts_metrics_samples_and_a_model(finished, capsys):
    workdir, run, _ = finished
    rollouts, metrics = lines(workdir / "rollouts.jsonl"), lines(workdir / "metrics.jsonl")
    assert [r["step"] for r in rollouts] == sorted([1, 2, 3, 4] * 16)
    for start in range(0, 64, 4):
        group = rollouts[start : start + 4]
        assert len({r["prompt"] for r in group}) == 1
        rewards = np.array([r["reward"] for r in group])
        assert [r["reward"] for r in group] == [digits(r["completion"], None) for r in group]
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        np.testing.assert_allclose([r["advantage"] for r in group], expected, atol=1e-5)
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    for m, at in zip(steps, range(4), strict=True):
        own = rollouts[16 * at : 16 * at + 16]
        np.testing.assert_allclose(m["rollout_reward"], np.mean([r["reward"] for r in own]))
        np.testing.assert_allclose(m["truncated"], np.mean([not r["ended"] for r in own]))
        np.testing.assert_allclose(m["completion_length"], np.mean([r["tokens"] for r in own]))
        assert m["tokens"] == sum(r["tokens"] for r in own)
        assert m["mismatch"] < 1e-5 < abs(m["ratio"] - 1)  # of the first and of the second update
    evaluations = [m for m in metrics if "reward" in m]
    assert [m["step"] for m in evaluations] == [2, 4] and all(m["pass_at_k"] >= 0 for m in evaluations)
    predictions = lines(workdir / "predictions.jsonl")
    result = json.loads((workdir / "result.json").read_text())
    np.testing.assert_allclose(result["reward"], np.mean([p["prediction"]["reward"] for p in predictions]))
    assert {"prompt", "answer", "prediction"} == predictions[0].keys()
    assert (workdir / "reward.png").stat().st_size > 5000 and not (workdir / "loss.png").exists()
    assert len(run.predict(["1+2="], max_new_tokens=4)) == 1
    opened = nanoflax.open(str(workdir))
    np.testing.assert_allclose(opened.evaluate(reward=digits)["reward"], result["reward"])
    with pytest.raises(UserError, match="code that a directory names is not executed"):
        opened.evaluate()
    assert opened.evaluate(reward="exact")["reward"] <= 1


def test_the_learning_rate_and_the_steps_follow_the_batches(finished):
    workdir, _, run = finished
    schedule = make_optimizer(run.optim, 4)[1]
    steps = [m for m in lines(workdir / "metrics.jsonl") if "loss" in m]
    np.testing.assert_allclose([m["learning_rate"] for m in steps], [float(schedule(i)) for i in range(4)], rtol=1e-6)
    assert checkpoint.list_steps(str(workdir / "checkpoints"))[-1] == 4


def named(run):
    return grpo.with_reward(run, digits)


def test_a_reward_that_breaks_loses_nothing_and_resuming_is_exact(finished, tmp_path):
    """The reward fails in step 4, after the checkpoint of step 2; the same command continues after step 3."""
    workdir, _, run = finished
    calls, held_out = [], len(tasks.load("arithmetic:1", tasks.Problem).validation)
    breaks_after = 3 * 16 + 3 * held_out  # three batches, and an evaluation of greedy and of two drawn completions

    def breaks(completion, problem):
        calls.append(completion)
        if len(calls) > breaks_after:
            raise KeyError("no such model")
        return digits(completion, problem)

    other = tmp_path / "run"
    job = Finetuning(named(run), str(other), breaks).job  # a repaired function has the same name
    with pytest.raises(UserError, match=r"raised KeyError: 'no such model' for the prompt '\d[+-]\d=' and the comp"):
        run_job(job, str(other))
    assert checkpoint.list_steps(str(other / "checkpoints"))[-1] == 3
    nanoflax.finetune(config=run, workdir=str(other), reward=digits)
    assert timeless(other / "rollouts.jsonl") == timeless(workdir / "rollouts.jsonl")
    assert timeless(other / "metrics.jsonl") == timeless(workdir / "metrics.jsonl")


def test_resuming_after_a_kill_is_exact(finished, tmp_path):
    workdir, _, run = finished
    other = tmp_path / "run"

    class Killed(BaseException):
        pass

    count = 0

    def kills(completion, problem):
        nonlocal count
        count += 1
        if count > 3 * 16 + 3 * held_out + 5:
            raise Killed
        return digits(completion, problem)

    held_out = len(tasks.load("arithmetic:1", tasks.Problem).validation)
    finetuning = Finetuning(named(run), str(other), kills)
    with pytest.raises(Killed):
        run_job(finetuning.job, str(other))
    assert len(lines(other / "rollouts.jsonl")) == 48
    (other / "rollouts.jsonl").write_text((other / "rollouts.jsonl").read_text() + '{"step": 4, "pro')
    nanoflax.finetune(config=run, workdir=str(other), reward=digits)  # from the checkpoint of step 2
    assert timeless(other / "rollouts.jsonl") == timeless(workdir / "rollouts.jsonl")
    assert timeless(other / "metrics.jsonl") == timeless(workdir / "metrics.jsonl")
    params = [nanoflax.open(str(w)).params for w in (workdir, other)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *params)))


def policy_of(tmp_path, run, reward=None, **fields):
    (tmp_path / "run").mkdir(exist_ok=True)
    made = Finetuning(grpo.with_reward(with_fields(run, **fields), reward), str(tmp_path / "run"), reward)
    return made, made.policy


def first_batch(made, change=0.0):
    """(batch, metrics) of the first step, after a change of the trained parameters."""
    trained, frozen = peft.split(made.job.load(), made.job.trained)
    trained = jax.tree.map(lambda x: x + change, trained)
    state = TrainState(np.int32(0), trained, None, None, jax.random.PRNGKey(0), np.int32(0))
    return made.policy.rollout(state, frozen, made.policy.batches[0])


def test_completions_without_a_reward_or_an_end_get_no_weight(tmp_path):
    def moody(completion, problem):
        return math.nan if completion[:1] < "a" else float(len(completion))

    made, policy = policy_of(tmp_path, RUN, moody, train__batch_size=64)
    batch, metrics = first_batch(made)
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    failed = np.array([r["reward"] == "nan" for r in rollouts])
    weights = np.asarray(batch["weights"]).sum(1)
    assert 0 < metrics["rewards_failed"] == failed.sum() < 64
    assert (weights == [0 if bad else r["tokens"] for bad, r in zip(failed, rollouts, strict=True)]).all()
    assert not np.asarray(batch["advantages"])[failed].any()
    policy.task = dataclasses.replace(policy.task, mask_truncated=True)
    ended = np.array([r["ended"] for r in rollouts])
    again = np.asarray(first_batch(made)[0]["weights"]).sum(1)
    assert (again == weights * ended).all()


@pytest.mark.parametrize("adapters", [False, True])
def test_the_reference_is_the_model_before_training(finished, tmp_path, adapters):
    source = str(finished[0] / "final")
    kind = LoRA() if adapters else config.FullFineTuning()
    run = with_fields(model=ModelConfig(init_from=source), peft=kind, task__beta=0.1, task__top_k=9)
    made, policy = policy_of(tmp_path, run, digits)
    assert policy.needs_copy is not adapters and made.job.keeps_initial is not adapters
    if not adapters:
        assert len(policy.load_reference()) == 32  # a fingerprint
    batch, _ = first_batch(made)
    np.testing.assert_allclose(batch["reference"] * batch["weights"], batch["old"], atol=1e-5)
    moved, _ = first_batch(made, 0.02)
    before = nanoflax.open(source).params
    expected = jax.jit(lambda batch: alignment.log_probabilities(made.model, before, batch))(moved)
    np.testing.assert_allclose(moved["reference"], expected, atol=1e-5)
    assert np.abs(np.asarray(moved["reference"] * moved["weights"] - moved["old"])).max() > 0.01


def test_a_reward_model_scores_prompt_and_completion(tmp_path):
    data, reward = tmp_path / "pairs.jsonl", tmp_path / "reward"
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no"} for i in range(30)]
    data.write_text("\n".join(map(json.dumps, pairs)))
    task = config.RewardModel(length=40)
    run = with_fields(
        model=dataclasses.replace(MODEL, context=48), data__train=f"preferences:{data}", task=task, train__steps=1
    )
    nanoflax.finetune(config=run, workdir=str(reward))
    model = nanoflax.open(str(reward))
    made, policy = policy_of(tmp_path, RUN, None, task__reward=f"model:{reward}", model__context=48)
    _, metrics = first_batch(made)
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    expected = model.rewards([r["prompt"] + r["completion"] for r in rollouts])
    np.testing.assert_allclose([r["reward"] for r in rollouts], expected, rtol=1e-4, atol=1e-6)
    assert metrics["rewards_failed"] == 0
    messages = ({"role": "user", "content": "1+1="},)
    values, failures = policy.reward(["", "2"], [tasks.Problem(messages, "")] * 2)
    reply = {"role": "assistant", "content": "2"}
    np.testing.assert_allclose(values[1], model.rewards([[*messages, reply]])[0], rtol=1e-4, atol=1e-6)
    assert np.isfinite(values).all() and not failures


def test_another_model_is_no_reward(finished, tmp_path):
    with pytest.raises(UserError, match="is no reward model"):
        policy_of(tmp_path, RUN, task__reward=f"model:{finished[0]}")
    with pytest.raises(UserError, match="cannot be opened"):
        policy_of(tmp_path, RUN, task__reward=f"model:{tmp_path}/none")


def test_prompts_have_one_shape_and_are_grouped(tmp_path):
    file = tmp_path / "p.jsonl"
    records = [{"prompt": "x" * n, "answer": "y"} for n in (1, 3, 9, 12, 15, 40)] + [{"prompt": ""}]
    file.write_text("\n".join(map(json.dumps, records)))
    made, policy = policy_of(tmp_path, with_fields(data__train=f"problems:{file}", data__validation=f"jsonl:{file}"))
    report = "\n".join(made.examples.report.lines())
    assert "prompts longer than 16 tokens, left out" in report and "with an empty prompt, left out" in report
    assert len(made.rows) == 5
    batches = policy.batches
    assert {batches[i]["prompts"].shape for i in range(20)} == {(16, 16)}
    assert all(len({*batches[i]["problems"][j : j + 4].tolist()}) == 1 for i in range(5) for j in (0, 4, 8, 12))
    for line, n, i in zip(*(batches[3][name] for name in ("prompts", "lengths", "problems")), strict=True):
        assert line[-n:].tolist() == made.rows.rows[i]["source"].tolist() and not line[:-n].any()


def test_chats_are_asked_as_in_instruct(tmp_path):
    """Also with a space at the end of the prompt, which the same source as chats does not have."""
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i}+2= ", "answer": i + 2}) for i in range(9)))
    source = dict(data__train=f"problems:{file}", data__validation=f"problems:{file}")
    made, _ = policy_of(tmp_path, RUN, task__chat=True, task__length=28, **source)
    expected = tokenizers.chat_prompt(made.tokenizer, [{"role": "user", "content": "0+2="}])
    chat = tasks.load(f"problems:{file}", tasks.Chat).train[0]
    assert made.rows.rows[0]["source"].tolist() == expected
    assert tokenizers.chat_ids(made.tokenizer, chat.messages)[0][: len(expected)] == expected
    assert tasks.prompt_of(made.config.task)(made.tokenizer, "0+2=", False) == expected


@pytest.mark.parametrize("some", [False, True])
def test_problems_without_an_answer_are_reported_or_refused(tmp_path, capsys, some):
    file = tmp_path / "p.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": f"{i}"} | ({"answer": "x"} if some and i < 3 else {})) for i in range(9))
    )
    fields = dict(data__train=f"problems:{file}", data__validation=f"problems:{file}")
    if some:
        policy_of(tmp_path, RUN, **fields)
        assert f"6 problems have no answer, the first is {file}:4" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match="task.reward=exact compares with the answer .* no problem has one"):
        policy_of(tmp_path, RUN, **fields)
    policy_of(tmp_path, RUN, task__reward="regex:x", **fields)


def test_a_reward_that_continues_a_text_refuses_chats(tmp_path):
    file = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "def f(x):"}]
    file.write_text("\n".join(json.dumps({"prompt": chat, "answer": f"assert f({i})"}) for i in range(9)))
    fields = dict(data__train=f"problems:{file}", data__validation=f"problems:{file}", task__chat=True)
    with pytest.raises(UserError, match="task.reward=tests:prompt continues the program .* is a chat; use tests"):
        policy_of(tmp_path, RUN, task__reward="tests:prompt", task__length=28, **fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(task__reward="exakt"), "task.reward='exakt' is not known"),
        (dict(task__reward="regex:("), "task.reward='regex:\\('"),
        (dict(task__group=3), "task.group=3 must divide it"),
        (dict(task__group=0), "task.group=0 must be at least 2"),
        (dict(task__target_length=30), "exceeds the model's context of 32; lower task.target_length"),
        (dict(task__temperature=0.0), "task.temperature"),
        (dict(train__z_loss=0.1), "train.z_loss=0.1 does not work"),
        (dict(train__metric="accuracy"), "choose one of reward, pass_at_k"),
        (dict(data__train="pytags"), "has Tagging examples; this task needs Problem"),
        (dict(model__architecture="encoder_decoder"), "needs model.architecture to be decoder"),
    ],
    ids=str,
)
def test_misuse_is_one_line_before_training(tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        nanoflax.finetune(config=with_fields(**fields), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_from_python_the_prompt_and_the_completion_share_the_context(finished, tmp_path):
    from nanoflax.runs.finetune import with_arguments

    made = with_arguments(None, nanoflax.open(str(finished[0])), "arithmetic:1", None, "grpo", "lora")
    assert (made.task.length, made.task.target_length) == (16, 16)


SPLIT = dict(train__mesh="2,1,2", train__accumulate=2, train__scan_layers=True)
CHILD = "from tests.runs import grpo_test; import sys; grpo_test.tune(sys.argv[1], **grpo_test.SPLIT)"


def tune(workdir, **changes):
    """Two updates, with a copy as the reference. SGD, because Adam enlarges the rounding errors of small gradients."""
    model = dataclasses.replace(MODEL, dropout=0.0)
    optim = OptimConfig(name="sgd", learning_rate=1.0, warmup_steps=0, ema=0.5)
    run = with_fields(model=model, optim=optim, train__steps=1, task__updates=2, task__beta=0.1, task__top_p=0.9)
    nanoflax.finetune(config=with_fields(run, **changes), workdir=workdir, reward=digits)


def test_meshes_micro_batches_and_scanned_layers_change_nothing(tmp_path):
    done = processes.run(["-c", CHILD, str(tmp_path / "split")], env=processes.quick(devices=4), timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    tune(str(tmp_path / "whole"))
    split, whole = (tmp_path / name for name in ("split", "whole"))
    text = lambda path: [(r["prompt"], r["completion"], r["reward"]) for r in lines(path / "rollouts.jsonl")]
    assert text(split) == text(whole) and len({reward for *_, reward in text(whole)}) > 1
    for found, expected in zip(timeless(split / "metrics.jsonl"), timeless(whole / "metrics.jsonl"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_a_reward_is_only_for_grpo(tmp_path):
    with pytest.raises(UserError, match="is for task='grpo'"):
        nanoflax.finetune(config=with_fields(task=config.LanguageModel()), workdir=str(tmp_path / "r"), reward=digits)
