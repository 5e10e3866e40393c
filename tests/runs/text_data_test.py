"""The tokenizer of a run on text: its size is known before it is trained, and it is trained once for all runs."""

import dataclasses
import json
import random

import pytest

import nanoflax
from nanoflax import tokenizers
from nanoflax.config import Config, ModelConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import text_data

SHORT = TrainConfig(steps=3, batch_size=4, evaluate_every=3, sample_tokens=0, tensorboard=False)
MODEL = ModelConfig(layers=1, dim=16, heads=1, context=32)


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(90)]
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choices(words, k=60)))
    data = TextData(train=f"text:{tmp_path}/*.txt", tokenizer="unigram:290", cache=str(tmp_path / "cache"))
    return Config(model=MODEL, data=data, train=SHORT)


def with_data(config, **settings):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))


@pytest.fixture
def trained(monkeypatch):
    """The specs of the tokenizers that are trained, in order."""
    found, train = [], tokenizers.train_sentencepiece

    def counted(texts, size, kind):
        found.append(f"{kind}:{size}")
        return train(texts, size, kind)

    monkeypatch.setattr(tokenizers, "train_sentencepiece", counted)
    return found


@pytest.mark.parametrize("spec", ["bpe:290", "unigram:301"])
def test_a_run_with_a_new_tokenizer_is_the_run_with_this_tokenizer_given(config, tmp_path, spec, trained):
    # The step of the first run is compiled for the size in the spec, before the tokenizer exists.
    def losses(name, tokenizer):
        nanoflax.pretrain(with_data(config, tokenizer=tokenizer), str(tmp_path / name))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]

    new = losses("new", spec)
    assert trained == [spec] and len(new) >= 3
    assert losses("given", str(tmp_path / "new" / "tokenizer")) == new
    assert trained == [spec]


def test_a_tokenizer_is_trained_once_for_the_same_text(config, tmp_path, trained):
    fingerprint = lambda c: text_data.text_tokenizer(c, str(tmp_path / "run")).fingerprint
    first = fingerprint(config)
    assert fingerprint(config) == first and len(trained) == 1
    (cached,) = (tmp_path / "cache").glob("tokenizer-*")
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")  # damaged: it is trained again
    assert fingerprint(config) == first and len(trained) == 2
    assert fingerprint(with_data(config, tokenizer="unigram:291")) != first
    (tmp_path / "0.txt").write_text("other words")
    assert fingerprint(config) != first and len(trained) == 4
    (tmp_path / "full").write_text("")  # a cache that cannot be made
    assert fingerprint(with_data(config, cache=str(tmp_path / "full" / "cache"))) and len(trained) == 5


def test_shares_of_a_mixture_decide_its_tokenizer(config, tmp_path, trained):
    (tmp_path / "more.jsonl").write_text('{"text": "1 + 2 = 3 and so on"}\n' * 200)
    both = f"words={config.data.train}; numbers=text:{tmp_path}/more.jsonl"
    for weight in (1, 5, 1):
        mixed = with_data(config, train=both, mixture=f"0: words=1,numbers={weight}", tokenizer="bpe:300")
        text_data.text_tokenizer(mixed, str(tmp_path / "run"))
    assert len(trained) == 2


def test_mistakes_that_only_a_new_tokenizer_shows(config, tmp_path):
    long = dataclasses.replace(SHORT, sample_prompt="word " * 99, sample_tokens=5)
    for wrong, message in [
        (dataclasses.replace(config, train=long), "context"),
        (with_data(config, tokenizer="unigram:9000"), "the corpus is too small for this vocabulary"),
        (with_data(config, tokenizer="bpe:200"), "need at least bpe:"),
    ]:
        with pytest.raises(UserError, match=message):
            nanoflax.pretrain(wrong, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
