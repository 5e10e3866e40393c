"""A whole run from Python, without a program of experiments/."""

import functools
import json
import random
import sys

import pytest

import nanoflax
from nanoflax.config import Config, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError

# DESIGN.md, "The public face", as it stands there.
NOTEBOOK = """
run = nanoflax.pretrain(config, "runs/notes")        # again: resumes; progress and pictures inline in a notebook
run.plot(); print(run.generate("The function returns", max_new_tokens=60))
run = nanoflax.open("runs/notes")                    # or a Hugging Face directory, hub name, .gguf, adapter directory
tuned = nanoflax.finetune(run, "jsonl:train.jsonl", task="classify", peft="lora", workdir="runs/topics")
tuned.predict(["a text"]); tuned.save_pretrained("exported")
"""
SHORT = TrainConfig(steps=4, batch_size=4, evaluate_every=4, sample_tokens=0, tensorboard=False)
OPTIM = OptimConfig(warmup_steps=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory with a corpus and examples, where finetune takes a few steps by default."""
    rng, words = random.Random(0), ["the", "function", "returns", "a", "number"]
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choices(words, k=60)))
    examples = [{"text": f"{i} {word}", "label": word} for i in range(20) for word in ("cat", "dog")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    monkeypatch.chdir(tmp_path)
    module = sys.modules[nanoflax.finetune.__module__]
    monkeypatch.setattr(module, "Config", functools.partial(Config, train=SHORT, optim=OPTIM))
    return tmp_path


@pytest.fixture
def config(place):
    model = ModelConfig(layers=1, dim=32, heads=2, context=96)
    data = TextData(train="text:*.txt", tokenizer="bytes", cache="cache", workers=1)
    return Config(model=model, data=data, optim=OPTIM, train=SHORT)


def test_the_notebook_of_the_design_runs_as_written(config, place, capsys):
    exec(NOTEBOOK, found := {"nanoflax": nanoflax, "config": config})
    assert "The function returns" in capsys.readouterr().out
    assert (place / "runs" / "notes" / "loss.png").exists() and (place / "exported" / "model.safetensors").exists()
    tuned = found["tuned"]
    assert (tuned.reason, tuned.signal, found["run"].reason) == ("finished", 0, "")
    assert tuned.config.task.length == 96  # the context of the source
    assert {"cat", "dog"} == set(tuned.labels)
    again = nanoflax.finetune(found["run"], "jsonl:train.jsonl", task="classify", peft="lora", workdir="runs/topics")
    assert "the run is complete: 4 steps" in capsys.readouterr().out and again.reason == "finished"


def test_what_is_wrong_is_one_error_and_leaves_no_run(config, place):
    tune = functools.partial(nanoflax.finetune, None, "jsonl:train.jsonl", workdir="w")
    for call, words in (
        (lambda: nanoflax.pretrain(Config(model=ModelConfig(architecture="encoder", head="mlm")), "w"), "'encoder'"),
        (lambda: nanoflax.pretrain(Config(model=ModelConfig(heads=3)), "w"), "model.heads=3"),
        (lambda: tune(), "task.kind='pretrain' is for experiments.pretrain"),
        (lambda: tune(task="dance"), "task='dance' is not one of classify"),
        (lambda: tune(task="classify", peft="glue"), "peft='glue' is not one of none"),
        (lambda: tune(task="classify", config=Config(data=TextData(packing="isolated"))), "data=ExampleData"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert not (place / "w" / "config.json").exists()
