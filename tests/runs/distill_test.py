"""Runs that distil: the teacher is loaded, not trained, not exported, and noticed when it changes."""

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import nn, parallel, runs, tokenizers
from nanoflax.config import Config, Distill, DistillChat, ExampleData, ModelConfig, OptimConfig, TrainConfig, validate
from nanoflax.errors import UserError
from nanoflax.runs import trainer
from nanoflax.runs.teacher import Teacher

BYTES = tokenizers.load("bytes")
SIZES = dict(vocab_size=260, context=32, layers=2, dim=16, heads=2)


def write_model(directory, seed=0, config=ModelConfig(**SIZES), tokenizer=BYTES):
    """A run with random weights."""
    model = nn.build(config)
    with runs.Checkpoints(directory / "checkpoints") as saves:
        params = parallel.init(model, jax.random.PRNGKey(seed))
        saves.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint, "step": 0})
    runs.directory.write_run(str(directory), Config(model=model.config), tokenizer)
    return params


@pytest.fixture
def teacher(tmp_path):
    write_model(tmp_path / "teacher")
    return tmp_path / "teacher"


def a_config(tmp_path, **changes):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "alpha beta {i}, gamma"}}\n' for i in range(40)))
    config = Config(
        model=ModelConfig(**SIZES | {"layers": 1, "vocab_size": 0}),
        data=ExampleData(train=f"jsonl:{tmp_path}/t.jsonl"),
        optim=OptimConfig(warmup_steps=0),
        task=Distill(length=32, teacher=str(tmp_path / "teacher"), mix=0.25, temperature=2.0),
        train=TrainConfig(steps=2, batch_size=4, evaluate_every=2, checkpoint_every=1, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_distillation_from_its_start_to_its_final_model(tmp_path, teacher, capsys):
    nanoflax.finetune(config=a_config(tmp_path), workdir=str(tmp_path / "run"))
    printed = capsys.readouterr().out
    count = lambda layers: sum(
        x.size for x in jax.tree.leaves(parallel.param_shapes(nn.build(ModelConfig(**SIZES | {"layers": layers}))))
    )
    assert f"{count(1):,} of {count(1):,} parameters are trained (100.00%)" in printed
    assert f"the teacher, which is not trained, has {count(2):,} parameters" in printed
    assert re.search(rf"^total .* {count(1):,} ", printed, re.M)
    steps = [m for m in metrics_of(tmp_path / "run") if "loss" in m]
    assert all({"kl", "divergence"} <= m.keys() for m in steps)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"validation_loss", "perplexity", "bits_per_byte", "kl"} <= result.keys()
    # The exported model is the student alone, which opens and is measured without its teacher.
    shutil.rmtree(teacher)
    params, _ = runs.restore_params(tmp_path / "run" / "final" / "checkpoints")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, nanoflax.open(tmp_path / "run").params)
    assert "teacher" not in params
    found = nanoflax.open(tmp_path / "run").evaluate(f"jsonl:{tmp_path}/t.jsonl")
    sizes = [len(json.loads(line)["text"]) for line in open(tmp_path / "t.jsonl")]
    nats = found["validation_loss"] * (sum(sizes) + len(sizes))  # one token for each byte, and the ends
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(sizes)) and "kl" not in found


def test_a_teacher_that_changed_is_refused(tmp_path, teacher):
    config = a_config(tmp_path)
    nanoflax.finetune(config=config, workdir=str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(teacher)
    write_model(teacher, seed=1)
    with pytest.raises(UserError, match=r"^the model of task.teacher is not the one that the checkpoint was trained"):
        nanoflax.finetune(config=config, workdir=str(tmp_path / "run"))


def test_adapters_of_a_student_beside_its_teacher(tmp_path, teacher):
    """The student's frozen parameters and the teacher's have stacked blocks of the same names, and not as many."""
    write_model(tmp_path / "student", 2, ModelConfig(**SIZES | {"layers": 3}))
    config = a_config(tmp_path)
    task = dataclasses.replace(config.task, teacher_dtype="bfloat16")
    config = dataclasses.replace(config, task=task, train=dataclasses.replace(config.train, scan_layers=True))
    held = Teacher(task, str(tmp_path / "run"), parallel.make_mesh("1,1,1", jax.devices()[:1]))
    kinds = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (held.load(), held.shapes)]
    assert kinds[0] == kinds[1] and "bfloat16" in str(kinds[0]) and "float32" not in str(kinds[0])
    nanoflax.finetune(str(tmp_path / "student"), peft="lora", config=config, workdir=str(tmp_path / "run"))
    run = nanoflax.open(tmp_path / "run")
    assert [*filter(lambda name: "block" in name, run.params["decoder"])] == ["block_0", "block_1", "block_2"]
    assert (tmp_path / "run" / "adapter").exists() and run.evaluate(f"jsonl:{tmp_path}/t.jsonl")["perplexity"] > 1


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, teacher):
    """Half of the steps train on texts by the student."""
    config = a_config(tmp_path)
    task = dataclasses.replace(config.task, on_policy=0.5, prompt_length=8, new_tokens=16)
    settings = dataclasses.replace(config.train, steps=4, scan_layers=True, seed=10, evaluate_every=2)
    config = dataclasses.replace(config, task=task, train=settings)
    for name in ("whole", "cut"):
        nanoflax.finetune(config=config, workdir=str(tmp_path / name))
    for step in ("3", "4"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    nanoflax.finetune(config=config, workdir=str(tmp_path / "cut"))
    states = [runs.restore_params(tmp_path / name / "checkpoints", which="latest")[0] for name in ("whole", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    plain = lambda name: [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in metrics_of(tmp_path / name)]
    assert plain("whole") == plain("cut")
    assert [m["on_policy"] for m in plain("whole") if "loss" in m] == [0, 1, 1, 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with a teacher, an encoder, and a decoder with another vocabulary."""
    directory = tmp_path_factory.mktemp("models")
    write_model(directory / "teacher")
    write_model(directory / "encoder", config=ModelConfig(**SIZES, architecture="encoder", head="mlm"))
    pieces = tokenizers.train_sentencepiece(["alpha beta gamma delta"] * 9, 275)
    write_model(directory / "pieces", config=ModelConfig(**SIZES | {"vocab_size": 275}), tokenizer=pieces)
    return directory


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher": ""}, "^task.teacher is empty; give the model to learn from"),
        ({"teacher": "nowhere"}, "^task.teacher=nowhere cannot be opened: "),
        ({"teacher": "{}/run"}, "^task.teacher=.*/run is the --workdir of the student; choose another --workdir"),
        (
            {"teacher": "{}/encoder"},
            "has model.architecture='encoder' and model.head='mlm'; a teacher must be a decoder",
        ),
        (
            {"teacher": "{}/pieces"},
            "another vocabulary than data.tokenizer=bytes: .* tokens have another id there or none",
        ),
        ({"length": 33}, "task.length=33 must be at most the context of task.teacher=.*/teacher, 32"),
        ({"temperature": 0.0}, "^task.temperature=0.0 must be at least 1e-20"),
        ({"mix": 1.5}, "^task.mix=1.5 must be in"),
        ({"divergence": "kl"}, "^task.divergence='kl' is not one of forward_kl, reverse_kl, jsd"),
        ({"beta": 0.3}, "^task.beta=0.3 has no effect with task.divergence='forward_kl'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_compiled(models, change, words, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda *_: pytest.fail("a run began"))
    change = {name: x.format(models) if isinstance(x, str) else x for name, x in change.items()}
    config = a_config(models)
    data = dataclasses.replace(config.data, tokenizer="bytes")
    config = dataclasses.replace(config, data=data, task=dataclasses.replace(config.task, **change))
    with pytest.raises(UserError, match=words) as error:
        nanoflax.finetune(config=config, workdir=str(models / "run"))
    assert "\n" not in str(error.value) and not (models / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(task={"mix": 0.0}, train={"z_loss": 1e-4}), "^train.z_loss=0.0001 has no effect with task.mix=0"),
        (
            dict(task={"start": "teacher"}, model={"init_from": "x"}),
            "is for all parameters of a new model, not for model",
        ),
        (
            dict(task={"start": "teacher"}, peft={"trained": "head"}),
            "new model, not for peft.kind='none' and peft.trained",
        ),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, changes, words):
    config = a_config(tmp_path)
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    with pytest.raises(UserError, match=words):
        validate(dataclasses.replace(config, **sections))


def test_a_student_that_starts_as_the_first_layers_of_its_teacher(tmp_path, teacher):
    config = a_config(tmp_path)
    task, still = (
        dataclasses.replace(config.task, start="teacher"),
        dataclasses.replace(config.optim, learning_rate=0.0),
    )
    nanoflax.finetune(config=dataclasses.replace(config, task=task, optim=still), workdir=str(tmp_path / "run"))
    student, whole = nanoflax.open(tmp_path / "run").params, nanoflax.open(teacher).params
    del whole["decoder"]["block_1"]
    jax.tree.map(np.testing.assert_array_equal, student, whole)


def test_replies_of_chats_are_distilled_on_the_corpus_and_by_the_student(tmp_path, teacher):
    chat = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "%d!"}]}'
    (tmp_path / "chats.jsonl").write_text("".join(f"{chat % (i, i)}\n" for i in range(40)))
    config = a_config(tmp_path)
    task = DistillChat(length=32, teacher=str(teacher), divergence="jsd", on_policy=0.5, new_tokens=6)
    data = dataclasses.replace(config.data, train=f"jsonl:{tmp_path}/chats.jsonl")
    settings = dataclasses.replace(config.train, seed=10)
    config = dataclasses.replace(config, task=task, data=data, train=settings)
    nanoflax.finetune(config=config, workdir=str(tmp_path / "run"))
    steps = [m for m in metrics_of(tmp_path / "run") if "loss" in m]
    assert [m["on_policy"] for m in steps] == [0, 1]
    assert {"kl", "perplexity"} <= json.loads((tmp_path / "run" / "result.json").read_text()).keys()


def test_a_teacher_in_a_directory_of_transformers_teaches_the_same(tmp_path, teacher):
    """Its tokenizer has other files and another fingerprint, and the same ids; a new student reads its vocabulary."""
    nanoflax.open(teacher).save_pretrained(str(tmp_path / "exported"))
    config, results = a_config(tmp_path), []
    for name in (teacher, tmp_path / "exported"):
        task = dataclasses.replace(config.task, teacher=str(name))
        data = dataclasses.replace(config.data, tokenizer="bpe:2048" if name == teacher else "bytes")
        workdir = tmp_path / f"run{len(results)}"
        nanoflax.finetune(config=dataclasses.replace(config, task=task, data=data), workdir=str(workdir))
        assert runs.read_run(workdir)[1].fingerprint == BYTES.fingerprint
        results.append(json.loads((workdir / "result.json").read_text())["kl"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
