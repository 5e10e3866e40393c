"""What finetune writes as adapter/: peft opens it alone, and it computes what final/ computes."""

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import hf, nn, parallel, runs, tokenizers
from nanoflax.config import Classify, Config, Denoise, ExampleData, LanguageModel, ModelConfig, OptimConfig, TrainConfig
from tests.compiled import apply

SMALL = dict(vocab_size=260, context=48, layers=1, dim=32, heads=4)
LLAMA = ModelConfig(**SMALL, norm="rmsnorm", activation="silu", gated=True, positions="rotary", bias=False, tied=True)
BERT = ModelConfig(
    **SMALL, architecture="encoder", head="none", norm_place="post", embed_norm=True, token_types=2, activation="gelu",
    norm_eps=1e-12)  # fmt: skip
BART = ModelConfig(
    **SMALL, architecture="encoder_decoder", norm_place="post", embed_norm=True, position_offset=2, head_bias=True,
    activation="gelu", start_id=2)  # fmt: skip


def write_base(directory, config):
    params = parallel.init(nn.build(config), jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: 3 * x, params)
    hf.save(directory, config, params, tokenizers.load("bytes"))
    return str(directory)


def tune(source, workdir, task, data):
    config = Config(
        data=ExampleData(train=f"jsonl:{data}"),
        optim=OptimConfig(warmup_steps=0, learning_rate=0.02, schedule="constant"),
        task=task,
        train=TrainConfig(steps=2, batch_size=4, evaluate_every=2, tensorboard=False),
    )
    nanoflax.finetune(source, peft="lora", workdir=str(workdir), config=config)
    return str(workdir / "adapter")


def check(workdir, auto):
    """final/, adapter/ opened here and adapter/ opened by peft have the same logits. Returns their configuration."""
    import peft
    import torch

    model, params, _ = runs.open_model(workdir / "final")
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 9))
    source = {"source": ids} if model.config.reads_source else {}
    logits = lambda y: np.asarray(y[0] if isinstance(y, tuple) else y)
    want = logits(apply(model, params, ids, **source))
    again, params, _ = runs.open_model(workdir / "adapter")
    np.testing.assert_allclose(logits(apply(again, params, ids, **source)), want, atol=1e-5)
    theirs = getattr(peft, auto).from_pretrained(workdir / "adapter").eval()
    more = {"decoder_input_ids": torch.tensor(ids)} if source else {}
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor(ids), **more).logits.numpy()
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    return again.config


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_adapters_are_written_with_their_merged_base(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "alpha beta {i}"}}\n' for i in range(30)))
    task = LanguageModel(length=40)
    first = tune(write_base(tmp_path / "base", LLAMA), tmp_path / "first", task, data)
    assert hf.base_of_adapter(first) == str(tmp_path / "base")
    check(tmp_path / "first", "AutoPeftModelForCausalLM")
    second = tune(first, tmp_path / "second", task, data)
    assert hf.base_of_adapter(second) == f"{second}/base"
    check(tmp_path / "second", "AutoPeftModelForCausalLM")
    (tmp_path / "second").rename(tmp_path / "moved")
    assert hf.base_of_adapter(tmp_path / "moved" / "adapter") == f"{tmp_path}/moved/adapter/base"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_new_classes_and_new_tokens_are_trained_and_in_adapter(kind, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "alpha beta {i}", "label": "{"xyz"[i % 3]}"}}\n' for i in range(40)))
    if kind == "classes":
        tune(write_base(tmp_path / "base", BERT), tmp_path / "run", Classify(length=40), data)
        config = check(tmp_path / "run", "AutoPeftModelForSequenceClassification")
        assert config.class_names == ("x", "y", "z")
        assert "peft.trained=adapters,head" in capsys.readouterr().out
        return
    tune(write_base(tmp_path / "base", BART), tmp_path / "run", Denoise(length=40, target_length=40), data)
    config = check(tmp_path / "run", "AutoPeftModelForSeq2SeqLM")
    out, err = capsys.readouterr()
    assert config.vocab_size > 260 and "peft.trained=adapters,embed" in out
    assert "rows of new tokens, drawn anew: embed, logit_bias" in err
