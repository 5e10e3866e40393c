"""Models that others must open: shipped configurations and encoders in Transformers, with equal outputs."""

import dataclasses
import os
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import nanoflax
from experiments.flags import load_config
from nanoflax import hf, parallel
from nanoflax.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from nanoflax.errors import UserError

CONFIGS = sorted(path.stem for path in pathlib.Path(__file__).parents[2].glob("experiments/configs/*.py"))
SMALL = dict(layers=1, dim=32, heads=4, head_dim=None, mlp_dim=64, context=24, vocab_size=40)
AUTO = {
    "none": transformers.AutoModel,
    "mlm": transformers.AutoModelForMaskedLM,
    "classify": transformers.AutoModelForSequenceClassification,
    "tag": transformers.AutoModelForTokenClassification,
}


def random_params(config, seed):
    """Parameters of all sizes, none of them zero."""
    rng = np.random.default_rng(seed)
    shapes = parallel.param_shapes(nanoflax.build(config))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(x.ndim == 1, 0.3, x.shape), jnp.float32), shapes)


def outputs(config, params, directory, seed=0):
    """(our outputs, Transformers' outputs) for random texts of two lengths, at real tokens."""
    rng = np.random.default_rng(seed)
    model, T = nanoflax.build(config), config.context
    ids = rng.integers(3, 39, (2, T))
    mask = np.arange(T) < [[T], [T - 5]]
    auto = AUTO.get(config.head, transformers.AutoModelForCausalLM)
    if config.reads_source:
        auto = transformers.AutoModelForSeq2SeqLM
    theirs = auto.from_pretrained(directory, attn_implementation="eager").eval()
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}
    apply = jax.jit(lambda *inputs, **named: model.apply({"params": params}, *inputs, **named))
    if config.reads_source:
        targets = ids[:, : T // 2]
        ours = apply(targets, source=ids, source_mask=mask)[0]
        given["decoder_input_ids"] = torch.tensor(targets)
        mask = np.ones_like(targets, bool)
    else:
        ours = apply(ids)[0] if config.is_causal else apply(ids, mask)
    with torch.no_grad():
        found = theirs(**given)
    found = (found.last_hidden_state if config.head == "none" else found.logits).numpy()
    if config.head == "classify":
        return ours, found
    if config.is_causal and not config.reads_source:
        mask = mask & (np.arange(T) < T - 5)
    return np.asarray(ours)[mask], found[mask]


def assert_equal(config, params, directory, name=""):
    ours, found = outputs(config, params, directory)
    np.testing.assert_allclose(ours, found, atol=3e-5 * np.abs(found).max(), err_msg=name)


def reduced(name):
    """The model of a shipped configuration, with the same switches and small sizes."""
    model = load_config(name).model
    changes = SMALL | {"kv_heads": model.kv_heads and 2, "decoder_layers": model.decoder_layers and 1, "dropout": 0.0}
    if model.logit_scale != 1:
        changes["logit_scale"] = SMALL["dim"] ** -0.5
    return dataclasses.replace(model, **changes)


def test_every_shipped_configuration_is_opened_by_transformers(tmp_path):
    for i, (config, name) in enumerate({reduced(name): name for name in CONFIGS}.items()):
        params = random_params(config, i)
        hf.save(tmp_path / str(i), config, params)
        assert_equal(config, params, tmp_path / str(i), name)
        back, same = hf.load(tmp_path / str(i))
        assert nanoflax.build(back) and jax.tree.structure(same) == jax.tree.structure(params)
    assert len(CONFIGS) > 15


@pytest.mark.parametrize("head", AUTO)
def test_an_encoder_without_token_types_has_a_row_of_zeros(head, tmp_path):
    rng = random.Random(head)
    config = ModelConfig(
        architecture="encoder", head=head, norm_place="post", embed_norm=True, head_bias=head == "mlm", labels=3,
        activation=rng.choice(["gelu", "relu"]), pooler=head == "none" and rng.random() < 0.5, norm_eps=1e-5, **SMALL,
    )  # fmt: skip
    params = random_params(config, 1)
    assert hf.save(tmp_path, config, params).model_type == "bert"
    assert_equal(config, params, tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.type_vocab_size == 1
    back, same = hf.load(tmp_path)
    assert back.token_types == 1 and not np.any(same["type_embed"]["embedding"])
    assert_equal(back, same, tmp_path)
    if head == "mlm":  # DistilBERT has no token types, so it needs no such row
        distil = dataclasses.replace(config, norm_eps=1e-12, pooler_activation="relu")
        assert hf.save(tmp_path / "d", distil, random_params(distil, 2)).model_type == "distilbert"
        assert_equal(distil, random_params(distil, 2), tmp_path / "d")
    assert os.path.exists(tmp_path / "model.safetensors")


def test_a_window_of_an_encoder_sees_both_sides_as_transformers_mask_does(tmp_path):
    config = dataclasses.replace(reduced("masked_lm"), head="none", layers=2)
    params, ids = random_params(config, 3), np.random.default_rng(3).integers(3, 39, (2, 24))
    hf.save(tmp_path, config, params)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    real = np.arange(24) < [[24], [17]]
    for window in (1, 2, 5, 24):
        near = transformers.masking_utils.sliding_window_bidirectional_overlay(window - 1)
        seen = np.array([[bool(near(0, 0, t, s)) for s in range(24)] for t in range(24)]) & real[:, None, None]
        with torch.no_grad():
            found = theirs(torch.tensor(ids), attention_mask=torch.tensor(np.where(seen, 0.0, -1e30)).float())
        windowed = nanoflax.build(dataclasses.replace(config, window=window))
        ours = jax.jit(windowed.apply)({"params": params}, ids, real)
        np.testing.assert_allclose(np.asarray(ours)[real], found.last_hidden_state.numpy()[real], atol=1e-4)


def test_a_norm_without_scale_may_come_before_or_after_the_rotation():
    model = ModelConfig(
        vocab_size=40, context=16, layers=1, dim=16, heads=2, norm="rmsnorm", bias=False, positions="rotary",
        gated=False, activation="relu2", norm_scale=False, embed_norm=True, rope=RopeConfig(reversed=True),
        logit_softcap=15.0, tied=False)  # fmt: skip
    families = [
        hf.family_of_config(dataclasses.replace(model, qk_norm=kind), "nanochat") for kind in ("head", "rotated")
    ]
    assert families[0] is families[1]
    params = nanoflax.init(nanoflax.build(model), jax.random.key(0))
    first, second = (
        nanoflax.build(dataclasses.replace(model, qk_norm=kind)).apply({"params": params}, np.arange(12)[None])[0]
        for kind in ("head", "rotated")
    )
    np.testing.assert_allclose(first, second, atol=1e-5 * np.abs(second).max())


@pytest.mark.parametrize(
    "name, changes",
    [
        ("qwen3_next", dict(norm_unit_offset=True, qk_norm="head", attention_gate=True, layer_types=("delta",))),
        ("deepseek_v2", dict(moe=MoEConfig(experts=4, renormalise=False, expert_bias=False, group_best=1))),
    ],
)
def test_fields_that_nothing_reads_do_not_matter(name, changes):
    """Heads where no layer has attention, and the scores of groups where there is one group."""
    heads = dict(heads=3, kv_heads=1, head_dim=4) if name == "qwen3_next" else {}
    latent = dict(latent=LatentConfig(rank=4, rope_dim=2), rope=RopeConfig(interleaved=True)) if not heads else {}
    model = ModelConfig(
        vocab_size=40, layers=2, dim=16, mlp_dim=32, norm="rmsnorm", gated=True, bias=False, positions="rotary",
        activation="silu", tied=False, **({"heads": 2} | heads | latent | changes))  # fmt: skip
    assert hf.family_of_config(model, name).model_type == name


@pytest.mark.parametrize("kinds", [("mamba2", "full"), ("delta", "mamba2"), ("chunked", "mamba2")])
def test_kinds_of_layers_that_no_family_has_together_are_refused(kinds, tmp_path):
    config = ModelConfig(**SMALL | dict(layers=2), layer_types=kinds, window=4 * ("chunked" in kinds))
    with pytest.raises(UserError, match="^no family of Transformers .* has such models; the nearest is .*$"):
        hf.save(tmp_path, config, random_params(config, 0))


M2M = dict(architecture="encoder_decoder", positions="sinusoidal_fairseq", position_offset=2, activation="relu")


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm="layernorm", positions="rotary", scale_by_layer=True, rope=RopeConfig(scaling="linear", factor=2.0)),
        dict(norm="layernorm", positions="rotary", scale_by_layer=True, rope=RopeConfig(scaling="dynamic", factor=2.0)),
        M2M | dict(token_types=2),
    ],
)
def test_settings_that_only_some_families_write_are_refused_by_the_others(changes, tmp_path):
    config = ModelConfig(**SMALL | changes)
    with pytest.raises(UserError, match="^no family of Transformers .* has such models; the nearest is .*$"):
        hf.save(tmp_path, config, random_params(config, 0))


def test_a_family_is_found_behind_one_that_lacks_the_rotary_scaling(tmp_path):
    config = ModelConfig(
        **SMALL, positions="rotary", window=5, tied=False, rope=RopeConfig(scaling="linear", factor=4.0)
    )
    params = random_params(config, 0)
    assert hf.save(tmp_path, config, params).model_type == "starcoder2"
    read, found = hf.load(tmp_path)
    assert (read.rope, read.window) == (config.rope, 5)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), found, params))
