"""GGUF files of models with experts: names, layouts and metadata as llama.cpp's converter has them, and MXFP4."""

import dataclasses
import re

import gguf as library
import jax
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanoflax import hf
from nanoflax.errors import UserError
from nanoflax.hf import gguf_models
from nanoflax.hf.family import canonical, different_fields
from tests.hf.gguf_models_test import PLAIN_MOE, paths, refused, saved
from tests.hf.models_test import tensors_of
from tests.hf.mxfp4_test import random_parts
from tests.hf.shapes import YARN

PLAIN = dict(sliding_window=None, rope_parameters=None)
OSS = dict(attention_bias=True, tie_word_embeddings=False, swiglu_limit=7.0, swiglu_alpha=1.702, hidden_size=64)
ROPE = {"rope_type": "default", "rope_theta": 300, "partial_rotary_factor": 0.75}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
MODELS = {  # our case -> architecture of llama.cpp, changes
    "mixtral": ("llama", PLAIN),
    "olmoe": ("olmoe", dict(norm_topk_prob=False, attention_bias=False, clip_qkv=None)),
    "qwen3_moe": ("qwen3moe", PLAIN_MOE | dict(norm_topk_prob=True, rope_parameters=YARN)),
    "qwen2_moe": ("qwen2moe", dict(decoder_sparse_step=1, norm_topk_prob=False)),
    "qwen2_moe-windows": ("qwen2moe", PLAIN_MOE | dict(qkv_bias=False, norm_topk_prob=False, hidden_act="silu")),
    "gpt_oss-yarn": ("gpt-oss", OSS | dict(rope_parameters=YARN | {"truncate": False, "beta_fast": 8, "beta_slow": 2})),
    "gpt_oss-default-rope": ("gpt-oss", OSS | dict(layer_types=["sliding_attention", "full_attention"] * 2,
                                                   num_hidden_layers=4)),
    "granitemoe": ("granitemoe", {}),
    "granitemoeshared": ("granitemoe", dict(attention_bias=True, attention_multiplier=1, embedding_multiplier=2)),
    "glm4_moe-groups": ("glm4moe", dict(n_group=1, topk_group=1, hidden_act="silu", rope_parameters=ROPE)),
    "dots1-windows": ("dots1", PLAIN | dict(n_group=1, topk_group=1, hidden_act="silu", attention_bias=False)),
    "ernie4_5_moe": ("ernie4_5-moe", dict(moe_norm_min=1e-12)),
    "deepseek_v3": ("deepseek2", {}),
    "deepseek_v3-direct": ("deepseek2", dict(attention_bias=False, rope_interleave=True, rope_parameters=MSCALE,
                                             hidden_act="silu", num_hidden_layers=26)),
    "deepseek_v2": ("deepseek2", dict(rope_parameters=MSCALE)),
    "hunyuan": ("hunyuan-dense", {}),
    "hunyuan_moe": ("hunyuan-moe", {}),
}  # fmt: skip
REFUSED = [
    ("qwen2_moe", dict(norm_topk_prob=True, decoder_sparse_step=1), "qwen2moe, except model.moe.renormalise=True"),
    ("gpt_oss-yarn", dict(swiglu_limit=5.0, rope_parameters=YARN | {"truncate": False}), "except model.swiglu_limit=5"),
    ("gpt_oss-yarn", dict(swiglu_limit=7.0, rope_parameters=YARN), "gpt-oss, except model.rope.truncate=True"),
    ("glm4_moe-groups", dict(hidden_act="silu"), "glm4moe, except model.moe.groups=4, model.moe.top_groups=2"),
    ("dots1-windows", dict(n_group=1, topk_group=1, hidden_act="silu", attention_bias=False), "except model.window=5"),
    ("ernie4_5_moe-bias", {}, "the nearest is ernie4_5-moe, except"),
    ("deepseek_v3", dict(rope_parameters=YARN), "no architecture of GGUF files here"),
    (
        "deepseek_v3-direct",
        dict(attention_bias=False, rope_interleave=True, rope_parameters=MSCALE, hidden_act="silu"),
        "the nearest is deepseek2, except model.layers=",
    ),
    ("qwen3-next", {}, "no architecture of GGUF files here"),
    ("llama4", {}, "no architecture of GGUF files here"),
]


def converted(directory, config, kind, pairs):
    """The tensors of a directory as llama.cpp's converter names and shapes them."""
    names, found, stacks = library.get_tensor_name_map(kind, config.layers), {}, {}

    def put(name, x):
        name = re.sub(r"_(score_correction)_bias$", r"_\1.bias", name)
        name = f"{name}.weight" if name.endswith("sinks") else name
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ours, name
        if pairs and ours.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
            x = x.reshape(-1, 2, config.K // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        found[ours] = x

    for name, x in tensors_of(directory).items():
        if expert := re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", name):
            module, e, part = expert.groups()
            part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(part, part)
            stacks.setdefault(f"{module.replace('block_sparse_moe', 'mlp')}.{part}.weight", {})[int(e)] = x
        elif ".mlp.experts." in name:  # gpt-oss
            end = "bias" if name.endswith("_bias") else "weight"
            x, name = x if end == "bias" else x.swapaxes(1, 2), name.removesuffix("_bias")
            parts = {"gate_proj": x[:, ::2], "up_proj": x[:, 1::2]} if "gate_up" in name else {"down_proj": x}
            for part, y in parts.items():
                put(f"{name.rpartition('.')[0]}.{part}.{end}", y)
        elif "input_linear" in name:  # Granite
            module = {"block_sparse_moe": "mlp.experts", "shared_mlp": "mlp.shared_experts"}[name.split(".")[3]]
            for part, y in zip(("gate", "up"), np.split(x, 2, -2), strict=True):
                put(f"{'.'.join(name.split('.')[:3])}.{module}.{part}_proj.weight", y)
        else:
            put(name, x[0] if x.shape[0] == 1 else x)
    for name, experts in stacks.items():
        put(name, np.stack([experts[e] for e in range(len(experts))]))
    return found


@pytest.mark.parametrize("case", MODELS)
def test_files_are_those_of_llama_cpp_s_converter(case, tmp_path):
    architecture, changes = MODELS[case]
    _, config, params = saved(tmp_path, case, changes)
    file = tmp_path / "x.gguf"
    assert hf.save_gguf(file, config, params, kind="F32").architecture == architecture
    reader = library.GGUFReader(file)
    kind = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}[architecture]
    expected = converted(tmp_path / "model", config, kind, architecture in ("llama", "granitemoe"))
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, name)
    value = lambda name: reader.fields[f"{architecture}.{name}"].contents()
    if config.moe.experts:
        assert value("expert_count") == config.moe.experts and value("expert_used_count") == config.moe.active
        assert value("expert_feed_forward_length") == (config.moe.expert_dim or config.F)
    assert value("rope.dimension_count") == config.rotary_dim
    types = {field.types[0] for name, field in reader.fields.items() if name.endswith(("epsilon", "base", "scale"))}
    assert types == {library.GGUFValueType.FLOAT32}
    stacked = dataclasses.replace(config, moe=dataclasses.replace(config.moe, stacked=True))
    assert gguf_models.describe(stacked)[0].name == architecture  # however its Transformers directory was
    back, read = hf.load(file)
    same = {"balance_loss": config.moe.balance_loss, "stacked": config.moe.stacked}
    back = dataclasses.replace(back, moe=dataclasses.replace(back.moe, **same))
    assert not different_fields(canonical(config), canonical(back))
    assert {p: x.tobytes() for p, x in paths(read).items()} == {p: x.tobytes() for p, x in paths(params).items()}


@pytest.mark.parametrize("case, changes, said", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(case, changes, said, tmp_path):
    _, config, params = saved(tmp_path, case, (OSS if case.startswith("gpt_oss") else {}) | changes)
    assert said in refused(tmp_path / "x.gguf", config, params)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "gpt_oss-yarn", "glm4_moe-groups", "deepseek_v3"])
def test_wrong_metadata_never_crashes(case, tmp_path):
    _, config, _ = saved(tmp_path, case, MODELS[case][1])
    architecture, metadata, _ = gguf_models.describe(config)
    names = [f"x{i}" for i in range(50)] + ["output.weight"]
    gguf_models.read_config(architecture, metadata, names, 67, None, "x")
    refusals = accepted = 0
    for key in [*metadata, f"{architecture.name}.nextn_predict_layers", f"{architecture.name}.rope.scaling.type"]:
        for value in (0, -1, 3, 2**31, 0.5, float("nan"), "x", "yarn", True, np.arange(4), ["x"], None):
            changed = metadata | {key: value}
            changed = {name: x for name, x in changed.items() if x is not None}
            try:
                found = gguf_models._architecture_of(changed | {"general.architecture": architecture.name}, "x")
                gguf_models.read_config(found, changed, names, 67, None, "x")
                accepted += 1
            except UserError as error:
                assert "\n" not in str(error)
                refusals += 1
    assert refusals > 100 and accepted > 40


def rewritten(old, new, changes, more):
    """The file with other metadata and tensors (None: without), and with two dimensions of some vectors."""
    reader = library.GGUFReader(old)
    writer = library.GGUFWriter(new, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, changes.get(name, field.contents()), field.types[0])
    for name, value in changes.items():
        if name not in reader.fields:
            writer.add_key_value(name, value, library.GGUFValueType.UINT32)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors} | more
    for name, x in tensors.items():
        if x is not None:
            writer.add_tensor(name, x[None] if name.endswith(("gate_inp_shexp.weight", "exp_probs_b.bias")) else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["qwen2_moe", "glm4_moe-groups", "deepseek_v3", "deepseek_v2"])
def test_published_files_have_other_vectors_more_layers_and_split_heads(case, tmp_path):
    architecture, changes = MODELS[case]
    _, config, params = saved(tmp_path, case, changes)
    hf.save_gguf(tmp_path / "old.gguf", config, params, kind="F32")
    changed, more = {}, {}
    if architecture == "glm4moe":
        changed = {f"{architecture}.block_count": config.layers + 2, f"{architecture}.nextn_predict_layers": 2}
        more = {f"blk.{config.layers + i}.nextn.enorm.weight": np.ones(config.dim, np.float32) for i in (0, 1)}
        rewritten(tmp_path / "old.gguf", tmp_path / "wrong.gguf", {}, more)
        with pytest.raises(UserError, match=rf"blk\.{config.layers}\.nextn"):
            hf.load(tmp_path / "wrong.gguf")
    if architecture == "deepseek2":  # keys and values of latent vectors, as of one head
        R, rope, V, K = config.latent.rank, config.latent.rope_dim, config.latent.value_dim, config.K
        lengths = {"head_count_kv": 1, "key_length": R + rope, "value_length": R}
        lengths |= {"key_length_mla": K, "value_length_mla": V}
        changed = {f"{architecture}.attention.{name}": value for name, value in lengths.items()}
        found = {x.name: x.data for x in library.GGUFReader(tmp_path / "old.gguf").tensors}
        for i in range(config.layers):
            heads = found[f"blk.{i}.attn_kv_b.weight"].reshape(config.heads, K - rope + V, R)
            keys, values = heads[:, : K - rope].swapaxes(1, 2).copy(), heads[:, K - rope :].copy()
            more |= {f"blk.{i}.attn_{name}_b.weight": x for name, x in (("kv", None), ("k", keys), ("v", values))}
        rewritten(
            tmp_path / "old.gguf", tmp_path / "wrong.gguf", changed, more | {"blk.0.attn_v_b.weight": values[None]}
        )
        with pytest.raises(UserError, match=r"blk\.0\.attn_"):
            hf.load(tmp_path / "wrong.gguf")
    rewritten(tmp_path / "old.gguf", tmp_path / "new.gguf", changed, more)
    (a, x), (b, y) = (hf.load(tmp_path / f"{name}.gguf") for name in ("old", "new"))
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_mxfp4_of_gpt_oss(tmp_path):
    """The blocks of the published directories in llama.cpp's order, and ours as the library reads them."""
    _, config, params = saved(tmp_path, "gpt_oss-yarn", MODELS["gpt_oss-yarn"][1] | dict(intermediate_size=32))
    blocks, scales = random_parts(config.moe.experts, 64, 1, 118, 124)  # of down_proj
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32).numpy()
    # A byte of theirs has two neighbours; of llama.cpp numbers j and j + 16 of the 32.
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32)
    packed = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], -1)
    writer = library.GGUFWriter(tmp_path / "x.gguf", "gpt-oss")
    kind = library.GGMLQuantizationType.MXFP4
    writer.add_tensor("down", packed.reshape(*blocks.shape[:2], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = hf.open_gguf(tmp_path / "x.gguf")[1]["down"]
    np.testing.assert_array_equal(tensor.read().swapaxes(1, 2), expected)
    for i in range(config.layers):
        params["decoder"][f"block_{i}"]["mlp"]["experts"]["down"]["kernel"] = expected
    summary = hf.save_gguf(tmp_path / "x.gguf", config, params, kind="MXFP4")
    assert summary.tensors["MXFP4"] == 3 * config.layers and summary.tensors["Q8_0"] == 2 + 4 * config.layers
    back, read = hf.load(tmp_path / "x.gguf")
    assert back.moe.experts == config.moe.experts
    for i in range(config.layers):
        np.testing.assert_array_equal(read["decoder"][f"block_{i}"]["mlp"]["experts"]["down"]["kernel"], expected)
    found = {x.name: x for x in library.GGUFReader(tmp_path / "x.gguf").tensors}["blk.0.ffn_gate_exps.weight"]
    gate = read["decoder"]["block_0"]["mlp"]["experts"]["gate"]["kernel"]
    np.testing.assert_array_equal(library.dequantize(found.data, found.tensor_type), gate.swapaxes(1, 2))
