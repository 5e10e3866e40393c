"""Runs on preferences: the reference, its file, resuming to the bit, meshes, and reward models in use."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import alignment, hf, nn, parallel, peft, runs, tasks, tokenizers
from nanoflax.config import Config, ExampleData, LoRA, ModelConfig, OptimConfig, Prefer, RewardModel, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import reference
from tests import processes
from tests.compiled import apply

BYTES = tokenizers.ByteTokenizer()
SIZES = dict(
    vocab_size=BYTES.vocab_size, context=32, layers=1, dim=32, heads=2, norm="rmsnorm", positions="rotary", bias=False,
    gated=True, activation="silu")  # fmt: skip
TRAIN = dict(batch_size=8, evaluate_every=4, checkpoint_every=4, tensorboard=False)


def write_source(directory, seed=0):
    config = ModelConfig(**SIZES)
    params = parallel.init(nn.build(config), jax.random.PRNGKey(seed))
    hf.save(directory, config, jax.tree.map(lambda x: 2 * x, params), BYTES)
    return directory


def write_pairs(path, number=80):
    """Sums with the right and a wrong answer of one digit."""
    draws = np.random.default_rng(0).permuted(np.arange(100))[:number].tolist()
    lines = [
        {"prompt": f"{d // 10}+{d % 10}=", "chosen": str((d // 10 + d % 10) % 10), "rejected": str(d % 7 + 10)}
        for d in draws
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(the directory of a random model, a file of pairs)."""
    directory = tmp_path_factory.mktemp("inputs")
    return write_source(directory / "source"), write_pairs(directory / "pairs.jsonl")


def config_of(source, pairs, task=None, **train):
    return Config(
        model=ModelConfig(init_from=str(source)),
        data=ExampleData(train=f"preferences:{pairs}", validation_fraction=0.2),
        optim=OptimConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0),
        task=task or Prefer(length=16),
        train=TrainConfig(**TRAIN | {"steps": 8} | train),
    )


def metrics(workdir):
    """{step: numbers} of training and of evaluation, without the speed."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("tokens_per_second", None)
        found[record["step"], "validation_loss" in record] = record
    return found


def arrays(workdir, which="best"):
    return jax.tree.leaves(runs.open_model(workdir / "final", which)[1])


def test_with_lora_the_reference_is_the_base_and_no_second_model(inputs, tmp_path, monkeypatch):
    source, pairs = inputs
    held = []

    def fill(self):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return original(self)

    original = reference.Reference.fill
    monkeypatch.setattr(reference.Reference, "fill", fill)
    before = sum(x.nbytes for x in jax.live_arrays())
    run = nanoflax.finetune(
        config=config_of(source, pairs, steps=16, evaluate_every=16), peft=LoRA(rank=2), workdir=str(tmp_path / "run")
    )
    model, params, _ = runs.open_model(source)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held[0] - before < 1.2 * size  # the parameters and their adapters

    values = np.load(tmp_path / "run" / reference.FILE)
    assert len(values.files) == 2
    saved = np.concatenate([values[name] for name in sorted(values.files)])
    data = tasks.load(tasks.examples_of(run.config.data), tasks.Preference)
    rows = tasks.encode([*data.train, *data.validation], BYTES, 16)
    found, _ = alignment.answer_log_probabilities(model, params, rows.batch(range(len(rows))))
    assert len(saved) == len(rows)
    np.testing.assert_allclose(saved, found, rtol=1e-5)
    with_adapters = peft.add(params, LoRA(rank=2), jax.random.PRNGKey(1))
    again, _ = alignment.answer_log_probabilities(model, with_adapters, rows.batch(range(len(rows))))
    np.testing.assert_array_equal(again, found)

    first, last = metrics(tmp_path / "run")[0, True], metrics(tmp_path / "run")[16, True]
    assert first["validation_loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["reward_margin"]) < 1e-6
    assert last["preference_accuracy"] > 0.9 and last["validation_loss"] < 0.6 and last["reward_margin"] > 0.1
    line = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["prediction"]["reward_chosen"] > line["prediction"]["reward_rejected"] and line["chosen"]
    assert run.evaluate()["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    of_final = nanoflax.open(tmp_path / "run" / "final").evaluate(f"jsonl:{pairs}")  # with adapters in the kernels
    of_run = run.evaluate(f"jsonl:{pairs}")
    assert of_run["examples"] == 80 and of_final["reward_margin"] == pytest.approx(of_run["reward_margin"], rel=1e-3)
    assert (tmp_path / "run" / "adapter").exists()


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_bit(inputs, tmp_path, monkeypatch):
    source = shutil.copytree(inputs[0], tmp_path / "source")
    config = config_of(source, inputs[1])
    for name in ("whole", "killed"):
        if name == "killed":
            with monkeypatch.context() as patch:
                evaluator = tasks.Evaluator.__call__
                patch.setattr(
                    tasks.Evaluator,
                    "__call__",
                    lambda self, *a, **k: dying(patch) if calls.pop() else evaluator(self, *a, **k),
                )
                calls = [True, False, False]  # at step 8, after the checkpoint of step 4
                with pytest.raises(Killed):
                    nanoflax.finetune(config=config, workdir=str(tmp_path / name))
            values = (tmp_path / name / reference.FILE).read_bytes()
            written = write_source(
                tmp_path / "other", 1
            )  # the log-probabilities are in the run: another source is no matter
            for file in source.glob("*.safetensors"):
                shutil.copy(written / file.name, file)
        nanoflax.finetune(config=config, workdir=str(tmp_path / name))
    assert (tmp_path / "killed" / reference.FILE).read_bytes() == values
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(a, b)


def dying(patch):
    raise Killed


def reference_of(workdir):
    """{name: values} of a run's file."""
    with np.load(workdir / reference.FILE) as file:
        return {name.split("-")[0]: file[name] for name in file.files}


def test_the_reference_is_computed_for_what_is_read_and_again_when_it_must_be(inputs, tmp_path, capsys):
    source, pairs = shutil.copytree(inputs[0], tmp_path / "source"), inputs[1]
    run, file = tmp_path / "run", tmp_path / "run" / reference.FILE
    tune = lambda: nanoflax.finetune(config=config_of(source, pairs, steps=2), workdir=str(run))
    tune()
    first = reference_of(run)
    known = np.isfinite(first["train"]).all(1)
    assert known.sum() == 16 and np.isfinite(first["validation"]).all()  # two batches of 8
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    tune()
    assert "cannot be read and is computed again" in capsys.readouterr().out
    np.testing.assert_array_equal(reference_of(run)["train"], first["train"])

    shutil.rmtree(run / "checkpoints")  # a start that saved nothing: its file may be of another source
    for name in ("config.json", "metrics.jsonl"):
        (run / name).unlink()
    written = write_source(tmp_path / "other", 1)
    for path in source.glob("*.safetensors"):
        shutil.copy(written / path.name, path)
    tune()
    assert not np.isclose(reference_of(run)["train"][known], first["train"][known]).any(1).all()
    assert metrics(run)[0, True]["validation_loss"] == pytest.approx(np.log(2), abs=1e-5)
    shutil.rmtree(source)
    with pytest.raises(UserError, match="is measured against the model before training, model.init_from=.*source: "):
        nanoflax.open(run / "final").evaluate(f"jsonl:{pairs}")


@pytest.mark.parametrize(
    "task, message",
    [
        (Prefer(loss="robust"), "task.loss='robust' needs task.label_noise above 0"),
        (Prefer(loss="ipo", label_noise=0.1), "task.label_noise=0.1 is for dpo, .* not task.loss='ipo'"),
        (Prefer(label_noise=0.5), r"task.label_noise=0.5 must be in \[0, 0.5\)"),
        (Prefer(margin=1.0), "task.margin=1.0 is for task.loss='simpo', not 'dpo'"),
        (Prefer(beta=0.0), "task.beta=0.0 must be positive"),
        (Prefer(loss="slic"), "task.loss='slic' is not one of dpo, dpo_norm, ipo, robust, simpo, orpo"),
        (Prefer(length=64), "task.length=64 must be at most the model's context of 32"),
    ],
)
def test_bad_settings_are_one_line(inputs, tmp_path, task, message):
    with pytest.raises(UserError, match=message):
        nanoflax.finetune(config=config_of(*inputs, task=task), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_a_preference_does_not_use_is_refused(inputs, tmp_path):
    source, pairs = inputs
    with pytest.raises(
        UserError, match="train.label_smoothing=0.1 does not work with task.kind='preference'; task.label_"
    ):
        nanoflax.finetune(config=config_of(source, pairs, label_smoothing=0.1), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="a new model is random: set model.init_from, or task.loss to simpo or orpo"):
        nanoflax.finetune(config=config_of("", pairs), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="train.metric='accuracy' is not measured here; .*preference_accuracy"):
        nanoflax.finetune(config=config_of(source, pairs, metric="accuracy"), workdir=str(tmp_path / "run"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no object has chosen or rejected; their fields are text"):
        nanoflax.finetune(config=config_of(source, texts), workdir=str(tmp_path / "run"))


# Reward models.


def test_a_reward_model_learns_and_gives_the_scores_of_transformers(inputs, tmp_path):
    import torch
    import transformers

    source, pairs = inputs
    config = config_of(source, pairs, RewardModel(length=16), steps=24, evaluate_every=24)
    run = nanoflax.finetune(config=config, workdir=str(tmp_path / "run"))
    assert metrics(tmp_path / "run")[24, True]["preference_accuracy"] == 1.0
    texts = ["3+4=7", "3+4=13", "a much longer text 12"]
    scores = run.rewards(texts)
    assert scores[0] > scores[1] and run.predict(texts) == pytest.approx(scores.tolist())
    assert run.rewards(texts[1:2]) == pytest.approx(scores[1:2], abs=1e-5)  # padding changes nothing
    assert run.rewards([]).shape == (0,)
    chat = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}]
    ids, _ = tokenizers.chat_ids(BYTES, chat)
    score = float(apply(run.model, run.params, np.asarray([ids]))[0, 0])
    assert run.rewards([chat, texts[0]]).tolist() == pytest.approx([score, float(scores[0])], abs=1e-5)

    run.save_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    batch = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = theirs(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(found, scores, atol=1e-5)
    published = nanoflax.open(tmp_path / "exported")
    np.testing.assert_allclose(published.rewards(texts), scores, atol=1e-5)
    assert published.evaluate(f"jsonl:{pairs}")["preference_accuracy"] > 0.9
    again = nanoflax.finetune(tmp_path / "exported", config=config, workdir=str(tmp_path / "again"))
    first = metrics(tmp_path / "again")[0, True]
    assert first["preference_accuracy"] == 1.0  # its head is kept
    for bad, message in (([""], "text 1 of 1 is empty"), (["a", []], "text 2 of 2 is empty")):
        with pytest.raises(UserError, match=message):
            again.rewards(bad)
    with pytest.raises(UserError, match="source is no reward model"):
        nanoflax.open(source).rewards(texts)


def test_an_end_that_is_padding_too_is_no_padding_id_in_transformers(tmp_path):
    tokenizer = nanoflax.tokenizers.load(inputs_tokenizer(tmp_path))
    config = ModelConfig(**SIZES | {"vocab_size": tokenizer.vocab_size}, head="classify", labels=1, class_names=("x",))
    params = parallel.init(nn.build(config), jax.random.PRNGKey(0))
    hf.save(tmp_path / "model", config, params, tokenizer)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] is None


def inputs_tokenizer(directory):
    """A byte-level tokenizer whose only special token ends and pads texts, as that of GPT-2."""
    import tokenizers as library
    import transformers

    made = library.ByteLevelBPETokenizer()
    made.train_from_iterator(["a b"], 260, special_tokens=["<|endoftext|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **names).save_pretrained(directory / "t")
    return directory / "t"


SPLIT = dict(mesh="2,2,2", accumulate=2, scan_layers=True)
CHILD = "from tests.runs import preference_test; import sys; preference_test.tune(*sys.argv[1:], split=True)"


def tune(source, pairs, workdir, split=False):
    config = config_of(source, pairs, steps=2, evaluate_every=2, **SPLIT if split else {})
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema=0.5))
    nanoflax.finetune(config=config, peft=LoRA(rank=2), workdir=workdir)


def test_meshes_micro_batches_and_scanned_layers_change_nothing(inputs, tmp_path):
    arguments = [*map(str, inputs)]
    done = processes.run(
        ["-c", CHILD, *arguments, str(tmp_path / "split")], env=processes.quick(devices=8), timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tune(*arguments, str(tmp_path / "whole"))
    found, expected = metrics(tmp_path / "split"), metrics(tmp_path / "whole")
    assert found.keys() == expected.keys() and len(found) == 4
    for key, numbers in expected.items():
        for field, value in numbers.items():
            accuracy = 1 if field == "preference_accuracy" else 2e-5  # all rewards are 0 at the start
            assert found[key][field] == pytest.approx(value, rel=2e-4, abs=accuracy), (key, field)
    for part, values in reference_of(tmp_path / "split").items():
        np.testing.assert_allclose(values, reference_of(tmp_path / "whole")[part], rtol=1e-5)
