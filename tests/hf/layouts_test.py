"""Layouts that no published row uses in full, and the messages for someone who writes a row."""

import dataclasses

import numpy as np
import pytest

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf import families, safetensors_io
from nanoflax.hf.layouts import TensorMapping, tensor_mapping


@pytest.mark.parametrize("layout", ["fused", "fused_columns"])
def test_parts_of_other_sizes_in_one_tensor(tmp_path, layout):
    rng = np.random.default_rng(0)
    sizes = {"query": 6, "key": 4, "value": 2}
    ours = {name: rng.normal(size=(3, n)).astype(np.float32) for name, n in sizes.items()}
    mapping = TensorMapping("qkv", layout, {i: (name, ours[name].shape) for i, name in enumerate(ours)})
    joined = np.concatenate(list(ours.values()), 1)
    joined = joined.T if layout == "fused" else joined
    np.testing.assert_array_equal(mapping.join(ours, K=2), joined)
    assert mapping.shape == joined.shape and mapping.paths == list(sizes)
    safetensors_io.save_safetensors(tmp_path, [("qkv", joined.shape, joined.dtype, joined)])
    tensor = safetensors_io.open_safetensors(tmp_path)["qkv"]
    for i, x in enumerate(ours.values()):
        for index in ((slice(None),) * 2, (slice(1, 3), slice(0, 1)), (slice(0, 2), slice(1, 2))):
            np.testing.assert_array_equal(mapping.read(tensor, i, index, 2), x[index])


def test_a_row_with_a_field_that_does_not_exist():
    with pytest.raises(ValueError, match="family llama: ModelConfig has no norm_epsilon"):
        dataclasses.replace(families.family_of_type("llama"), preset={"norm_epsilon": 1e-6})


def test_a_row_without_a_key_says_which():
    family = families.family_of_type("llama")
    keys = {ours: theirs for ours, theirs in family.keys.items() if not ours.endswith("attention/key")}
    config = ModelConfig(vocab_size=9, layers=1, dim=8, heads=2, norm="rmsnorm", gated=True, positions="rotary")
    with pytest.raises(UserError, match="keys of family llama have neither decoder/block_{i}/attention/key"):
        tensor_mapping(dataclasses.replace(family, keys=keys), dataclasses.replace(config, bias=False))
