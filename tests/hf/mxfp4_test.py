"""MXFP4 tensors against Transformers' own conversion, to the bit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanoflax import hf
from nanoflax.errors import UserError
from nanoflax.hf import mxfp4, safetensors_io

SETTINGS = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def random_parts(E, rows, groups, low=100, high=140, seed=0):
    """(blocks, scales) as they are in a file."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (E, rows, groups, 16), dtype=np.uint8),
        rng.integers(low, high, (E, rows, groups), dtype=np.uint8),
    )


def expected(blocks, scales, dtype):
    x = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)
    return x.float().numpy().astype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32)


def opened(directory, **tensors):
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return mxfp4.unpack(SETTINGS, safetensors_io.open_safetensors(directory), directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_and_scale_is_the_number_of_transformers(dtype, tmp_path):
    # All 256 bytes with all 256 scales: subnormal numbers and infinity are among them.
    codes = np.arange(256, dtype=np.uint8)
    blocks, scales = np.tile(codes.reshape(1, 1, 16, 16), (1, 256, 1, 1)), np.tile(codes[None, :, None], (1, 1, 16))
    found = opened(tmp_path, w_blocks=blocks, w_scales=scales)["w"].read()
    wanted = expected(blocks, scales, dtype)
    assert found.shape == (1, 512, 256) and found.dtype == ml_dtypes.bfloat16
    assert found.astype(wanted.dtype).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_any_slice_is_that_part_of_the_tensor(seed, tmp_path):
    rng = np.random.default_rng(seed)
    blocks, scales = random_parts(3, 10, 3, seed=seed)
    tensor = opened(tmp_path, w_blocks=blocks, w_scales=scales)["w"]
    whole = expected(blocks, scales, torch.bfloat16)
    assert tensor.shape == whole.shape == (3, 96, 10)
    slices = tuple(
        slice(
            *(None if rng.random() < 0.2 else int(rng.integers(-n, n + 1)) for _ in "ab"), int(rng.choice([-2, 1, 3]))
        )
        for n in whole.shape[: rng.integers(0, 4)]
    )
    part = tensor.read(slices)
    assert part.shape == whole[slices].shape and part.tobytes() == whole[slices].tobytes(), slices


def test_a_slice_reads_only_its_groups(tmp_path, monkeypatch):
    blocks, scales = random_parts(4, 6, 4)
    tensor, taken, read = opened(tmp_path, w_blocks=blocks, w_scales=scales)["w"], [], safetensors_io.Tensor.read
    monkeypatch.setattr(safetensors_io.Tensor, "read", lambda *a: taken.append(x := read(*a)) or x)
    tensor.read((slice(1, 2), slice(40, 70), slice(2, 5)))
    assert [x.shape for x in taken] == [(1, 3, 2, 16), (1, 3, 2)]


def test_damaged_blocks_and_scales_are_all_named_in_one_line(tmp_path):
    blocks, scales = random_parts(2, 4, 2)
    with pytest.raises(UserError) as error:
        opened(
            tmp_path,
            alone_blocks=blocks,
            lost_scales=scales,
            wrong_blocks=blocks,
            wrong_scales=scales[:1],
            short_blocks=blocks[..., :15].copy(),
            short_scales=scales,
            flat_blocks=blocks[0],
            flat_scales=scales[0],
            half_blocks=blocks.astype(np.float16),
            half_scales=scales,
            twice=scales,
            twice_blocks=blocks,
            twice_scales=scales,
        )
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "alone has only one of",
        "lost has only one of",
        "wrong_blocks has shape [2, 4, 2, 16] and wrong_scales [1, 4, 2]",
        "short_blocks has shape [2, 4, 2, 15]",
        "flat_blocks has shape [4, 2, 16]",
        "half_blocks has dtype float16, not uint8",
        "twice and twice_blocks are both",
    ):
        assert part in message


@pytest.mark.parametrize("config", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "fp8", ["mxfp4"]])
def test_other_methods_are_refused_by_name(config):
    with pytest.raises(UserError, match="quantization_config has quant_method=.*only 'mxfp4' can be read") as error:
        mxfp4.unpack({"quantization_config": config}, {}, "here")
    if isinstance(config, dict):
        assert repr(config.get("quant_method")) in str(error.value)
    assert mxfp4.unpack({"quantization_config": None}, {}, "here") == {}


def test_a_published_directory_is_the_dequantised_model(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=67, max_position_embeddings=64, num_hidden_layers=1, hidden_size=64, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=32, num_local_experts=4,
        num_experts_per_tok=2)  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
    packed, experts = dict(tensors), "model.layers.0.mlp.experts."
    for seed, (name, rows, groups) in enumerate([("gate_up_proj", 64, 2), ("down_proj", 64, 1)]):
        blocks, scales = map(torch.tensor, random_parts(4, rows, groups, 118, 124, seed))
        tensors[experts + name] = convert_moe_packed_tensors(blocks, scales)
        del packed[experts + name]
        packed |= {f"{experts}{name}_blocks": blocks, f"{experts}{name}_scales": scales}
    model.load_state_dict(tensors)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    safetensors.torch.save_file(packed, tmp_path / "packed/model.safetensors")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    described = json.loads((tmp_path / "plain/config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "packed/config.json").write_text(json.dumps(described))

    plain_config, plain = hf.load(tmp_path / "plain")
    packed_config, found = hf.load(tmp_path / "packed")
    assert packed_config == plain_config
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    # Saved as plain tensors, without quantization_config.
    hf.save(tmp_path / "ours", packed_config, found)
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], x) for name, x in tensors.items())
