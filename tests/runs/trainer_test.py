"""The trainer from Python: continued pretraining, and what a resumed run holds in memory."""

import json
import random
import shutil

import jax
import pytest

import nanoflax
from nanoflax import train
from nanoflax.config import Config, ExampleData, ModelConfig, OptimConfig, TextData, TrainConfig, validate
from nanoflax.errors import UserError
from nanoflax.runs import Checkpoints
from nanoflax.runs.pretrain import continuation_length
from tests import kills, processes

TRAIN = TrainConfig(steps=20, batch_size=8, evaluate_every=10, checkpoint_every=10, sample_tokens=0, tensorboard=False)
OPTIM = OptimConfig(learning_rate=0.01, warmup_steps=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    kills.write_corpus(directory, random.Random(0))
    return directory


def on_text(corpus, model, window=0):
    source, cache = f"text:{corpus}/*.txt", f"{corpus}/cache"
    data = TextData(train=source, cache=cache, tokenizer="bytes", workers=1, window=window)
    return Config(model=model, data=data, optim=OPTIM, train=TRAIN)


def validation_losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}


@pytest.fixture(scope="module")
def published(corpus, tmp_path_factory):
    """A directory of Transformers: a small GPT-2 with random weights and a byte-level BPE of the corpus."""
    import tokenizers as library
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("published")
    tokenizer = library.ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in sorted(corpus.glob("*.txt"))], 300, special_tokens=["<|endoftext|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(directory)
    return directory


def test_a_published_model_is_trained_on_a_corpus_and_then_its_run(published, corpus, tmp_path, capsys):
    first = tmp_path / "first"
    run = nanoflax.pretrain(on_text(corpus, ModelConfig(init_from=str(published))), str(first))
    assert not run.signal
    losses = validation_losses(first)
    assert losses.keys() == {0, 10, 20}
    assert losses[20] < losses[10] < losses[0] < 6.2
    saved = json.loads((first / "config.json").read_text())["model"]
    assert (saved["dim"], saved["context"], saved["vocab_size"]) == (32, 32, 300)  # of the source
    second = tmp_path / "second"
    nanoflax.pretrain(on_text(corpus, ModelConfig(init_from=str(first))), str(second))
    again = validation_losses(second)
    assert again[0] == pytest.approx(losses[20], rel=1e-6)
    assert again[20] < again[0]
    tokenizers = [nanoflax.tokenizers.load(path / "tokenizer").fingerprint for path in (first, second)]
    assert len({*tokenizers, nanoflax.tokenizers.load(published).fingerprint}) == 1
    short = on_text(corpus, ModelConfig(init_from=str(first)), window=16)
    nanoflax.pretrain(short, str(tmp_path / "short"))
    steps = [json.loads(line) for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()]
    assert max(step.get("tokens", 0) for step in steps) == 16 * TRAIN.batch_size
    assert json.loads((tmp_path / "short" / "config.json").read_text())["model"]["context"] == 32
    with pytest.raises(UserError, match="data.window=33 must be at most model.context=32"):
        nanoflax.pretrain(on_text(corpus, ModelConfig(init_from=str(first)), window=33), str(tmp_path / "long"))
    capsys.readouterr()
    nanoflax.pretrain(on_text(corpus, ModelConfig(init_from=str(first))), str(second))
    assert "the run is complete: 20 steps" in capsys.readouterr().out
    assert validation_losses(second) == again


def test_only_a_decoder_with_a_tokenizer_is_pretrained_further(published, corpus, tmp_path):
    import transformers

    encoder = tmp_path / "encoder"
    shutil.copytree(published, encoder)
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(encoder)
    with pytest.raises(UserError, match="is of model.architecture='encoder'; pretrain trains a decoder"):
        nanoflax.pretrain(on_text(corpus, ModelConfig(init_from=str(encoder))), str(tmp_path / "w"))
    with pytest.raises(UserError, match="neither a directory"):
        nanoflax.pretrain(on_text(corpus, ModelConfig(init_from="nothing")), str(tmp_path / "w"))
    assert not (tmp_path / "w" / "config.json").exists()


ON_TWO_DEVICES = """
import jax, numpy as np
from nanoflax import nn, parallel
from nanoflax.config import ModelConfig
from nanoflax.runs.opening import initialize_from
parallel.rules.MAX_REPLICATED_NUMBERS = 100  # less than the table of positions, 1% of the model
model = nn.build(ModelConfig(vocab_size=64, context=16, layers=4, dim=32, heads=2))
source, mesh = parallel.init(model, jax.random.PRNGKey(1)), parallel.make_mesh("1,1,2")
params = initialize_from(model, lambda: source, 0, mesh)
jax.tree.map(np.testing.assert_array_equal, params, source)
places = parallel.shardings(parallel.param_shapes(model), mesh)
assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, params)) == jax.tree.leaves(places)
"""


@pytest.mark.parametrize("context, length, expected", [(256, 64, 64), (64, 64, 61), (32, 64, 29), (3, 64, 1)])
def test_the_sample_of_a_run_is_as_long_as_the_context_allows(context, length, expected):
    config = Config(model=ModelConfig(context=context), train=TrainConfig(sample_tokens=length))
    validate(config)
    assert continuation_length(config, [1, 2, 3]) == expected


def test_a_source_is_copied_into_the_shards_of_the_whole_model():
    done = processes.run(["-c", ON_TWO_DEVICES], env=processes.quick(devices=2), timeout=300)
    assert done.returncode == 0, done.stderr


# Memory.


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def watched(monkeypatch, call):
    """Bytes of the arrays that live during a call, beside those before: (the most while a source is copied; [after
    a restore or an initialization, and when training begins])."""
    before, found, copying = live_bytes(), [], [0]

    def count_after(owner, name, counts=found):
        old = getattr(owner, name)

        def counting(*arguments, **options):
            result = old(*arguments, **options)
            if counts is found or not found:  # batches are not counted
                counts.append(live_bytes() - before)
            return result

        monkeypatch.setattr(owner, name, counting)

    def fit(*arguments, **options):
        found.append(live_bytes() - before)
        return train.loop.fit(*arguments, **options)

    count_after(jax, "make_array_from_callback", copying)
    count_after(Checkpoints, "restore")
    count_after(train, "init_state")
    monkeypatch.setattr(train, "fit", fit)
    call()
    monkeypatch.undo()
    return max(copying), found


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_resumed_finetuning_holds_no_more_than_a_new_one(adapter, tmp_path, monkeypatch):
    rng = random.Random(0)
    examples = [{"text": " ".join(rng.choices("abcd", k=5)), "label": rng.choice(["x", "y"])} for _ in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    data = ExampleData(tokenizer="bytes")
    config = Config(
        model=ModelConfig(architecture="encoder", head="classify", layers=1, dim=64, heads=2, context=32),
        data=data,
        optim=OPTIM,
        train=TrainConfig(steps=4, batch_size=4, evaluate_every=2, checkpoint_every=2, tensorboard=False),
    )
    task = nanoflax.config.Classify(length=32)
    source = None
    if adapter != "none":
        source = str(tmp_path / "source")
        nanoflax.finetune(None, f"jsonl:{tmp_path}/data.jsonl", task=task, workdir=source, config=config)

    def tune(workdir):
        return nanoflax.finetune(
            source, f"jsonl:{tmp_path}/data.jsonl", task=task, peft=adapter, workdir=str(workdir), config=config
        )

    copying, new = watched(monkeypatch, lambda: tune(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    copying_again, resumed = watched(monkeypatch, lambda: tune(tmp_path / "run"))
    assert len(new) == len(resumed) == 2, (new, resumed)
    assert max(resumed) <= 1.02 * max(new), (new, resumed)
    assert max(copying, copying_again) <= 1.1 * max(new), (copying, copying_again, new)
