"""Configurations: what is refused and how, what survives JSON, and the sizes of the presets."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from nanoflax import config as cfg
from nanoflax.config import (
    Config,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RecurrentConfig,
    RopeConfig,
    from_dict,
    to_dict,
)
from nanoflax.errors import UserError
from nanoflax.nn import build


def changed(**changes):
    """The default Config with leaves changed, given as section__name=value."""
    values = to_dict(Config())
    for key, value in changes.items():
        section, name = key.split("__")
        if name == "kind":
            values[section] = {}
        assert name in values[section] or section == "task"
        values[section][name] = value
    return from_dict(Config, values)


def test_defaults_are_valid():
    cfg.validate(Config())


@pytest.mark.parametrize("name", cfg.PRESETS)
def test_presets_are_valid(name):
    cfg.validate(cfg.preset(name))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model__norm="batchnorm"), "model.norm='batchnorm' is not one of layernorm, rmsnorm"),
        (
            dict(model__architecture="encoder", model__head="mlm", model__embed_dim=24, model__mlm_transform=False),
            "model.embed_dim=24 needs model.mlm_transform=True with model.head='mlm'",
        ),
        (dict(model__activation="elu"), "model.activation='elu' is not one of"),
        (dict(model__positions="alibi"), "model.positions='alibi' is not one of"),
        (dict(model__dtype="float16"), "model.dtype='float16' is not one of"),
        (dict(model__context=0), "model.context=0 must be at least 1"),
        (dict(model__layers=0), "model.layers=0 must be at least 1"),
        (dict(model__dim=-8), "model.dim=-8 must be at least 1"),
        (dict(model__heads=0), "model.heads=0 must be at least 1"),
        (dict(model__kv_heads=0), "model.kv_heads=0 must be at least 1"),
        (dict(model__head_dim=0), "model.head_dim=0 must be at least 1"),
        (dict(model__mlp_dim=0), "model.mlp_dim=0 must be at least 1"),
        (dict(model__vocab_size=-1), "model.vocab_size=-1 must be positive"),
        (dict(model__dropout=1.0), "model.dropout=1.0 must be in [0, 1)"),
        (dict(model__dropout=math.nan), "model.dropout=nan must be in [0, 1)"),
        (dict(model__norm_eps=0.0), "model.norm_eps=0.0"),
        (dict(model__rope=RopeConfig(theta=-1.0)), "model.rope.theta=-1.0"),
        (dict(model__dim=250), "model.heads=4 does not divide model.dim=250"),
        (dict(model__kv_heads=3), "model.kv_heads=3 does not divide model.heads=4"),
        (dict(model__positions="rotary", model__head_dim=5), "model.head_dim=5 must be even"),
        (dict(model__positions="sinusoidal", model__dim=5, model__heads=5), "model.dim=5 must be even"),
        (
            dict(model__mlp_dim=0, model__layer_types=("mamba2",), model__parallel=True),
            "model.mlp_dim=0 must be at least 1 with model.parallel=True",
        ),
        (
            dict(model__mlp_dim=0, model__layer_types=("mamba2",), model__moe=MoEConfig(experts=2)),
            "model.mlp_dim=0 must be at least 1 with model.moe.experts without model.moe.expert_dim",
        ),
        (
            dict(model__nope_layers=(1, 4), model__positions="rotary"),
            "model.nope_layers has 4, but the layers are 0 to 3",
        ),
        (dict(model__nope_layers=(1,)), "model.nope_layers=(1,) needs model.positions='rotary', not 'learned'"),
        (dict(model__moe=MoEConfig(experts=2, dense_layers=(-1,))), "model.moe.dense_layers has -1, but the layers"),
        (
            dict(model__moe=MoEConfig(experts=8, active=3, groups=4)),
            "model.moe.active=3 must be at most 2, the experts in model.moe.top_groups=1 of model.moe.groups=4",
        ),
        (
            dict(model__moe=MoEConfig(experts=8, shared_gate=True)),
            "model.moe.shared_gate=True needs model.moe.shared_d",
        ),
        (
            dict(model__recurrent=RecurrentConfig(min_step=0.5, max_step=0.1)),
            "model.recurrent.min_step=0.5 must be at most max_step=0.1",
        ),
        (
            dict(model__positions="rotary", model__latent=LatentConfig(rank=8), model__rope=RopeConfig(fraction=0.5)),
            "model.rope.fraction=0.5 must be 1 with model.latent.rank=8",
        ),
        (
            dict(
                model__positions="rotary",
                model__latent=LatentConfig(rank=8),
                model__nope_layers=(0,),
                model__rope=RopeConfig(nope_scale=0.5),
            ),
            "model.rope.nope_scale=0.5 does not work with model.latent.rank=8",
        ),
        (
            dict(model__architecture="encoder_decoder", model__parallel=True),
            "model.parallel=True is for a decoder or encoder",
        ),
        (dict(model__decoder_layers=2), "model.decoder_layers=2 is not for 'decoder'; use model.layers"),
        (dict(data__packing="loose"), "data.packing='loose' is not one of joined, isolated"),
        (dict(data__workers=-1), "data.workers=-1 must be at least 0"),
        (dict(data__validation_fraction=1.0), "data.validation_fraction=1.0 must be in (0, 1)"),
        (dict(data__validation_fraction=0.0), "data.validation_fraction=0.0 must be in (0, 1)"),
        (dict(train__seed=2**32), "train.seed=4294967296 must be at most 4294967295"),
        (dict(train__seed=-1), "train.seed=-1 must be at least 0"),
        (dict(optim__name="adam"), "optim.name='adam' is not one of"),
        (dict(optim__schedule="step"), "optim.schedule='step' is not one of"),
        (dict(optim__learning_rate=math.nan), "optim.learning_rate=nan must be at least 0"),
        (dict(optim__clip=-1.0), "optim.clip=-1.0 must be at least 0"),
        (dict(optim__b1=1.0), "optim.b1=1.0 must be in [0, 1)"),
        (dict(optim__b2=-0.1), "optim.b2=-0.1 must be in [0, 1)"),
        (dict(optim__ema=1.0), "optim.ema=1.0 must be in [0, 1)"),
        (dict(optim__decay_fraction=0.0), "optim.decay_fraction=0.0 must be in (0, 1]"),
        (dict(optim__warmup_steps=1000), "optim.warmup_steps=1000 must be less than train.steps=1000"),
        (dict(train__remat="all"), "train.remat='all' is not one of none, dots, offload, blocks"),
        (dict(train__steps=0), "train.steps=0 must be at least 1"),
        (dict(train__batch_size=-1), "train.batch_size=-1 must be at least 0"),
        (dict(train__accumulate=0), "train.accumulate=0 must be at least 1"),
        (dict(train__accumulate=3, train__batch_size=16), "train.accumulate=3 does not divide train.batch_size=16"),
        (dict(train__evaluate_every=0), "train.evaluate_every=0 must be at least 1"),
        (dict(train__keep=0), "train.keep=0 must be at least 1"),
        (dict(train__patience=-1), "train.patience=-1 must be at least 0"),
        (dict(train__label_smoothing=1.0), "train.label_smoothing=1.0 must be in [0, 1)"),
        (
            dict(task__kind="classify", task__noise_rate=0.3),
            "task.noise_rate is a field of task.kind=masked_lm or denoise, not of classify",
        ),
        (dict(task__noise="infilling"), "task.noise is a field of task.kind=denoise, not of pretrain"),
        (dict(task__kind="masked_lm", task__noise_span=2.0), "task.noise_span is a field of task.kind=denoise, not of"),
        (dict(task__kind="denoise", task__noise_rate=0.0), "task.noise_rate=0.0 must be in (0, 1)"),
        (
            dict(task__kind="denoise", task__noise="none", task__noise_rate=0.3),
            "task.noise_rate=0.3 has no effect with task.noise='none'",
        ),
        (dict(train__loss_chunks=3), "train.loss_chunks=3 does not divide model.context=256"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_values_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        cfg.validate(changed(**changes))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "task",
    [
        dict(kind="masked_lm", noise_rate=0.3),
        dict(kind="denoise", noise="none"),
        dict(kind="denoise", noise="infilling", noise_rate=0.2, noise_span=2.0),
    ],
)
def test_noise_is_for_the_tasks_that_read_it(task):
    cfg.validate(changed(**{f"task__{name}": value for name, value in task.items()}))


def test_every_problem_is_told_at_once():
    with pytest.raises(UserError) as caught:
        cfg.validate(changed(model__norm="x", model__dim=0, optim__name="y", train__steps=0))
    for name in ("model.norm", "model.dim", "optim.name", "train.steps"):
        assert name in str(caught.value)


def test_json_round_trip():
    config = changed(
        model__kv_heads=2, model__bias=False, optim__eps=1e-7, train__mesh="1,8,1", data__train="text:*.md"
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_absent_fields_take_their_defaults():
    assert from_dict(Config, {"model": {"dim": 64}}) == changed(model__dim=64)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model": {"dims": 3}}, "config.model.dims does not exist; did you mean config.model.dim?"),
        ({"modle": {}}, "config.modle does not exist; did you mean config.model?"),
    ],
)
def test_unknown_fields_name_the_nearest(values, words):
    with pytest.raises(UserError) as caught:
        from_dict(Config, values)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model__heads=2.0), "model.heads=2.0 must be an integer"),
        (dict(model__dim="64"), "model.dim='64' must be an integer"),
        (dict(model__layers=True), "model.layers=True must be an integer"),
        (dict(model__layers=None), "model.layers=None must be an integer"),
        (dict(model__kv_heads="2"), "model.kv_heads='2' must be an integer or none"),
        (dict(model__bias=1), "model.bias=1 must be true or false"),
        (dict(model__norm=3), "model.norm=3 must be text"),
        (dict(optim__eps="1e-8"), "optim.eps='1e-8' must be a number"),
        (dict(optim__clip=False), "optim.clip=False must be a number"),
        (dict(train__mesh=[1, 8, 1]), "train.mesh=(1, 8, 1) must be text"),
        (dict(train__steps=[10]), "train.steps=(10,) must be an integer"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_types_are_named(changes, words):
    with pytest.raises(UserError) as caught:
        changed(**changes)  # from JSON
    assert str(caught.value) == f"config.{words}"
    ((key, value),) = changes.items()
    section, name = key.split("__")
    value = tuple(value) if isinstance(value, list) else value
    bad = dataclasses.replace(getattr(Config(), section), **{name: value})
    with pytest.raises(UserError) as caught:  # from Python
        cfg.validate(dataclasses.replace(Config(), **{section: bad}))
    assert str(caught.value) == words
    if section == "model":
        with pytest.raises(UserError) as caught:
            build(dataclasses.replace(bad, vocab_size=10))
        assert str(caught.value) == words


def test_an_integer_is_a_number_too():
    cfg.validate(changed(optim__clip=1, model__rope=RopeConfig(theta=500_000)))


@pytest.mark.parametrize(
    "values, words",
    [
        (3, "config=3 must be the fields of a Config"),
        ({"model": 3}, "config.model=3 must be the fields of a ModelConfig"),
        ({"model": None}, "config.model=None must be the fields of a ModelConfig"),
        ({3: 4}, "config.3 does not exist"),
    ],
)
def test_what_is_no_configuration_is_refused(values, words):
    with pytest.raises(UserError) as caught:
        from_dict(Config, values)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="model=3 must be a ModelConfig; train.steps='1' must be"):
        cfg.validate(Config(model=3, train=cfg.TrainConfig(steps="1")))


@dataclasses.dataclass(frozen=True)
class WithTuples:
    blocks: tuple[int, ...] = ()
    scales: tuple[float, ...] | None = None


def test_tuples_come_back_from_json():
    config = WithTuples((0, 2, 4), (1, 0.5))
    assert from_dict(WithTuples, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(WithTuples, {"scales": None}) == WithTuples()
    for values, words in [
        ({"blocks": [0, "2"]}, "blocks=(0, '2') must be a list, each an integer"),
        ({"blocks": 3}, "blocks=3 must be a list"),
        ({"blocks": None}, "blocks=None must be a list"),
        ({"scales": ["x"]}, "must be a list, each a number or none"),
    ]:
        with pytest.raises(UserError) as caught:
            from_dict(WithTuples, values)
        assert words in str(caught.value)


def test_unknown_preset_and_field_are_refused():
    with pytest.raises(UserError, match="preset 'gpt3' is unknown; known: nano-1m"):
        cfg.preset("gpt3")
    with pytest.raises(UserError, match="preset.layer does not exist.*preset.layers"):
        cfg.preset("gpt2", layer=3)


def test_diff_names_each_changed_leaf():
    old, new = to_dict(Config()), to_dict(changed(model__dim=384, train__mesh="1,8,1"))
    del old["optim"]["ema"]  # a field that an older version did not have
    assert cfg.diff(old, new) == ["model.dim: 256 -> 384", "optim.ema: None -> 0.0", "train.mesh: '-1,1,1' -> '1,8,1'"]
    assert cfg.diff(new, new) == []


@pytest.mark.parametrize(
    "name, count",
    [
        # The published models' own parameters, as Transformers counts them.
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
    ],
)
def test_presets_have_the_published_sizes(name, count):
    model = build(cfg.preset(name))
    shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_small_presets_have_the_size_in_their_name():
    for name, low, high in [("nano-1m", 0.5e6, 1.5e6), ("nano-5m", 3e6, 6e6), ("nano-15m", 12e6, 18e6)]:
        model = build(cfg.preset(name, vocab_size=2048))
        shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32)))
        assert low < sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) < high


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="model.vocab_size=0 must be set"):
        build(ModelConfig())


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3


def test_a_configuration_of_an_older_version_is_upgraded():
    """The fields rope_* and global_layers of version 0.1 became sections and kinds of layers."""
    old = to_dict(ModelConfig(layers=4)) | {
        "rope_theta": 300.0,
        "rope_local_theta": 50.0,
        "rope_fraction": 0.5,
        "rope_scaling": "linear",
        "rope_factor": 2.0,
        "window": 8,
        "global_layers": [1, 3],
    }
    for name in ("rope", "layer_types", "nope_layers", "moe", "latent", "recurrent"):
        del old[name]
    rope = RopeConfig(theta=300.0, local_theta=50.0, fraction=0.5, scaling="linear", factor=2.0)
    types = ("sliding", "full", "sliding", "full")
    expected = ModelConfig(layers=4, rope=rope, window=8, layer_types=types)
    assert from_dict(ModelConfig, json.loads(json.dumps(old))) == expected
    assert from_dict(ModelConfig, to_dict(expected)) == expected
