"""The perplexity of texts longer than the context, equal to a computation with Transformers."""

import math

import jax
import pytest
import torch
import transformers

import nanoflax
from nanoflax import evals, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError

TEXTS = ["One two three. " * 30, "A short text.", "Numbers: " + " ".join(map(str, range(70)))]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strided")
    tokenizer = tokenizers.train_sentencepiece(TEXTS, 300, "bpe")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, layers=2, dim=32, heads=4, context=48)
    model = nanoflax.build(config)
    nanoflax.hf.save(folder / "model", config, nanoflax.init(model, jax.random.PRNGKey(0)), tokenizer)
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    run = nanoflax.open(folder / "model")
    return run, f"text:{folder}/*.txt", folder / "model"


@pytest.mark.parametrize("stride", [16, 48])
def test_perplexity_is_that_of_transformers(opened, stride):
    run, data, directory = opened
    found = evals.strided_perplexity(run, data, stride)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer, context, nats, tokens = run.tokenizer, run.model.config.context, 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.framing.first_id, *tokenizer.encode(text), tokenizer.eos_id]
        done = 1  # the first token is given
        while done < len(ids):
            end = min(len(ids), done + (context if done == 1 else stride))
            inputs = torch.tensor([ids[max(0, end - 1 - context) : end]])
            with torch.no_grad():
                logs = model(inputs[:, :-1]).logits[0].log_softmax(-1)
            nats -= float(logs.gather(1, inputs[0, 1:, None])[-(end - done) :].sum())
            tokens, done = tokens + end - done, end
    assert found["tokens"] == tokens and found["documents"] == 3
    assert math.isclose(found["loss"], nats / tokens, rel_tol=1e-5)
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / sum(map(len, TEXTS)), rel_tol=1e-5)


def test_more_context_than_windows_that_do_not_overlap():
    """A stride of one: each token has all the context that fits, as many tokens as windows."""
    pairs = list(evals.windows(range(100, 200), 7, 48, 1))
    assert [ids for _, predicted in pairs for ids in predicted] == list(range(100, 200))
    assert len(pairs) == 1 + 52 and all(len(before) + len(ids) == 49 for before, ids in pairs)


@pytest.mark.parametrize("stride", [0, 49])
def test_a_stride_out_of_range_is_refused(opened, stride):
    with pytest.raises(UserError, match=f"--stride={stride} must be from 1 to the model's context, 48"):
        evals.strided_perplexity(*opened[:2], stride)
