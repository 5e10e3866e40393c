"""Adapters: they change nothing at first, are all that is trained, fold into plain weights, and
mean to the `peft` library what they mean here."""

import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax import hf, parallel, peft, runs, tokenizers, train
from nanoflax.config import (
    OPTIMIZERS,
    PEFT_KINDS,
    AdaLoRA,
    AnyPeft,
    Config,
    FullFineTuning,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    as_kind,
    from_dict,
    validate,
)
from nanoflax.errors import UserError
from nanoflax.hf import adapters
from nanoflax.kernels import matmul
from nanoflax.nn import build
from nanoflax.nn.layers import Linear, bottleneck
from nanoflax.peft import adalora
from nanoflax.train import make_optimizer
from tests.closeness import assert_trees_close
from tests.compiled import apply, prefill

V, T = 67, 10
LLAMA = ModelConfig(
    vocab_size=V,
    context=32,
    layers=2,
    dim=32,
    heads=4,
    kv_heads=2,
    mlp_dim=48,
    norm="rmsnorm",
    activation="silu",
    gated=True,
    positions="rotary",
    bias=False,
    tied=False,
)
BERT = ModelConfig(
    architecture="encoder",
    head="classify",
    labels=3,
    vocab_size=V,
    context=32,
    layers=2,
    dim=32,
    heads=4,
    norm_place="post",
    embed_norm=True,
    token_types=2,
)
GPT2 = ModelConfig(vocab_size=V, context=32, layers=2, dim=32, heads=4)
BART = ModelConfig(architecture="encoder_decoder", vocab_size=V, context=32, layers=1, dim=32, heads=4)
SMALL = dict(rank=4, target_rank=2, bottleneck=8, virtual_tokens=3)
TOKENS = np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)
ADAPTERS = [kind for kind in PEFT_KINDS if kind != "none"]


def config_of(kind, **fields):
    return as_kind(PEFT_KINDS[kind], SimpleNamespace(**SMALL | fields))


@pytest.fixture(scope="module")
def llama():
    return build(LLAMA), randomized(parallel.init(build(LLAMA), jax.random.PRNGKey(0)), r".*")


def randomized(params, pattern=r".*(lora_[abe]|lora_magnitude|adapter_.*|prefix_.*|prompt)"):
    """Leaves whose path matches, moved away from their first values."""
    rng = np.random.default_rng(1)
    return unflatten_dict(
        {
            path: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if re.fullmatch(pattern, path) else x
            for path, x in flatten_dict(params, sep="/").items()
        },
        sep="/",
    )


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens=TOKENS):
    source = {"source": tokens} if model.config.architecture == "encoder_decoder" else {}
    y = model.apply({"params": params}, tokens, **source)
    return y[0] if isinstance(y, tuple) else y


def loss_of(model, params, tokens=TOKENS):
    return (forward(model, params, tokens) ** 2).mean()


def add(params, kind, **fields):
    return peft.add(params, config_of(kind, **fields), jax.random.PRNGKey(3))


def test_a_linear_without_adapters_is_the_program_it_was():
    def layer(p, x):
        return Linear(8).apply({"params": p}, x)

    def plain(p, x):
        return matmul(x, p["kernel"]) + p["bias"]

    plain.__name__ = "layer"
    p, x = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, jnp.ones((2, 4))
    texts = {f: jax.jit(f).lower(p, x).as_text() for f in (layer, plain)}
    assert texts[layer] == texts[plain]


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "houlsby", "pfeiffer"])
def test_adapters_change_nothing_at_first_and_all_of_them_count(llama, kind):
    model, params = llama
    added = add(params, kind)
    before, after = forward(model, params), forward(model, added)
    if kind == "dora":
        np.testing.assert_allclose(after, before, atol=2e-5)
    else:
        np.testing.assert_array_equal(after, before)
    assert np.abs(forward(model, randomized(added)) - before).max() > 1e-2


@pytest.mark.parametrize("kind", ADAPTERS)
def test_without_adapters_is_the_same_model_and_the_same_arrays(llama, kind):
    params = llama[1]
    bare = flatten_dict(peft.without_adapters(randomized(add(params, kind))), sep="/")
    assert bare.keys() == flatten_dict(params, sep="/").keys()
    assert all(x is bare[path] for path, x in flatten_dict(params, sep="/").items())


@pytest.mark.parametrize(
    "config, kind",
    [(BERT, kind) for kind in ADAPTERS] + [(BART, kind) for kind in ("lora", "houlsby", "prompt", "prefix")],
    ids=lambda x: getattr(x, "architecture", x),
)
def test_every_kind_finds_its_place_in_every_architecture(config, kind):
    params = parallel.init(build(config), jax.random.PRNGKey(0))
    added = randomized(add(params, kind))
    trained, frozen = peft.split(added, peft.trainable(added, config_of(kind)))
    assert jax.tree.structure(frozen) == jax.tree.structure(params)
    grads = jax.jit(jax.grad(lambda t: loss_of(build(config), peft.join(t, frozen))))(trained)
    for path, g in flatten_dict(grads, sep="/").items():
        assert np.any(g) != path.endswith(("lora_scale", "lora_mask")), path


def test_gradients_flow_into_adapters_alone(llama):
    model, params = llama
    for kind in ("lora", "dora", "adalora"):
        added = randomized(add(params, kind, targets="attention/(query|value)"))
        grads = flatten_dict(jax.jit(jax.grad(partial(loss_of, model)))(added), sep="/")
        places = {path.rpartition("/")[0] for path in grads if "lora" in path}
        assert places == {f"decoder/block_{i}/attention/{x}" for i in (0, 1) for x in ("query", "value")}
        mask = flatten_dict(peft.trainable(added, config_of(kind)), sep="/")
        assert {path for path in mask if mask[path]} == {path for path in grads if "lora" in path}
        for path in mask:
            if mask[path]:
                assert np.any(grads[path]) != path.endswith(("scale", "mask")), path


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_merged_is_plain_and_computes_the_same(llama, kind):
    model, params = llama
    added = randomized(add(params, kind, rank_stabilized=kind == "lora"))
    if kind == "adalora":
        up = added["decoder"]["block_1"]["mlp"]["up"]
        up["lora_mask"] = jnp.array([1.0, 0, 0, 1])
    merged = peft.merge(added)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    if kind == "adalora":
        delta = merged["decoder"]["block_1"]["mlp"]["up"]["kernel"] - up["kernel"]
        assert np.linalg.matrix_rank(delta, 1e-4) == 2
    before = forward(model, added)
    np.testing.assert_allclose(forward(model, merged), before, atol=1e-5 * np.abs(before).max())
    assert np.abs(forward(model, params) - before).max() > 1e-2


def test_a_bottleneck_is_its_formula():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 3, 8)).astype(np.float32)
    p = {
        "down": {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)},
        "up": {"kernel": rng.normal(size=(4, 8)), "bias": rng.normal(size=8)},
    }
    inner = np.maximum(h @ p["down"]["kernel"] + p["down"]["bias"], 0)
    expected = h + inner @ p["up"]["kernel"] + p["up"]["bias"]
    np.testing.assert_allclose(bottleneck(h, p, "relu"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, names", [("houlsby", {"adapter_attention", "adapter_mlp"}), ("pfeiffer", {"adapter_mlp"})]
)
def test_bottlenecks_stand_where_their_papers_put_them(llama, kind, names):
    added = add(llama[1], kind)
    for block in ("block_0", "block_1"):
        assert {n for n in added["decoder"][block] if n.startswith("adapter")} == names


@pytest.mark.parametrize(
    "fields",
    [{"positions": "rotary"}, {"positions": "learned"}, {"positions": "sinusoidal"}, {"window": 3}],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_cached_decoding_of_ragged_prompts_equals_the_full_pass(kind, fields):
    model = build(ModelConfig(**vars(LLAMA) | fields))
    params = parallel.init(model, jax.random.PRNGKey(0))
    params = randomized(add(randomized(params), kind))
    lengths, new = np.array([5, 1]), 4
    padded = np.zeros((2, 5), np.int32)
    padded[0], padded[1, -1:] = TOKENS[0, :5], TOKENS[1, :1]
    last, cache = prefill(model, params, padded, lengths, new)
    decode = jax.jit(model.decode)
    for step in range(new):
        token = TOKENS[[0, 1], lengths + step - 1]
        assert step or np.array_equal(last, token)
        logits, cache = decode(params, token[:, None], cache)
        for i, n in enumerate(lengths):
            whole = forward(model, params, TOKENS[i : i + 1])
            np.testing.assert_allclose(logits[i, 0], whole[0, n + step - 1], atol=2e-5)


def test_a_prompt_of_a_words_embeddings_is_that_word(llama):
    model, params = llama
    added = add(params, "prompt")
    added["decoder"]["prompt"] = params["embed"]["embedding"][TOKENS[0, :3]]
    np.testing.assert_allclose(
        forward(model, added, TOKENS[:1, 3:]), forward(model, params, TOKENS[:1])[:, 3:], atol=2e-5
    )


def test_a_prefix_of_a_words_keys_and_values_is_that_word():
    model = build(ModelConfig(**vars(LLAMA) | {"positions": "none"}))
    params = randomized(parallel.init(model, jax.random.PRNGKey(0)), r".*")
    _, cache = jax.jit(model.decode)(params, TOKENS[:1, :3], model.empty_cache(1, 3))
    added = add(params, "prefix")
    for i, layer in enumerate(cache["layers"]):
        for name in ("key", "value"):
            added["decoder"][f"block_{i}"]["attention"][f"prefix_{name}"] = layer[name][0].swapaxes(0, 1).reshape(3, -1)
    np.testing.assert_allclose(
        forward(model, added, TOKENS[:1, 3:]), forward(model, params, TOKENS[:1])[:, 3:], atol=2e-5
    )


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_packed_documents_see_the_virtual_tokens_and_not_each_other(kind):
    model = build(GPT2)
    params = randomized(add(parallel.init(model, jax.random.PRNGKey(0)), kind))
    segments = np.array([[1] * 4 + [2] * 6], np.int32)
    packed = apply(model, params, TOKENS[:1], segments)[0]
    for part in (slice(0, 4), slice(4, 10)):
        np.testing.assert_allclose(packed[:, part], forward(model, params, TOKENS[:1, part]), atol=2e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_an_encoder_with_virtual_tokens_does_not_see_padding(kind):
    model = build(ModelConfig(**vars(BERT) | {"head": "tag"}))
    params = randomized(add(parallel.init(model, jax.random.PRNGKey(0)), kind))
    alone = forward(model, params, TOKENS[:1, :6])
    for side in (slice(0, 6), slice(4, 10)):
        tokens, mask = np.zeros((1, T), np.int32), np.zeros((1, T), bool)
        tokens[:, side], mask[:, side] = TOKENS[:1, :6], True
        np.testing.assert_allclose(apply(model, params, tokens, mask)[:, side], alone, atol=2e-5)


def test_what_is_frozen_stays_to_the_bit_and_takes_no_memory(llama, compilations):
    model, params = llama
    c = config_of("lora", trained="adapters,head")
    added = jax.tree.map(jnp.copy, peft.add(params, c, jax.random.PRNGKey(3)))  # donated below
    trained, frozen = peft.split(added, peft.trainable(added, c))
    optimizer, _ = make_optimizer(OptimConfig(weight_decay=0.5, warmup_steps=0), 3)
    state = optimizer.init(trained)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(state) < 2 * count(trained) + 10 < count(added)

    def adapt_step(trained, state, frozen):
        grads = jax.grad(lambda t: loss_of(model, peft.join(t, frozen)))(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    step, first = jax.jit(adapt_step, donate_argnums=(0, 1)), jax.tree.map(np.array, added)
    with compilations() as names:
        for _ in range(3):
            trained, state = step(trained, state, frozen)
    assert names.count("jit(adapt_step)") == 1
    after, mask = peft.join(trained, frozen), flatten_dict(peft.trainable(added, c), sep="/")
    for path, x in flatten_dict(first, sep="/").items():
        y = flatten_dict(after, sep="/")[path]
        changes = mask[path] and not path.endswith("lora_scale")
        assert np.array_equal(x, y) != changes, path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_a_scale_or_a_mask(name):
    p = {"x": {"kernel": jnp.ones((4, 4)), **add({"x": {"kernel": jnp.ones((4, 4))}}, "adalora", targets="x")["x"]}}
    grads = jax.tree.map(jnp.ones_like, p)
    grads["x"] |= {"lora_scale": jnp.zeros(()), "lora_mask": jnp.zeros(4)}
    optimizer, _ = make_optimizer(OptimConfig(name=name, warmup_steps=0), 10)
    updates, _ = optimizer.update(grads, optimizer.init(p), p)
    assert not np.any(updates["x"]["lora_scale"]) and not np.any(updates["x"]["lora_mask"])
    assert np.any(updates["x"]["lora_e"])


def test_adapters_go_through_recomputed_blocks(llama):
    model, params = llama
    added = randomized(add(params, "houlsby"))
    gradient = lambda m: jax.jit(jax.grad(partial(loss_of, m)))(added)
    assert_trees_close(gradient(build(LLAMA, "blocks")), gradient(model), 5e-6)


@pytest.mark.parametrize(
    "config, trained, expected",
    [
        (LLAMA, "head", {"unembed/kernel"}),
        (
            LLAMA,
            "last:1,embed",
            {"embed/embedding", "decoder/norm/scale", "unembed/kernel"}
            | {
                f"decoder/block_1/{x}"
                for x in (
                    "attention/query/kernel",
                    "attention/key/kernel",
                    "attention/value/kernel",
                    "attention/out/kernel",
                    "mlp/up/kernel",
                    "mlp/gate/kernel",
                    "mlp/down/kernel",
                    "norm_attention/scale",
                    "norm_mlp/scale",
                )
            },
        ),
        (LLAMA, r"block_0/norm_\w+", {"decoder/block_0/norm_attention/scale", "decoder/block_0/norm_mlp/scale"}),
        (BERT, "head", {f"{x}/{y}" for x in ("labels", "pooler") for y in ("kernel", "bias")}),
    ],
)
def test_what_is_trained_is_chosen_by_name(config, trained, expected):
    params = parallel.param_shapes(build(config))
    mask = peft.trainable(params, FullFineTuning(trained=trained))
    assert {path for path, chosen in flatten_dict(mask, sep="/").items() if chosen} == expected


def test_biases_are_chosen_everywhere_and_only_they():
    params = parallel.param_shapes(build(GPT2))
    mask = flatten_dict(peft.trainable(params, FullFineTuning(trained="biases")), sep="/")
    assert all(mask[path] == path.endswith("/bias") for path in mask) and any(mask.values())
    mask = peft.trainable(params, FullFineTuning())
    assert all(jax.tree.leaves(mask))
    with pytest.raises(UserError, match="peft.trained='adapters' matches no parameter"):
        peft.trainable(params, FullFineTuning(trained="adapters"))
    with pytest.raises(UserError, match="peft.trained='head'"):
        peft.trainable(params, FullFineTuning(trained="head"))  # tied


def test_adalora_ends_with_exactly_its_budget_in_one_program(llama, compilations):
    model, params = llama
    steps, c = 12, config_of("adalora", warmup_steps=2, final_steps=3, orthogonality=0.1)
    added = peft.add(params, c, jax.random.PRNGKey(3))
    trained, frozen = peft.split(added, peft.trainable(added, c))
    optimizer, _ = make_optimizer(OptimConfig(learning_rate=0.05, warmup_steps=0), steps)

    def adapt_step(trained, opt_state, state, frozen, step):
        def objective(t):
            return loss_of(model, peft.join(t, frozen)) + c.orthogonality * adalora.orthogonality(t)

        grads = jax.grad(objective)(trained)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        state, trained = adalora.adalora_update(state, trained, grads, step, steps, c)
        return trained, opt_state, state

    step = jax.jit(adapt_step)
    state, opt_state = adalora.adalora_init(trained), optimizer.init(trained)
    ranks, masks = [], []
    with compilations() as names:
        for i in range(1, steps + 1):
            trained, opt_state, state = step(trained, opt_state, state, frozen, np.int32(i))
            flat = flatten_dict(trained, sep="/")
            masks.append({p: np.array(x) for p, x in flat.items() if p.endswith("lora_mask")})
            ranks.append(int(sum(x.sum() for x in masks[-1].values())))
            for path, x in masks[-1].items():
                assert not np.any(flat[path.replace("mask", "e")] * (1 - x))
    assert names.count("jit(adapt_step)") == 1
    linears = 14
    # Zhang et al. 2023, equation 12, on whole numbers.
    left = [1 - (t - 2) / (steps - 3 - 2) for t in range(3, 9)]
    cubic = [int(linears * (2 + 2 * x**3) + 1e-6) for x in left]
    assert ranks == [linears * 4] * 2 + cubic + [linears * 2] * 4
    assert all(np.array_equal(masks[-1][p], masks[-4][p]) for p in masks[-1])
    assert len({x.sum() for x in masks[-1].values()}) > 1  # not the same for all


def test_adalora_weighs_ranks_as_the_peft_library():
    import torch
    from peft.tuners.adalora.layer import RankAllocator

    rng, steps, r = np.random.default_rng(0), 9, 4
    c = config_of("adalora", warmup_steps=1, final_steps=2, beta1=0.8, beta2=0.7)
    shapes = {"x": (6, 8), "y": (5, 7), "z": (9, 3)}
    params = {
        n: {
            "lora_a": rng.normal(size=(i, r)),
            "lora_b": rng.normal(size=(r, o)),
            "lora_e": rng.normal(size=r),
            "lora_mask": np.ones(r),
        }
        for n, (i, o) in shapes.items()
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    theirs = {
        f"{n}.lora_{leaf.upper()}.default": torch.nn.Parameter(
            torch.tensor(np.array(p[f"lora_{leaf}"].T if leaf != "e" else p["lora_e"][:, None]))
        )
        for n, p in params.items()
        for leaf in "abe"
    }
    module = SimpleNamespace(named_parameters=lambda: theirs.items())
    allocator = RankAllocator(
        module,
        SimpleNamespace(beta1=0.8, beta2=0.7, target_r=c.target_rank, tinit=1, tfinal=2, total_step=steps, deltaT=1),
        "default",
    )
    state = adalora.adalora_init(params)
    update = jax.jit(partial(adalora.adalora_update, steps=steps, peft_config=c))
    returned = 0
    for step in range(1, steps - 2):
        grads = {
            n: {leaf: rng.normal(size=x.shape).astype(np.float32) for leaf, x in p.items()} for n, p in params.items()
        }
        drift = rng.normal(size=(3, r)).astype(np.float32)  # stands for an optimizer
        old = {n: np.array(p["lora_mask"]) for n, p in params.items()}
        for move, (n, p) in zip(drift, params.items(), strict=True):
            p["lora_e"] += move
            with torch.no_grad():
                theirs[f"{n}.lora_E.default"] += torch.tensor(move)[:, None]
            for leaf in "abe":
                g = grads[n][f"lora_{leaf}"]
                theirs[f"{n}.lora_{leaf.upper()}.default"].grad = torch.tensor(g[:, None] if leaf == "e" else g.T)
        state, params = update(state, params, grads, np.int32(step))
        _, pattern = allocator.update_and_allocate(module, step)
        for n, p in params.items():
            np.testing.assert_allclose(p["lora_e"], theirs[f"{n}.lora_E.default"].detach()[:, 0], rtol=1e-6)
            if pattern:
                assert np.array(p["lora_mask"]).tolist() == pattern[f"{n}.lora_E.default"]
            returned += int((np.array(p["lora_mask"]) > old[n]).sum())
    assert returned  # some that had been masked came back


def test_the_penalty_is_the_peft_librarys():
    import torch

    rng = np.random.default_rng(0)
    params = {"x": {"lora_a": rng.normal(size=(6, 4)), "lora_b": rng.normal(size=(4, 8)), "lora_e": np.zeros(4)}}
    a, b = torch.tensor(params["x"]["lora_a"]), torch.tensor(params["x"]["lora_b"])
    expected = (torch.norm(a.T @ a - torch.eye(4)) + torch.norm(b @ b.T - torch.eye(4))) / 2
    np.testing.assert_allclose(adalora.orthogonality(params), float(expected), rtol=1e-5)


def theirs_of(directory, adapter, tokens=TOKENS, auto="AutoModelForCausalLM"):
    import torch
    import transformers
    from peft import PeftModel

    model = getattr(transformers, auto).from_pretrained(directory)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens).long())
        return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def masked_for(kind, params):
    """Some ranks of AdaLoRA gone, in one Linear all of them."""
    flat = flatten_dict(params, sep="/")
    for i, path in enumerate(sorted(p for p in flat if p.endswith("lora_mask"))):
        flat[path] = jnp.array([[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]][i % 3])
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_an_adapter_is_the_same_to_transformers_and_peft(llama, kind, tmp_path, monkeypatch):
    model, params = llama
    c = config_of(kind, rank_stabilized=kind == "dora", alpha=6.0, final_steps=7)
    added = masked_for(kind, randomized(peft.add(params, c, jax.random.PRNGKey(3))))
    hf.save(tmp_path / "model", LLAMA, params)
    hf.save_adapter(tmp_path / "adapter", LLAMA, added, c, base=tmp_path / "model")
    logits = theirs_of(tmp_path / "model", tmp_path / "adapter")
    np.testing.assert_allclose(forward(model, added), logits, atol=1e-4)
    assert np.abs(forward(model, params) - logits).max() > 1e-2
    back, c2 = hf.load_adapter(tmp_path / "adapter", LLAMA, params)
    np.testing.assert_allclose(forward(model, back), forward(model, added), atol=1e-6)
    same = ("kind", "rank", "alpha", "rank_stabilized") + (
        ("target_rank", "beta1", "final_steps") if kind == "adalora" else ()
    )
    assert [getattr(c2, n, False) for n in same] == [getattr(c, n, False) for n in same]
    assert jax.tree.structure(back) == jax.tree.structure(added)
    monkeypatch.setattr(tokenizers, "load", lambda _: SimpleNamespace(vocab_size=LLAMA.vocab_size))
    _, folded, _ = runs.open_model(str(tmp_path / "adapter"))  # with the model that it names
    np.testing.assert_allclose(forward(model, folded), logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_an_adapter_of_peft_is_the_same_here(llama, kind, tmp_path):
    import torch
    import transformers
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    model, params = llama
    hf.save(tmp_path / "model", LLAMA, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    targets = ["q_proj", "down_proj", "model.layers.1.mlp.up_proj"]
    common = dict(lora_alpha=5, target_modules=targets)
    config = (
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, **common)
        if kind == "adalora"
        else LoraConfig(r=4, use_dora=kind == "dora", use_rslora=True, rank_pattern={"down_proj": 3}, **common)
    )
    theirs = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    logits = theirs(input_ids=torch.tensor(TOKENS).long()).logits
    (logits**2).mean().backward()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = hf.load_adapter(tmp_path / "adapter", LLAMA, params)
    np.testing.assert_allclose(forward(model, ours), logits.detach(), atol=1e-4)
    assert np.abs(forward(model, params) - logits.detach().numpy()).max() > 1e-2
    grads = jax.jit(jax.grad(partial(loss_of, model)))(ours)["decoder"]["block_1"]["mlp"]["up"]
    up = theirs.base_model.model.model.layers[1].mlp.up_proj
    expected = {}
    for leaf in "abe" if kind == "adalora" else "ab":
        g = getattr(up, f"lora_{leaf.upper()}")["default"]
        g = (g if kind == "adalora" else g.weight).grad.numpy().T
        expected[f"lora_{leaf}"] = g[0] if leaf == "e" else g
    assert_trees_close({leaf: grads[leaf] for leaf in expected}, expected, 2e-5)


@pytest.mark.parametrize("config, kind", [(BERT, "lora"), (LLAMA, "adalora")])
def test_a_trained_head_goes_along(config, kind, tmp_path):
    config = ModelConfig(**vars(config) | {"head": "classify", "labels": 3, "activation": "gelu", "norm_eps": 1e-12})
    c, model = config_of(kind, trained="adapters,head"), build(config)
    params = parallel.init(model, jax.random.PRNGKey(0))
    added = randomized(peft.add(params, c, jax.random.PRNGKey(3)), r".*(lora_[abe]|labels/.*|pooler/.*)")
    hf.save(tmp_path / "model", config, params)
    hf.save_adapter(tmp_path / "adapter", config, added, c)
    found = [
        theirs_of(tmp_path / "model", tmp_path / "adapter", tokens=row[None], auto="AutoModelForSequenceClassification")
        for row in TOKENS
    ]
    np.testing.assert_allclose(forward(model, added), np.concatenate(found), atol=1e-4)
    head = flatten_dict(added)[("labels", "kernel")] - params["labels"]["kernel"]
    assert np.abs(head).max() > 0.1
    back, c2 = hf.load_adapter(tmp_path / "adapter", config, params)
    np.testing.assert_allclose(forward(model, back), forward(model, added), atol=1e-6)
    assert peft.trainable(back, c2) == peft.trainable(added, c)
    for trained, message in [
        ("adapters,biases", "peft saves complete modules, but peft.trained names only a part"),
        ("adapters,.*query/.*", "peft cannot both adapt"),
    ]:
        if config.bias or "query" in trained:
            with pytest.raises(UserError, match=message):
                hf.save_adapter(tmp_path / "x", config, added, config_of(kind, trained=trained))


@pytest.mark.parametrize(
    "config, auto, module, targets",
    [
        (BERT, "AutoModelForSequenceClassification", "classifier", ["query", "value"]),
        (LLAMA, "AutoModelForCausalLM", "lm_head", ["q_proj"]),
        (LLAMA, "AutoModelForCausalLM", "layers.1.mlp", ["q_proj"]),
    ],
)
def test_what_peft_trained_whole_is_the_same_here(config, auto, module, targets, tmp_path):
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    config = ModelConfig(
        **vars(config)
        | ({"head": "classify", "labels": 3, "activation": "gelu", "norm_eps": 1e-12} if config is BERT else {})
    )
    model, params = build(config), parallel.init(build(config), jax.random.PRNGKey(0))
    hf.save(tmp_path / "model", config, params)
    base = getattr(transformers, auto).from_pretrained(tmp_path / "model")
    theirs = get_peft_model(base, LoraConfig(r=4, target_modules=targets, modules_to_save=[module, "absent"])).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = [theirs(input_ids=torch.tensor(row[None]).long()).logits for row in TOKENS]
    ours, c = hf.load_adapter(tmp_path / "adapter", config, params)
    np.testing.assert_allclose(forward(model, ours), np.concatenate(logits), atol=1e-4)
    flat, moved = flatten_dict(params, sep="/"), flatten_dict(ours, sep="/")
    changed = {path for path in flat if not np.array_equal(flat[path], moved[path])}
    trained = {path for path, x in flatten_dict(peft.trainable(ours, c), sep="/").items() if x}
    assert changed and changed == {path for path in trained if "lora_" not in path}


def test_names_of_a_bare_encoder_and_of_transposed_kernels_are_theirs(tmp_path):
    bert = ModelConfig(**vars(BERT) | {"head": "none", "activation": "gelu"})
    bert = ModelConfig(**vars(bert) | {"norm_eps": 1e-12})
    for name, config, auto, targets in [
        ("bert", bert, "AutoModel", "query|down"),
        ("gpt2", GPT2, "AutoModelForCausalLM", "out|up|down"),
        ("gpt2-all", GPT2, "AutoModelForCausalLM", "query|value|out|up|down"),
    ]:
        c, model = config_of("lora", targets=targets), build(config)
        params = parallel.init(model, jax.random.PRNGKey(0))
        added = randomized(peft.add(params, c, jax.random.PRNGKey(3)))
        hf.save(tmp_path / name, config, params)
        hf.save_adapter(tmp_path / f"{name}-adapter", config, added, c)
        np.testing.assert_allclose(
            forward(model, added), theirs_of(tmp_path / name, tmp_path / f"{name}-adapter", auto=auto), atol=1e-4
        )
    added = add(params, "adalora")
    with pytest.raises(
        UserError,
        match=r"query is a part of transformer.h.0.attn.c_attn, which "
        r"peft adapts as one",
    ):
        hf.save_adapter(tmp_path / "x", GPT2, added, config_of("adalora"))
    assert not (tmp_path / "x").exists()


def test_an_adapter_goes_beside_a_model(llama, tmp_path):
    _, params = llama
    hf.save(tmp_path, LLAMA, params)
    hf.save_adapter(tmp_path, LLAMA, add(params, "lora"), config_of("lora"))
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], params)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    hf.save_adapter(path, LLAMA, add(llama[1], "adalora"), config_of("adalora"))
    return path


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    "settings, tensors, message",
    [
        ({"peft_type": "IA3"}, {}, "peft_type=IA3 is not supported"),
        ({"bias": "all", "modules_to_save": "lm_head"}, {}, "modules_to_save=lm_head has a wrong type"),
        ({"modules_to_save": [1]}, {}, r"modules_to_save=\[1\] is not supported"),
        ({"modules_to_save": ["up_proj", "embed_tokens"]}, {}, "embed_tokens.weight is missing, but modules_"),
        (
            {"modules_to_save": ["embed_tokens"]},
            {"base_model.model.model.embed_tokens.weight": np.zeros((2, 32), np.float32)},
            r"embed_tokens.weight has shape \[2, 32\], not",
        ),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights=pissa"),
        ({"rank_pattern": [1]}, {}, "rank_pattern"),
        ({"init_r": "4"}, {}, "peft.rank='4' must be an integer"),
        ({"init_r": 5}, {}, "q_proj: rank_pattern keeps 4 of 4 ranks, but the tensors have 4 of init_r=5"),
        ({}, {FIRST + "lora_A": np.zeros((4, 9), np.float32)}, r"has shape \[4, 9\], not \[4, 32\]"),
        ({}, {FIRST + "lora_E": None}, "q_proj has lora_A, lora_B and needs lora_A, lora_B, lora_E"),
        ({}, {"base_model.model.lm_head.weight": np.zeros(2, np.float32)}, "weight has no place"),
        ({}, {FIRST.replace("0", "7") + "lora_A": np.zeros((4, 32), np.float32)}, "has no place"),
    ],
)
def test_what_is_broken_is_named(llama, saved, tmp_path, settings, tensors, message):
    theirs = json.loads((saved / adapters.CONFIG).read_text()) | settings
    (tmp_path / adapters.CONFIG).write_text(json.dumps(theirs))
    arrays = safetensors.numpy.load_file(saved / adapters.WEIGHTS) | tensors
    safetensors.numpy.save_file({k: x for k, x in arrays.items() if x is not None}, tmp_path / adapters.WEIGHTS)
    with pytest.raises(UserError, match=message):
        hf.load_adapter(tmp_path, LLAMA, llama[1])


def test_bad_configurations_are_refused_by_name(llama):
    _, params = llama
    for fields, message in [
        (dict(kind="lorra"), "peft.kind='lorra' is not one of none, lora"),
        (dict(rank=0, alpha=0.0), "peft.rank=0 must be at least 1; peft.alpha=0.0"),
        (dict(kind="houlsby", bottleneck=0), "peft.bottleneck=0 must be at least 1"),
        (dict(alpha=float("nan")), "peft.alpha=nan must be positive"),
        (dict(targets="("), r"peft.targets='\(' is not a regular expression"),
        (dict(kind="adalora", target_rank=9), "peft.target_rank=9 must be at most peft.rank=8"),
        (
            dict(kind="adalora", rank_stabilized=True),
            "peft.rank_stabilized is a field of peft.kind=lora or dora, not of adalora",
        ),
        (dict(kind="adalora", beta1=1.0), r"peft.beta1=1.0 must be in \(0, 1\)"),
        (dict(kind="lora", targets="c_attn"), r"'c_attn' matches the end of none of decoder/block_\*/attention/key"),
        (dict(kind="lora", targets="out|unembed"), "the output head"),
    ]:
        with pytest.raises(UserError, match=message):
            peft.add(params, from_dict(AnyPeft, {"kind": "lora"} | fields, "peft"), jax.random.PRNGKey(0))
    long = AdaLoRA(warmup_steps=100, final_steps=100)
    with pytest.raises(UserError, match="peft.warmup_steps=100 and peft.final_steps=100 must leave"):
        validate(Config(model=ModelConfig(vocab_size=9), peft=long, train=TrainConfig(steps=200)))
    t5 = parallel.param_shapes(build(ModelConfig(**vars(BART) | {"positions": "relative"})))
    with pytest.raises(UserError, match="'prompt' does not work with relative positions"):
        add(t5, "prompt")
    narrow = parallel.param_shapes(build(ModelConfig(vocab_size=9, layers=1, dim=16, embed_dim=8)))
    with pytest.raises(UserError, match="'prompt' does not work in a decoder with model.embed_dim"):
        add(narrow, "prompt")
    with pytest.raises(UserError, match="peft.kind='prefix' needs a Transformer"):
        add({"embed": {"embedding": jnp.ones((4, 4))}}, "prefix")
    with pytest.raises(UserError, match="have adapters already"):
        add(add(params, "lora"), "lora")
    with pytest.raises(UserError, match="prompt cannot be merged"):
        peft.merge(add(params, "prompt"))
    with pytest.raises(UserError, match="peft.kind='houlsby' cannot be written"):
        hf.save_adapter("x", LLAMA, add(params, "houlsby"), config_of("houlsby"))
    assert add(params, "none") is params


def train_adalora(steps, state=None, broken=()):
    """The train step of the program on random windows: (state, opt_state's ranks by step)."""
    c = config_of("adalora", warmup_steps=1, final_steps=2, orthogonality=0.1)
    config = Config(
        model=LLAMA,
        peft=c,
        optim=OptimConfig(learning_rate=0.05, warmup_steps=0),
        train=TrainConfig(steps=8, batch_size=2, accumulate=2, sample_tokens=0),
    )
    validate(config)
    model, mesh = build(LLAMA), parallel.make_mesh("1,1,1", jax.devices()[:1])
    added = peft.add(parallel.init(model, jax.random.PRNGKey(0)), c, jax.random.PRNGKey(3))
    trained, frozen = peft.split(added, peft.trainable(added, c))
    optimizer = peft.adalora_optimizer(make_optimizer(config.optim, 8)[0], c, 8)
    if state is None:
        state = train.init_state(model, optimizer, config, mesh, trained)
    step = train.jit_step(train.make_train_step(model, optimizer, config), state, mesh)
    ranks = []
    for i in range(int(state.step), steps):
        rng = np.random.default_rng(i)
        batch = {
            "targets": rng.integers(0, V, (2, T)).astype(np.int32),
            "first": np.zeros(2, np.int32),
            "weights": np.full((2, T), np.nan if i in broken else 1, np.float32),
        }
        state, _ = step(state, batch, frozen)
        masks = [x for path, x in flatten_dict(state.params, sep="/").items() if "mask" in path]
        ranks.append(int(sum(x.sum() for x in masks)))
    return state, ranks, step


def test_the_train_step_reallocates_ranks_and_resumes_to_the_bit(tmp_path):
    whole, ranks, step = train_adalora(8)
    assert ranks[0] == 14 * 4 and ranks[-3:] == [14 * 2] * 3 and ranks[2] > ranks[4]
    assert step._cache_size() == 1
    flat = flatten_dict(whole.params, sep="/")
    for path, x in flat.items():
        if path.endswith("lora_mask"):
            assert not np.any(np.where(x == 0, flat[path.replace("mask", "e")], 0))
    half, _, _ = train_adalora(4)
    with runs.Checkpoints(tmp_path) as saves:
        saves.save(4, half._asdict(), {})
        saves.wait()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half._asdict())
        back, _ = saves.restore(shapes)
    again, _, _ = train_adalora(8, train.TrainState(**back))
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_skipped_step_does_not_cost_the_budget():
    state, ranks, _ = train_adalora(8, broken=(3, 4, 5))  # the last ones in which ranks go
    assert ranks[5] == ranks[2] > 28 and ranks[6:] == [28, 28] and int(state.step) == 8


def test_the_penalty_is_a_part_of_the_gradient():
    """One step of plain descent on loss and penalty, worked out apart from the transformation."""
    c = config_of("adalora", warmup_steps=3, final_steps=2, orthogonality=0.7)
    p = {
        "x": {
            k: v
            for k, v in add({"x": {"kernel": jnp.ones((4, 4))}}, "adalora", targets="x")["x"].items()
            if k != "kernel"
        }
    }
    grads = jax.tree.map(jnp.ones_like, p)
    wrapped = peft.adalora_optimizer(optax.sgd(0.1), c, 9)
    updates, _ = wrapped.update(grads, wrapped.init(p), p, step=jnp.int32(1))
    for end in "ab":
        w = np.asarray(p["x"][f"lora_{end}"], np.float64)
        w = w.T if end == "a" else w
        gap = w @ w.T - np.eye(len(w))
        slope = 2 * gap @ w / np.linalg.norm(gap) / 2  # the mean of two
        slope = slope.T if end == "a" else slope
        np.testing.assert_allclose(updates["x"][f"lora_{end}"], -0.1 * (1 + 0.7 * slope), rtol=1e-4)


def test_adalora_needs_its_whole_adapters_and_no_average(llama):
    c = config_of("adalora", trained=".*lora_a")
    added = peft.add(llama[1], c, jax.random.PRNGKey(0))
    with pytest.raises(UserError, match="peft.trained must include all parts"):
        peft.adalora_optimizer(optax.sgd(1), c, 9).init(peft.split(added, peft.trainable(added, c))[0])
    with pytest.raises(UserError, match="optim.ema=0.9 does not work with peft.kind='adalora'"):
        validate(Config(peft=AdaLoRA(), optim=OptimConfig(ema=0.9)))
