"""Models as GGUF files: Transformers and we read what we write, and what GGUF cannot express is refused by name."""

import dataclasses

import gguf as library
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import nanoflax
from nanoflax import config as configs
from nanoflax import hf, nn
from nanoflax.errors import UserError
from nanoflax.hf import gguf_models
from nanoflax.hf.family import canonical, different_fields
from tests.hf.cases import LINEAR, LLAMA, LLAMA3
from tests.hf.models_test import make

# Transformers reads neither head_dim of qwen3 nor query_pre_attn_scalar of Gemma: here they are its defaults.
GEMMA = dict(head_dim=256, sliding_window=5, layer_types=None, rope_parameters=None)
PLAIN_MOE = dict(mlp_only_layers=[], decoder_sparse_step=1, attention_bias=False, use_sliding_window=False,
                 rope_parameters=None)  # fmt: skip
MODELS = {
    "llama": ("llama", dict(rms_norm_eps=1e-5, hidden_size=64, intermediate_size=96)),
    "llama-tied": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=4, head_dim=16)),
    "mistral": ("llama", dict(num_key_value_heads=1)),
    "qwen2": ("qwen2", dict(hidden_size=64, rope_parameters={"rope_type": "default", "rope_theta": 300.0})),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=128)),
    "gemma2": ("gemma2", GEMMA | dict(query_pre_attn_scalar=256)),
    "gemma3": ("gemma3-pattern", GEMMA | dict(query_pre_attn_scalar=256, hidden_size=64)),
    # nor moe_intermediate_size; norm_topk_prob is true in llama.cpp.
    "qwen3moe": ("qwen3_moe", dict(moe_intermediate_size=768, norm_topk_prob=True, **PLAIN_MOE)),
    "qwen2moe": (
        "qwen2_moe",
        dict(
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_hidden_layers=2,
            norm_topk_prob=False,
            **PLAIN_MOE,
        ),
    ),
    "gemma3-untied": ("gemma3", GEMMA | dict(tie_word_embeddings=False)),
}
TYPES = {"F32": np.float32, "F16": np.float16, "Q8_0": np.float32}


def saved(tmp_path, case, changes):
    theirs = make(case, **changes)
    theirs.save_pretrained(tmp_path / "model")
    return theirs, *hf.load(tmp_path / "model")


def refused(*args, **kwargs):
    with pytest.raises(UserError) as error:
        hf.save_gguf(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def paths(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}


def logits(config, params, ids):
    return np.asarray(jax.jit(nn.build(config).apply)({"params": params}, ids)[0], np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_from_every_type(name, tmp_path):
    case, changes = MODELS[name]
    _, config, params = saved(tmp_path, case, changes)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    expected = logits(config, params, ids)
    for kind in TYPES:
        file = tmp_path / f"{kind}.gguf"
        summary = hf.save_gguf(file, config, params, kind=kind)
        assert summary.nbytes == file.stat().st_size and kind in summary.tensors
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        with torch.no_grad():
            found = theirs(torch.tensor(ids)).logits.numpy()
        ours, read = hf.load(file)
        assert not different_fields(canonical(config), canonical(ours))
        own = logits(ours, jax.tree.map(lambda x: x.astype(np.float32), read), ids)
        np.testing.assert_allclose(found, own, atol=2e-5)
        if config.moe.experts and kind != "F32":  # after rounding, a router may choose other experts
            continue
        size = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=size * {"F32": 1e-5, "F16": 5e-3, "Q8_0": 0.1}[kind])
        assert (np.abs(found - expected).max() > 1e-5) == (kind != "F32")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_parameters_come_back(name, tmp_path):
    case, changes = MODELS[name]
    _, config, params = saved(tmp_path, case, changes)
    for kind in TYPES:
        hf.save_gguf(tmp_path / "x.gguf", config, params, kind=kind)
        back = paths(hf.load(tmp_path / "x.gguf")[1])
        for path, x in paths(params).items():
            found = back[path]
            if x.ndim == 1 and config.norm_unit_offset:  # 1 + x in float32, which may round it
                assert np.abs(found - x).max() <= 2**-23 * (1 + np.abs(x)).max()
                x = (x + np.float32(1)) - np.float32(1)
            elif x.ndim > 1 and kind == "F16":
                x = x.astype(np.float16)
            elif x.ndim > 1 and kind == "Q8_0":
                rows = x if path == "['embed']['embedding']" else x.T
                if rows.shape[-1] % 32:
                    x = x.astype(np.float16)
                else:
                    number = library.GGMLQuantizationType.Q8_0
                    rows = np.ascontiguousarray(rows)
                    rows = library.dequantize(library.quantize(rows, number), number)
                    x = rows if path == "['embed']['embedding']" else rows.T
            assert (found.dtype, found.tobytes()) == (x.dtype, x.tobytes()), path


def test_bfloat16_gemma_comes_back_exactly(tmp_path):
    _, config, params = saved(tmp_path, "gemma2", MODELS["gemma2"][1])
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    hf.save_gguf(tmp_path / "x.gguf", config, params, kind="F32")
    for path, x in paths(hf.load(tmp_path / "x.gguf")[1]).items():
        assert x.tobytes() == paths(params)[path].astype(np.float32).tobytes(), path
    hf.save_gguf(tmp_path / "x.gguf", config, params, kind="BF16")
    for path, x in paths(hf.load(tmp_path / "x.gguf")[1]).items():
        expected = paths(params)[path].astype(np.float32 if x.ndim == 1 else ml_dtypes.bfloat16)
        assert (x.dtype, x.tobytes()) == (expected.dtype, expected.tobytes()), path


def test_names_and_metadata_are_llama_cpp_s(tmp_path):
    _, config, params = saved(tmp_path, "llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True))
    hf.save_gguf(tmp_path / "x.gguf", config, params, kind="Q8_0", name="a model")
    reader = library.GGUFReader(tmp_path / "x.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama",
        "general.file_type": library.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "general.type": "model",
        "general.name": "a model",
        "llama.vocab_size": 67,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 300.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16"  # rows of 48
    assert kinds["rope_freqs.weight"] == kinds["output_norm.weight"] == kinds["blk.0.ffn_norm.weight"] == "F32"
    assert "output.weight" not in kinds and len(kinds) == 2 + 2 * 9 + 1
    # Llama 3's scaling by hand: pairs of more than 4 turns in 16 tokens are kept, of less than 1 divided by 4.
    turns = 16 * 300.0 ** (-np.arange(0, 8, 2) / 8) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    expected = 1 / (smooth + (1 - smooth) / 4)
    (factors,) = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    assert hf.load(tmp_path / "x.gguf")[0].rope == config.rope


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
def test_linear_scaling(case, tmp_path):
    changes = MODELS[case][1] | dict(rope_parameters=LINEAR)
    if case == "gemma3":
        local = {"rope_type": "default", "rope_theta": 50.0}
        changes |= dict(rope_parameters={"full_attention": LINEAR, "sliding_attention": local})
    _, config, params = saved(tmp_path, MODELS[case][0], changes)
    hf.save_gguf(tmp_path / "x.gguf", config, params)
    found = hf.load(tmp_path / "x.gguf")[0].rope
    assert found == config.rope and found.scaling == "linear" and found.factor == 4.0


def test_llama_with_biases(tmp_path):
    _, config, params = saved(tmp_path, "llama", dict(attention_bias=True, mlp_bias=True))
    hf.save_gguf(tmp_path / "x.gguf", config, params, kind="F32")
    back, read = hf.load(tmp_path / "x.gguf")
    assert back == dataclasses.replace(config, generation=back.generation)
    assert {p: x.tobytes() for p, x in paths(read).items()} == {p: x.tobytes() for p, x in paths(params).items()}


def test_padding_a_factor_of_the_table_and_a_window_longer_than_the_context(tmp_path):
    config = configs.ModelConfig(
        vocab_size=64, vocab_padding=24, context=32, window=32, layers=1, dim=32, heads=2, norm="rmsnorm", gated=True,
        activation="silu", positions="rotary", bias=False, tied=False, embed_scale=4.0)  # fmt: skip
    params = nanoflax.init(nn.build(config), jax.random.PRNGKey(0))
    hf.save_gguf(tmp_path / "x.gguf", config, params, kind="F32")
    back, read = hf.load(tmp_path / "x.gguf")
    assert (back.vocab_size, back.window) == (40, 0)
    np.testing.assert_array_equal(read["embed"]["embedding"], 4 * params["embed"]["embedding"][:40])
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(logits(back, read, ids), logits(config, params, ids)[..., :40], atol=1e-5)
    tied = dataclasses.replace(config, tied=True, window=0)
    own = {name: x for name, x in params.items() if name != "unembed"}
    assert "the nearest is llama, except model.embed_scale=4.0" in refused(tmp_path / "x.gguf", tied, own)


@pytest.mark.parametrize(
    "case, changes, said",
    [
        ("mistral", {}, "the nearest is llama, except model.window=6"),
        ("qwen2-window", {}, "the nearest is qwen2, except model.window=5, model.layer_types="),
        ("qwen3-tied", {}, "the nearest is qwen3, except model.qkv_bias=True, model.out_bias=True"),
        ("gemma2-types", {}, "the nearest is gemma2, except Gemma2ForCausalLM has no place for unembed/kernel"),
        ("gemma2", dict(query_pre_attn_scalar=144), "the nearest is gemma2, except model.attention_scale="),
        (
            "gemma2",
            dict(final_logit_softcapping=None, query_pre_attn_scalar=8),
            "is gemma2, except model.logit_softcap=0.0",
        ),
        ("gemma3", {}, "the nearest is gemma3, except model.layer_types="),
        ("llama", dict(hidden_act="gelu"), "the nearest is llama, except model.activation='gelu'"),
        ("gpt2", {}, "the nearest is"),
        ("qwen3_moe", PLAIN_MOE | dict(norm_topk_prob=False), "qwen3moe, except model.moe.renormalise=False"),
        ("bert", {}, "written for decoders with the head lm, not for model.architecture='encoder'"),
        ("llama-classify", {}, "not for model.architecture='decoder' with model.head='classify'"),
        ("t5", {}, "not for model.architecture='encoder_decoder'"),
    ],
)
def test_models_without_an_architecture_are_refused_by_name(case, changes, said, tmp_path):
    _, config, params = saved(tmp_path, case, changes)
    found = refused(tmp_path / "x.gguf", config, params)
    assert said in found
    assert not (tmp_path / "x.gguf").exists()


def test_misuse_is_refused_in_one_line(tmp_path, monkeypatch):
    config = configs.preset("nano-1m", vocab_size=64, layers=1, dim=32, heads=2)
    params = nanoflax.init(nn.build(config), jax.random.PRNGKey(0))
    file = tmp_path / "x.gguf"
    assert "'Q4_K' must be F32, F16, BF16, Q8_0" in refused(file, config, params, kind="Q4_K")
    assert "must be the name of a .gguf file" in refused(tmp_path / "x", config, params)
    query = params["decoder"]["block_0"]["attention"]["query"]
    leaves = {"lora_a": np.zeros((32, 2)), "lora_b": np.zeros((2, 32))}
    adapted = jax.tree.map(lambda x: x, params)
    adapted["decoder"]["block_0"]["attention"]["query"] = query | leaves
    assert "merge them first: nanoflax.peft.merge(params)" in refused(file, config, adapted)
    missing = {name: x for name, x in params.items() if name != "embed"}
    assert "embed/embedding is missing" in refused(file, config, missing)
    for value, kind in ((1e5, "F16"), (3.4e38, "BF16"), (np.inf, "F32"), (np.nan, "Q8_0")):
        wrong = params | {"embed": {"embedding": np.full((64, 32), value, np.float32)}}
        assert f"which {kind} does not have" in refused(file, config, wrong, kind=kind)
        assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path / "file" / "x.gguf", config, params)
    # After an interruption the old file is there, and no part of the new one.
    hf.save_gguf(file, config, params)
    old = file.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(library.GGUFWriter, "write_tensor_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hf.save_gguf(file, config, params, kind="F32")
    assert file.read_bytes() == old and sorted(tmp_path.iterdir()) == [tmp_path / "file", file]


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("gemma3.block_count", "x", "num_hidden_layers='x' must be of type int"),
        ("gemma3.block_count", 2**31, "num_hidden_layers=2147483648 is too large"),
        ("gemma3.attention.head_count", 0, "the sizes of the model are wrong"),
        ("gemma3.attention.head_count", [4, 4], "gemma3.attention.head_count has a value for each layer"),
        ("gemma3.attention.sliding_window", -1, "window"),
        ("gemma3.rope.dimension_count", 4, "gemma3.rope.dimension_count=4 must be 256"),
        ("gemma3.attention.sliding_window_pattern", 3, "sliding_window_pattern=3 is not supported; it must be 6"),
        ("gemma3.attention.causal", False, "gemma3.attention.causal=False"),
        ("gemma3.embedding_scale", -2.0, "gemma3.embedding_scale=-2.0 must be"),
        (
            "general.architecture",
            "bert",
            "supported are llama, qwen2, qwen3, gemma2, gemma3, qwen3moe, olmoe, qwen2moe",
        ),
        ("general.architecture", 3, "general.architecture=3 is not supported"),
    ],
)
def test_wrong_metadata_is_refused_by_name(key, value, said, tmp_path):
    _, config, params = saved(tmp_path, "gemma3-pattern", MODELS["gemma3"][1] | dict(num_hidden_layers=1))
    architecture, metadata, _ = gguf_models.describe(config)
    if key.startswith("general."):
        with pytest.raises(UserError, match=said):
            gguf_models._architecture_of({key: value}, "x")
        return
    metadata = {"gemma3.attention.head_count": 4} | metadata | {key: value}
    if key.endswith("head_count"):
        del metadata["gemma3.attention.key_length"]
    with pytest.raises(UserError, match=said):
        gguf_models.read_config(architecture, metadata, ["token_embd.weight"], 67, None, "x")


def test_llama_of_4_5_spellings(tmp_path):
    """What Transformers 4 wrote and what Transformers 5 writes give the same file."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_theta=500.0))
    theirs.save_pretrained(tmp_path / "model")
    config, params = hf.load(tmp_path / "model")
    hf.save_gguf(tmp_path / "x.gguf", config, params)
    assert hf.open_gguf(tmp_path / "x.gguf")[0]["llama.rope.freq_base"] == 500.0


def test_a_scaling_without_rotary_positions_is_refused(tmp_path):
    scaled = configs.RopeConfig(scaling="yarn", factor=4.0)
    config = configs.ModelConfig(
        vocab_size=40, layers=1, dim=32, heads=4, positions="sinusoidal_halves", rope=scaled,
        moe=configs.MoEConfig(experts=4),
    )  # fmt: skip
    with pytest.raises(UserError, match="^no architecture of GGUF files here .* has such models"):
        gguf_models.describe(config)
