"""Fused attention beside the plain one: the same numbers and gradients, and never another mask."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import parallel, planning, train
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.generate import sample
from nanoflax.kernels import fused_attention as kernels
from nanoflax.kernels.fused_attention import Call, MaskSpec, choose
from nanoflax.nn import build, masking
from nanoflax.nn.attention import heads_first
from nanoflax.parallel import constraints
from tests.closeness import assert_trees_close
from tests.parallel.mesh_test import collectives, run_child

B, H, G, T, K = 2, 4, 2, 384, 32  # nine blocks of 128
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), 1).astype(np.int32)
VALID = np.random.default_rng(1).random((B, T)) < 0.6  # padding may lie anywhere

# name: (causal, spec, softcap, scale)
CASES = {
    "causal": (True, MaskSpec(), 0.0, None),
    "all": (False, MaskSpec(), 0.0, 0.3),
    "packed": (True, MaskSpec(jnp.asarray(SEGMENTS)), 0.0, None),
    "padded": (False, MaskSpec(valid=jnp.asarray(VALID)), 0.0, None),
    "window": (True, MaskSpec(window=40), 0.0, None),
    "window, packed, capped": (True, MaskSpec(jnp.asarray(SEGMENTS), window=140), 5.0, 0.1),
    "window of an encoder": (False, MaskSpec(window=140), 0.0, None),
}


def arrays(dtype=np.float32, S=T):
    rng = np.random.default_rng(2)
    return [
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, H, T, K), (B, G, S, K), (B, G, S, K), (B, H, T, K))
    ]


def dense(causal, spec, length=T):
    """The dense mask of a MaskSpec."""
    mask, place = np.ones((1, 1, 1, 1), bool), np.arange(length)
    if causal:
        mask = mask & masking.causal(place, place)
    if spec.window:
        mask = mask & masking.window(place, place, spec.window)
    if spec.segments is not None:
        mask = mask & masking.segments(spec.segments, spec.segments)
    return mask if spec.valid is None else mask & masking.padding(spec.valid)


def plain(q, k, v, causal, spec, scale, softcap):
    return heads_first(q, k, v, dense(causal, spec, q.shape[2]), False, None, scale, softcap)


def same(found, expected, tolerance):
    """found, expected: (what a function gives, its gradients); each is compared by its own scale."""
    for ours, plain in zip(found, expected, strict=True):
        assert_trees_close(ours, plain, relative_to_tree=tolerance)


def numbers(attend, dtype, case):
    """What a kernel gives and its gradients, and those of plain attention."""
    causal, spec, softcap, scale = CASES[case]
    *qkv, dy = arrays(dtype)

    def run(attend):
        y, pull = jax.vjp(lambda *x: attend(*x, causal, spec, scale, softcap), *qkv)
        return y, pull(dy)

    return jax.jit(lambda: run(attend))(), jax.jit(lambda: run(plain))()


def interpreted(*arguments):
    return kernels.splash(*arguments, interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_plain(case):
    same(*numbers(interpreted, jnp.float32, case), 1e-5)


def test_splash_where_no_key_is_real_is_finite():
    *qkv, dy = arrays()
    spec = MaskSpec(valid=jnp.zeros((B, T), bool))
    y, pull = jax.vjp(lambda *x: interpreted(*x, False, spec, None, 0.0), *qkv)
    assert all(np.isfinite(x).all() for x in (y, *pull(dy)))


CUDNN = ("causal", "all", "padded", "window")  # what it can do of CASES


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_equals_plain(case):
    same(*numbers(kernels.cudnn, jnp.bfloat16, case), 0.03)


@pytest.mark.parametrize("case", CUDNN)
def test_what_cudnn_is_asked_for_is_plain_attention(monkeypatch, case):
    """The same arguments, computed by JAX's own implementation of what they mean."""
    meant = jax.nn.dot_product_attention

    def elsewhere(*arguments, implementation, **options):
        assert implementation == "cudnn" and "mask" not in options and "bias" not in options
        return meant(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    same(*numbers(kernels.cudnn, jnp.float32, case), 1e-5)


@pytest.mark.parametrize(
    "case, mask, window, operands",
    [("causal", "CAUSAL", 0, 3), ("all", "NO_MASK", 0, 3), ("padded", "PADDING", 0, 5), ("window", "CAUSAL", 40, 3)],
)
def test_cudnn_is_called_in_a_program_for_a_gpu(monkeypatch, case, mask, window, operands):
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    causal, spec, softcap, scale = CASES[case]
    *qkv, dy = arrays(jnp.bfloat16)

    def step(*qkv):
        y, pull = jax.vjp(lambda *x: kernels.cudnn(*x, causal, spec, scale, softcap), *qkv)
        return y, pull(dy)

    program = jax.jit(step).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmhaSoftmax(\w*)\((.*?)\)(.*)", program)
    assert [name for name, _, _ in calls] == ["", "Backward"]
    assert [len(given.split(",")) for _, given, _ in calls] == [operands, operands + 3]
    for _, _, options in calls:
        options = options.replace("\\22", '"')
        assert f'"mask_type": "{mask}"' in options
        said = float(re.search(r'"fmha_scale": ([\d.e-]+)', options)[1])
        assert said == pytest.approx(scale or K**-0.5)
        assert f'"sliding_window_length": {window}' in options


# The choice.


def call(platform="gpu", **changes):
    return Call(platform, (B, H, T, K), (B, G, T, K), jnp.bfloat16, True, MaskSpec(), False, 0.0)._replace(**changes)


SEGMENTED, PADDED = MaskSpec(jnp.asarray(SEGMENTS)), MaskSpec(valid=jnp.asarray(VALID))


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(), ""),
        (dict(spec=MaskSpec(window=9)), ""),
        (dict(spec=PADDED, causal=False), ""),
        (dict(k=(B, G, 77, K), spec=PADDED, causal=False), ""),
        (dict(dtype=jnp.float32), "it takes bfloat16 and float16, not float32"),
        (dict(q=(B, H, T, 264)), "the head size 264 is not a multiple of 8 up to 256"),
        (dict(q=(B, H, T, 60)), "the head size 60 is not a multiple of 8"),
        (dict(spec=SEGMENTED), "packed documents need a mask of segments"),
        (dict(spec=PADDED), "padding with causality"),
        (dict(spec=MaskSpec(window=9), causal=False), "a window without causality"),
        (dict(spec=None), "prompt tuning, prefix tuning and chunked layers need a dense mask"),
        (dict(bias=True), "attention has a bias of relative positions"),
        (dict(softcap=30.0), "scores have a softcap"),
        (dict(k=(B, G, 77, K)), "causality between sequences of different lengths"),
    ],
)
def test_cudnn_is_chosen_only_where_it_is_exact(change, why):
    check_choice("cudnn", call("gpu", **change), why)


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(), ""),
        (dict(dtype=jnp.float32), ""),
        (dict(spec=SEGMENTED), ""),
        (dict(spec=PADDED, causal=False), ""),
        (dict(softcap=30.0), ""),
        (dict(spec=MaskSpec(window=9), causal=False), ""),
        (dict(q=(B, H, T, 60)), ""),
        (dict(q=(B, H, 128, K), causal=False), ""),
        (dict(q=(B, H, 100, K), k=(B, G, 100, K)), "lengths of 100 and 100 are not multiples of 128"),
        (dict(spec=None), "prompt tuning, prefix tuning and chunked layers need a dense mask"),
        (dict(bias=True), "attention has a bias of relative positions"),
        (dict(q=(B, H, 128, K)), "causality between sequences of different lengths"),
    ],
)
def test_splash_is_chosen_only_where_it_is_exact(change, why):
    check_choice("splash", call("tpu", **change), why)


def check_choice(name, asked, why):
    chosen, reason = choose("auto", asked)
    assert choose("plain", asked) == ("plain", "")
    if not why:
        assert (chosen, reason) == (name, "") and choose(name, asked) == (name, "")
        return
    assert chosen == "plain" and reason.startswith(f"not {name}: ") and why in reason
    with pytest.raises(UserError, match=f"model.attention_backend='{name}' is not possible: .*{why}"):
        choose(name, asked)


@pytest.mark.parametrize(
    "capability, K, why",
    [(7.5, 64, "older than Ampere"), (8.0, 128, ""), (8.9, 136, "multiple of 8 up to 128"), (9.0, 256, "")],
)
def test_what_a_gpu_is_able_to(monkeypatch, capability, K, why):
    monkeypatch.setattr(kernels, "_compute_capability", lambda: capability)
    check_choice("cudnn", call(q=(B, H, T, K)), why)


def test_other_platforms_are_plain_and_a_kernel_by_name_is_refused():
    assert choose("auto", call("cpu")) == ("plain", "")
    with pytest.raises(UserError, match="it runs on tpu, not cpu"):
        choose("splash", call("cpu"))
    with pytest.raises(UserError, match="it runs on gpu, not tpu"):
        choose("cudnn", call("tpu"))


def test_context_is_for_plain_attention():
    mesh = parallel.abstract_mesh((1, 2, 1, 4))
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose("auto", call("tpu")) == ("plain", "not splash: context=4 splits the sequence")
    with jax.sharding.use_abstract_mesh(parallel.abstract_mesh((1, 4, 1, 1))):
        assert "2 rows are not divisible by data x fsdp x expert = 4" in choose("auto", call("tpu"))[1]
    with jax.sharding.use_abstract_mesh(parallel.abstract_mesh((1, 1, 8, 1))):
        assert choose("auto", call("tpu")) == ("plain", f"not splash: {G} heads are not divisible by tensor = 8")


# Whole models.

MODELS = {
    "decoder": ModelConfig(
        vocab_size=32,
        context=128,
        layers=2,
        dim=32,
        heads=4,
        kv_heads=2,
        positions="rotary",
        window=40,
        layer_types=("sliding", "full"),
        attention_softcap=9.0,
        dtype="float32",
    ),
    "encoder": ModelConfig(
        architecture="encoder", head="tag", vocab_size=32, context=128, layers=1, dim=32, heads=4, dtype="float32"
    ),
    "encoder_decoder": ModelConfig(
        architecture="encoder_decoder",
        vocab_size=32,
        context=128,
        layers=1,
        dim=32,
        heads=4,
        positions="sinusoidal",
        dtype="float32",
    ),
}


def batch_of(name, rows=2, T=128):
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(0, 32, (rows, T)).astype(np.int32)  # noqa: E731
    real = np.arange(T) < rng.integers(T // 2, T, (rows, 1))
    weights = real.astype(np.float32)
    if name == "encoder":
        return {"tokens": ids(), "padding_mask": real, "tags": ids() % 2, "weights": weights}
    if name == "encoder_decoder":
        return {"source": ids(), "source_mask": real, "targets": ids(), "weights": weights}
    return {
        "targets": ids(),
        "first": ids()[:, 0],
        "start": ids()[:, 0],
        "weights": weights,
        "segments": np.sort(rng.integers(1, 4, (rows, T)), 1).astype(np.int32),
    }


def gradients(name):
    """(loss, gradients) of a model, and which attention they came from."""
    objective = {"encoder": train.tag, "encoder_decoder": train.seq2seq}.get(name, train.causal_lm)
    model, batch = build(MODELS[name]), batch_of(name)
    params = parallel.init(model, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    step = jax.value_and_grad(lambda params, batch: objective(model, params, batch)[0])
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    return jax.jit(step)(params, batch), planning.attention_backends(model, params, batch, mesh, objective)


def on_a_tpu(patch):
    """Splash is chosen as if on a TPU, and computes what its MaskSpec says."""

    def by_spec(q, k, v, causal, spec, scale, softcap):
        return plain(q, k, v, causal, spec, scale, softcap)

    patch(parallel, "current_platform", lambda: "tpu")
    patch(kernels, "BACKENDS", {"splash": kernels.BACKENDS["splash"]._replace(attend=by_spec)})


@pytest.mark.parametrize("name", MODELS)
def test_the_mask_spec_is_the_mask(monkeypatch, name):
    expected, chosen = gradients(name)
    assert re.fullmatch(r"plain( \(not cudnn: .*\))?", chosen)  # on a GPU with the reason
    on_a_tpu(monkeypatch.setattr)
    found, chosen = gradients(name)
    assert chosen == "splash"
    same(found, expected, 1e-5)


def splash_on_a_mesh():
    mesh, rng = parallel.make_mesh("2,2,2"), np.random.default_rng(0)
    q, dy = rng.normal(size=(2, 4, H, 128, K)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, G, 128, K)).astype(np.float32)
    segments = np.sort(rng.integers(0, 3, (4, 128)), 1).astype(np.int32)

    def numbers(attend, q, k, v, dy, segments):
        y, pull = jax.vjp(lambda *x: attend(*x, True, MaskSpec(segments), None, 0.0), q, k, v)
        return y, pull(dy)

    places = [jax.NamedSharding(mesh, constraints.CACHE)] * 4 + [parallel.batch_sharding(mesh, 2)]
    arguments = jax.device_put((q, k, v, dy, segments), tuple(places))
    split = jax.jit(parallel.with_mesh(mesh, functools.partial(numbers, interpreted)))
    split = split.lower(*arguments).compile()
    found = split(*arguments)
    same(jax.device_get(found), jax.jit(functools.partial(numbers, plain))(q, k, v, dy, segments), 1e-5)
    return [
        [axes for _, axes, _ in collectives(split.as_text(), mesh)],
        sorted({x.addressable_shards[0].data.shape for x in jax.tree.leaves(found)}),
    ]


def test_splash_on_a_mesh_equals_plain_each_device_its_rows_and_heads():
    moved, shapes = run_child("splash_on_a_mesh", file="kernels.fused_attention_test")
    assert not any(moved) and shapes == [[1, 1, 128, K], [1, 2, 128, K]]  # of keys and of queries


def test_what_is_chosen_is_named_and_a_cache_and_init_are_plain(monkeypatch):
    config = dataclasses.replace(MODELS["decoder"], attention_backend="splash")
    model = build(config)
    params = parallel.init(model, jax.random.PRNGKey(0))
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    batch = batch_of("decoder")
    platform = jax.default_backend()
    words = f"model.attention_backend='splash' is not possible: it runs on tpu, not {platform}; auto uses it only if"
    with pytest.raises(UserError, match=words):
        planning.attention_backends(model, params, batch, mesh)
    prompts = [[1, 2, 3]]
    assert sample(model, params, prompts, 4, temperature=0) == sample(
        build(MODELS["decoder"]), params, prompts, 4, temperature=0
    )
    on_a_tpu(monkeypatch.setattr)
    short = batch_of("decoder", T=64)
    assert planning.attention_backends(build(MODELS["decoder"]), params, short, mesh) == (
        "plain (not splash: lengths of 64 and 64 are not multiples of 128)"
    )


def test_platform_is_that_of_the_mesh():
    assert parallel.current_platform() == jax.default_backend()
    with jax.sharding.use_abstract_mesh(parallel.abstract_mesh((1, 1, 1), "tpu")):
        assert parallel.current_platform() == "tpu"
