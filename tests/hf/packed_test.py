"""Quantised matrices of GGUF files kept packed: the numbers that the gguf package reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

import nanoflax
from nanoflax import hf, peft
from nanoflax.errors import UserError
from nanoflax.kernels import Quantized
from tests.hf.gguf_models_test import MODELS, saved


def kinds_of(params):
    """Path -> "int8", "int4", "int4+offset", or "plain"."""
    flat = flatten_dict(params, sep="/")
    name = lambda x: {"int8": "int8", "uint8": "int4"}[str(x.values.dtype)] + ("" if x.offsets is None else "+offset")
    return {path: name(x) if isinstance(x, Quantized) else "plain" for path, x in flat.items()}


@pytest.mark.parametrize("name, kind", [("llama", "Q4_1"), ("qwen2", "Q4_0"), ("qwen3moe", "Q8_0")])
def test_packed_files_have_the_numbers_of_their_dequantised_form(name, kind, tmp_path):
    case, changes = MODELS[name]
    changes = changes | dict(hidden_size=64, intermediate_size=96)
    _, config, params = saved(tmp_path, case, changes)
    hf.save_gguf(file := tmp_path / "model.gguf", config, params, kind=kind)
    plain, packed = hf.load(file)[1], hf.load(file, quantize="file")[1]
    kinds = kinds_of(packed)
    assert kinds["embed/embedding"] == "int8"
    mlp = "decoder/block_0/mlp/" + ("experts/" if "moe" in name else "")
    expected = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4+offset"}[kind]
    assert kinds["decoder/block_0/attention/query/kernel"] == kinds[f"{mlp}up/kernel"] == expected
    assert kinds["decoder/norm/scale"] == "plain"
    for ours, theirs in zip(jax.tree.leaves(peft.dequantize_params(packed)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))
    if name == "llama":
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 12))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        ours = jax.jit(nanoflax.build(hf.load_config(file)).apply)({"params": packed}, ids)[0]
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_int8_of_a_file_of_8_bits_changes_no_number(tmp_path):
    _, config, params = saved(tmp_path, "llama", dict(hidden_size=64, intermediate_size=96))
    hf.save_gguf(file := tmp_path / "model.gguf", config, params, kind="Q8_0")
    packed, again = (hf.load(file, quantize=kind)[1] for kind in ("file", "int8"))
    jax.tree.map(np.testing.assert_array_equal, packed, again)
    hf.save(tmp_path / "back", config, packed)  # exports are of the dequantised numbers
    back = hf.load(tmp_path / "back")[1]
    jax.tree.map(np.testing.assert_array_equal, peft.dequantize_params(packed), back)
    other, plain = hf.load(file, quantize="int4")[1], hf.load(file)[1]
    assert set(kinds_of(other).values()) == {"int8", "int4", "plain"}
    leaves = zip(*map(jax.tree.leaves, (peft.dequantize_params(other), plain)), strict=True)
    error = sum(float(jnp.square(a - b).sum()) for a, b in leaves)
    total = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(plain))
    assert 0 < error < 0.01 * total


def test_refusals(tmp_path):
    saved(tmp_path, "llama", {})
    with pytest.raises(UserError, match="keeps the types of a .gguf file"):
        hf.load(tmp_path / "model", quantize="file")
    with pytest.raises(UserError, match="quantize='int3' is not one of int8, int4"):
        hf.load(tmp_path / "model", quantize="int3")
    with pytest.raises(UserError, match="must be int8, int4, file, or empty"):
        nanoflax.open(tmp_path / "model", quantize="int3")
