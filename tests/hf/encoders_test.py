"""Encoders and encoder-decoders beyond the comparison of tests/hf/models_test.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import nanoflax
from nanoflax import config as configs
from nanoflax import hf
from nanoflax.generate import beam_search, log_likelihoods, sample
from nanoflax.nn import build
from tests.compiled import apply
from tests.hf.models_test import V, make


def test_t5_reads_and_writes_texts_longer_than_n_positions(tmp_path):
    """Sources and targets of three times n_positions, as in Transformers: relative positions have no limit."""
    rng = np.random.default_rng(0)
    source, target = rng.integers(4, 60, (2, 48)), rng.integers(4, 60, (2, 50))

    def both(std):
        theirs = make("t5-1.1", std=std, n_positions=16)
        theirs.save_pretrained(tmp_path)
        config, params = hf.load(tmp_path)
        assert config.context == 16
        return theirs, build(config), params

    theirs, model, params = both(0.1)
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(target), source=jnp.asarray(source))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target)).logits
        loss = theirs(input_ids=torch.tensor(source), labels=torch.tensor(target)).loss
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1, float(expected.abs().max())))
    scores = log_likelihoods(model, params, source.tolist(), target.tolist())
    np.testing.assert_allclose(-np.sum(scores) / target.size, loss, rtol=1e-5)

    theirs, model, params = both(0.4)
    settings = dict(max_new_tokens=48, do_sample=False, repetition_penalty=2.0, pad_token_id=0)
    theirs.generation_config = transformers.GenerationConfig(**settings, decoder_start_token_id=0)
    expected = theirs.generate(torch.tensor(source))[:, -48:]
    assert len(set(expected.flatten().tolist())) > 5
    found = sample(model, params, source.tolist(), 48, temperature=0, eos_id=[], repetition_penalty=2.0)
    assert found == expected.tolist()
    assert len(beam_search(model, params, source.tolist(), beams=2, max_new_tokens=20)) == 2


def test_mbart_begins_with_the_language_of_the_generation_config(tmp_path):
    theirs = make("mbart", std=0.4)
    theirs.generation_config = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, pad_token_id=1, decoder_start_token_id=2, forced_bos_token_id=63
    )
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    assert config.start_id == 61 and config.generation.decoder_start_token_id == 2
    prompt = list(range(4, 20))
    expected = theirs.generate(torch.tensor([prompt]))[0, -12:].tolist()
    assert sample(build(config), params, [prompt], 12, temperature=0, eos_id=[]) == [expected] and expected[0] == 63


@pytest.mark.parametrize("task, head", [("classify", "SequenceClassification"), ("tag", "TokenClassification")])
def test_a_fine_tuned_modernbert_opens_in_transformers(task, head, tmp_path):
    words = ["good", "bad", "film", "book", "the"]
    library = pytest.importorskip("tokenizers")
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    source = tmp_path / "source"
    make("modernbert-mlm", vocab=V).save_pretrained(source)
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(source)
    rng, rows = np.random.default_rng(0), []
    for _ in range(48):
        text = [str(w) for w in rng.choice(words, 4)]
        tags = ["O" if w == "the" else "B-W" for w in text]
        rows.append(
            {"text": " ".join(text), "label": text[0]} if task == "classify" else {"tokens": text, "tags": tags}
        )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.Config(task=configs.TASK_KINDS[task](length=16), train=configs.TrainConfig(steps=3, batch_size=8))
    run = nanoflax.finetune(
        str(source), f"jsonl:{data}", validation=f"jsonl:{data}", workdir=str(tmp_path / "run"), config=config
    )
    run.save_pretrained(str(tmp_path / "out"))
    theirs, info = getattr(transformers, f"ModernBertFor{head}").from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    ids = np.array([[2, 5, 7, 8, 3]], np.int32)
    config, params = hf.load(tmp_path / "out")
    found = apply(build(config), params, ids)
    np.testing.assert_allclose(theirs(torch.tensor(ids).long()).logits.detach(), np.asarray(found), atol=1e-5)
