"""Latent attention against Transformers' layer, and the absorbed form against the plain one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import nn, parallel, peft
from nanoflax.config import LatentConfig, LoRA, ModelConfig, PrefixTuning, RopeConfig, validate
from nanoflax.errors import UserError
from nanoflax.nn.attention import AttentionInputs
from nanoflax.nn.latent import LatentAttention, empty_latent_cache
from nanoflax.nn.positions import angles_of

LATENT = LatentConfig(rank=8, query_rank=10, rope_dim=4, value_dim=6)
CONFIG = ModelConfig(
    vocab_size=23, context=32, layers=2, dim=16, heads=4, head_dim=10, mlp_dim=24, norm="rmsnorm", gated=True,
    positions="rotary", bias=False, latent=LATENT, rope=RopeConfig(theta=100.0, interleaved=True))  # fmt: skip
CONFIGS = {
    "query_rank": CONFIG,
    "direct": dataclasses.replace(
        CONFIG, latent=dataclasses.replace(LATENT, query_rank=0, value_dim=12), qkv_bias=True, out_bias=True,
        rope=RopeConfig(theta=100.0), attention_scale=0.5),
    "no_rope_in_layer_1": dataclasses.replace(CONFIG, nope_layers=(1,), attention_softcap=2.0),
}  # fmt: skip


def weights(module, *args, seed=0):
    """Random parameters of any module, all far from their first values."""
    shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), *args)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    draw = lambda key, x: 0.3 * jax.random.normal(key, x.shape) + (x.ndim == 1)
    return jax.tree.unflatten(tree, map(draw, keys, leaves))


@pytest.mark.parametrize("case", ["query_rank", "direct"])
def test_equals_the_layer_of_transformers(case):
    torch = pytest.importorskip("torch")
    lib = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    c, a = CONFIGS[case], CONFIGS[case].latent
    c = dataclasses.replace(c, attention_scale=None)
    theirs = lib.DeepseekV3Attention(
        lib.DeepseekV3Config(
            hidden_size=c.dim, num_attention_heads=c.heads, num_key_value_heads=c.heads, kv_lora_rank=a.rank,
            q_lora_rank=a.query_rank or None, qk_rope_head_dim=a.rope_dim, v_head_dim=a.value_dim,
            qk_nope_head_dim=c.K - a.rope_dim, attention_bias=c.has_bias("out"), rope_interleave=c.rope.interleaved,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0}, attn_implementation="eager"), 0)  # fmt: skip
    ours = LatentAttention(c, 0.02)
    x = np.random.default_rng(0).normal(size=(2, 7, c.dim)).astype(np.float32)
    inputs = AttentionInputs(angles=angles_of(c, jnp.arange(7)[None]))
    params = weights(ours, jnp.asarray(x), inputs)
    names = {
        "query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj", "query": "q_proj",
        "out": "o_proj", "latent_down": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm",
        "latent_up": "kv_b_proj"}  # fmt: skip
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    state = {
        f"{names[module]}.{leaves[leaf]}": torch.tensor(np.asarray(value).T.copy())
        for module, own in params.items()
        for leaf, value in own.items()
    }
    theirs.load_state_dict(state)
    rotary = lib.DeepseekV3RotaryEmbedding(theirs.config)(torch.zeros(1), torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(x), rotary, mask)[0].numpy()
    found, _ = jax.jit(ours.apply)({"params": params}, x, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CONFIGS)
def test_a_cache_of_latent_vectors_gives_the_whole_text(case):
    """Prompts padded on the left, read plain in one part and absorbed in the others."""
    model = nn.build(CONFIGS[case])
    tokens = jax.random.randint(jax.random.PRNGKey(0), (2, 16), 0, 23)
    params = weights(model, tokens)
    segments = jnp.array([[1] * 16, [0] * 3 + [1] * 13])
    apply, decode = jax.jit(model.apply), jax.jit(model.decode)
    expected = apply({"params": params}, tokens, segments)[0]
    cache, found = model.empty_cache(2, 16, jnp.array([0, 3])), []
    assert {name: x.shape for name, x in cache["layers"][0].items()} == {"key": (2, 1, 16, 12)}
    for part in jnp.split(tokens, [12, 15], axis=1):
        logits, cache = decode(params, part, cache)
        found.append(logits)
    difference = np.abs(np.concatenate(found, 1) - expected)[np.asarray(segments, bool)].max()
    assert difference < 1e-5 * np.abs(expected).max()
    # Packed documents: the second is the text alone.
    packed = apply({"params": params}, tokens, jnp.array([[1] * 5 + [2] * 11] * 2))[0]
    alone = apply({"params": params}, tokens[:, 5:])[0]
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5 * np.abs(alone).max())


def test_absorbed_equals_plain_with_its_gradients_and_adapters():
    model = LatentAttention(CONFIG, 0.02)
    keys = jax.random.split(jax.random.PRNGKey(0), 5)
    x = jax.random.normal(keys[0], (2, 5, 16))
    params = weights(model, x, AttentionInputs())
    q, latent = jax.random.normal(keys[1], (2, 4, 5, 10)), jax.random.normal(keys[2], (2, 1, 9, 12))
    mask = jax.random.bernoulli(keys[3], 0.7, (2, 1, 5, 9)).at[..., 0].set(True)
    weight = jax.random.normal(keys[4], (2, 4, 5, 6))
    lora = dict(lora_a=jnp.ones((8, 2)) * 0.1, lora_b=jnp.ones((2, 48)) * 0.2, lora_scale=jnp.float32(0.5))
    for adapters in ({}, lora, lora | {"lora_magnitude": jnp.linspace(1, 2, 48)}):
        own = params | {"latent_up": params["latent_up"] | adapters}

        def outputs(method, own=own):
            def loss(own, q, latent):
                y = model.apply({"params": own}, q, latent, AttentionInputs(mask), False, method=method)
                return (y * weight).sum(), y

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(own, q, latent)

        plain, absorbed = outputs("plain"), outputs("absorbed")
        scale = max(jax.tree.leaves(jax.tree.map(lambda x: np.abs(x).max(), plain)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, absorbed)


def test_stacked_layers_remat_and_adapters_of_a_model():
    model = nn.build(CONFIG, remat="blocks")
    tokens = jax.random.randint(jax.random.PRNGKey(0), (2, 8), 0, 23)
    params = weights(nn.build(CONFIG), tokens)
    expected = jax.jit(nn.build(CONFIG).apply)({"params": params}, tokens)[0]
    stacked = jax.jit(model.apply)({"params": parallel.stack(params)}, tokens)[0]
    np.testing.assert_allclose(stacked, expected, atol=1e-5 * np.abs(expected).max())
    lora = LoRA(rank=2, targets="attention/(query_up|latent_up|latent_down)")
    added = peft.add(params, lora, jax.random.PRNGKey(1))
    assert added["decoder"]["block_0"]["attention"]["latent_up"]["lora_b"].shape == (2, 4 * (6 + 6))
    with pytest.raises(UserError, match="prefix"):
        peft.add(params, PrefixTuning(), jax.random.PRNGKey(1))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"kv_heads": 2}, "kv_heads"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"attention_backend": "splash"}, "attention_backend"),
        ({"latent": dataclasses.replace(LATENT, rope_dim=12)}, "rope_dim"),
        ({"latent": dataclasses.replace(LATENT, rope_dim=3)}, "rope_dim"),
    ],
)
def test_what_is_not_computed_is_refused(changes, named):
    validate(CONFIG)
    with pytest.raises(UserError, match=named) as error:
        validate(dataclasses.replace(CONFIG, **changes))
    assert "\n" not in str(error.value)


def test_the_cache_is_smaller_than_keys_and_values():
    cache = jax.eval_shape(lambda: empty_latent_cache(CONFIG, 1, 100, jnp.float32))
    assert sum(x.size for x in cache.values()) == 100 * 12
