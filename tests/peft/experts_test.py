"""LoRA on experts: each expert's own adapter, merged or not; the peft library reads and writes the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as their_peft
import pytest
import torch
import transformers

from nanoflax import hf, parallel, peft
from nanoflax.config import AdaLoRA, DoRA, Houlsby, LoRA, ModelConfig, MoEConfig
from nanoflax.errors import UserError
from nanoflax.nn import build
from tests.compiled import apply

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
MODELS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[0]
    ),
    "granitemoe": transformers.GraniteMoeConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
}
OTHERS = {  # whose experts Transformers stacks otherwise
    "gpt_oss": transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2),
    "llama4_text": transformers.Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=3, intermediate_size_mlp=24),
}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 7))


def theirs(name, directory):
    """A random model of Transformers, saved in a directory."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config((MODELS | OTHERS)[name])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def logits_of(directory):
    config, params = hf.load(directory)
    return config, params, lambda params: apply(build(config), params, TOKENS)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"], ["experts.gate_up_proj"]])
def test_adapters_of_peft_are_read(tmp_path, name, targets):
    model = theirs(name, tmp_path / "base")
    config = their_peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=[x if "." in x else f"experts.{x}" for x in targets],
        init_lora_weights=False,
    )
    adapted = their_peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for path, p in adapted.named_parameters():
            p.normal_(std=0.5) if "lora" in path else None
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.tensor(TOKENS)).logits.numpy()
    ours, params, logits = logits_of(tmp_path / "base")
    plain = logits(params)
    params, kind = hf.load_adapter(tmp_path / "adapter", ours, params)
    assert kind.alpha == 3 and np.abs(plain - expected).max() > 2e-3
    np.testing.assert_allclose(logits(params), expected, atol=1e-4)
    np.testing.assert_allclose(logits(peft.merge(params)), expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["experts/(up|gate|down)|attention/query", "experts/up", "experts/down"])
def test_peft_opens_our_adapters(tmp_path, name, targets):
    theirs(name, tmp_path / "base")
    ours, params, logits = logits_of(tmp_path / "base")
    c = LoRA(rank=2, alpha=6, targets=targets)
    params = peft.add(params, c, jax.random.PRNGKey(0))
    rng = np.random.default_rng(1)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(3 * rng.normal(size=x.shape), jnp.float32) if path[-1].key == "lora_b" else x,
        params,
    )
    hf.save_adapter(tmp_path / "adapter", ours, params, c, base=tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = their_peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = opened(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits(params) - logits(peft.without_adapters(params))).max() > 2e-3
    np.testing.assert_allclose(found, logits(params), atol=1e-4)
    again, _ = hf.load_adapter(tmp_path / "adapter", ours, hf.load(tmp_path / "base")[1])
    np.testing.assert_allclose(logits(again), logits(params), atol=1e-5)


def test_what_is_not_computed_is_refused(tmp_path):
    theirs("mixtral", tmp_path / "base")
    ours, params, _ = logits_of(tmp_path / "base")
    c = LoRA(rank=2, targets="experts/down")
    hf.save_adapter(tmp_path / "adapter", ours, peft.add(params, c, jax.random.PRNGKey(0)), c)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_parameters": ["mlp.gate.weight"]}))
    with pytest.raises(UserError, match="target_parameters has 'mlp.gate.weight'"):
        hf.load_adapter(tmp_path / "adapter", ours, params)
    for kind in (AdaLoRA, DoRA):
        with pytest.raises(UserError, match=f"peft.kind='{kind.kind}' adapts no experts"):
            peft.add(params, kind(targets="experts/down"), jax.random.PRNGKey(0))


def test_dora_on_experts_is_refused_as_peft_refuses_it(tmp_path):
    model = theirs("mixtral", tmp_path / "base")
    target = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    with pytest.raises(ValueError, match="does not work with use_dora=True"):
        their_peft.get_peft_model(model, their_peft.LoraConfig(use_dora=True, **target))
    ours, params, _ = logits_of(tmp_path / "base")
    c = LoRA(rank=2, targets="experts/down")
    hf.save_adapter(tmp_path / "adapter", ours, peft.add(params, c, jax.random.PRNGKey(0)), c)
    settings = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(settings.read_text())
    for changes, kind in [({"use_dora": True}, "dora"), ({"peft_type": "ADALORA", "init_r": 8}, "adalora")]:
        settings.write_text(json.dumps(written | changes))
        with pytest.raises(UserError, match=f"target_parameters works only with LoRA, in peft too, not with {kind}"):
            hf.load_adapter(tmp_path / "adapter", ours, params)


@pytest.mark.parametrize("name", OTHERS)
def test_other_orders_of_experts_are_refused(tmp_path, name):
    theirs(name, tmp_path / "base")
    ours, params, _ = logits_of(tmp_path / "base")
    c = LoRA(rank=2, targets="experts/down|attention/query")
    params = peft.add(params, c, jax.random.PRNGKey(0))
    with pytest.raises(UserError, match=f"experts of {name} cannot be written for the peft library"):
        hf.save_adapter(tmp_path / "adapter", ours, params, c)
    c = LoRA(rank=2, targets="attention/query")
    params = peft.add(peft.without_adapters(params), c, jax.random.PRNGKey(0))
    hf.save_adapter(tmp_path / "adapter", ours, params, c)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(UserError, match="experts of gpt-oss and Llama 4 have another order of their rows"):
        hf.load_adapter(tmp_path / "adapter", ours, peft.without_adapters(params))


def test_bottlenecks_follow_layers_with_experts():
    config = ModelConfig(
        vocab_size=40, layers=2, dim=16, heads=2, context=32, moe=MoEConfig(experts=3, dense_layers=(0,))
    )
    params = parallel.init(build(config), jax.random.PRNGKey(0))
    found = peft.add(params, Houlsby(bottleneck=4), jax.random.PRNGKey(1))["decoder"]
    for i in (0, 1):
        assert {name for name in found[f"block_{i}"] if name.startswith("adapter")} == {
            "adapter_mlp",
            "adapter_attention",
        }
        assert found[f"block_{i}"]["adapter_mlp"]["down"]["kernel"].shape == (16, 4)
