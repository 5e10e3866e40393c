"""Plans: exact where they claim it, beside arrays and compiled programs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from experiments.flags import load_config
from nanoflax import config as configs
from nanoflax import nn, parallel, train
from nanoflax.config import Config, ModelConfig, OptimConfig, TrainConfig, preset
from nanoflax.planning import for_accelerator, peak_memory, step_cost
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = """
import json, sys
from tests.planning import step_cost_test
print(json.dumps(getattr(step_cost_test, sys.argv[1])()))
"""
MESHES = ("8,1,1", "1,8,1", "2,2,2")


def run_child(name):
    flags = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
    done = processes.run(["-c", CHILD, name], env=os.environ | {"XLA_FLAGS": flags}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def small(mesh, **changes):
    return Config(
        model=ModelConfig(
            vocab_size=64,
            context=32,
            layers=2,
            dim=32,
            heads=8,
            mlp_dim=96,
            norm="rmsnorm",
            gated=True,
            positions="rotary",
            bias=False,
            tied=False,
            dtype="float32",
        ),
        optim=OptimConfig(ema=0.9, warmup_steps=0),
        train=TrainConfig(batch_size=16, mesh=mesh, loss_chunks=4, steps=10, **changes),
    )


def abstract(config, count=8):
    return parallel.abstract_mesh(parallel.mesh_sizes(config.train.mesh, count))


# By hand.

D, F, V, L = 32, 96, 64, 2
BLOCK, NORMS = 4 * D * D + 3 * D * F, 2 * L * D + D
PARAMETERS = 2 * V * D + L * BLOCK + NORMS


@pytest.mark.parametrize("mesh, parts", [("8,1,1", 1), ("1,8,1", 8), ("2,2,2", 4)])
def test_parameters_and_bytes_by_hand(mesh, parts):
    found = step_cost.make_plan(small(mesh), abstract(small(mesh)))
    assert found.parameters == PARAMETERS == 30_880
    weights = 4 * ((PARAMETERS - NORMS) // parts + NORMS)  # norms are whole
    assert found.weights == weights
    counters = 8  # AdamW's and the schedule's step
    assert found.optimizer == 3 * weights + counters  # two moments and the moving average
    rows = 16 // (4 if mesh == "2,2,2" else 8)
    assert found.batch == rows * (32 * 4 + 32 * 4 + 4)
    heads = 4 if mesh == "2,2,2" else 8  # keys and values of 4 numbers; index and start
    assert found.cache == L * 2 * rows * heads * 32 * 4 * 4 + 4 + 4 * rows
    assert found.tokens == 16 * 32


def test_traffic_by_hand():
    def of(mesh, **changes):
        return step_cost.make_plan(small(mesh, **changes), abstract(small(mesh))).collectives

    whole = 2 * 7 / 8 * 4  # an all-reduce of a float over eight
    assert of("8,1,1") == {"all-reduce": whole * PARAMETERS}
    assert of("8,1,1", accumulate=2) == {"all-reduce": 2 * whole * PARAMETERS}
    found = of("1,8,1")
    head, states = V * D, 2 * 32 * D  # of two rows
    assert found == {  # blocks in both passes; of eight chips the states, targets and weights
        "all-gather": 7 / 8 * 4 * (2 * L * BLOCK + 8 * (states + 2 * 2 * 32)),
        "reduce-scatter": 7 / 8 * 4 * (L * BLOCK + V * D + 8 * states),
        "all-reduce": whole * NORMS,
        "all-to-all": 7 / 8 * 4 * (2 * states + 2 * head / 8),
    }
    # Four sums a block forward and backward, and those of the embedding and the head's input.
    assert of("1,1,8")["all-reduce"] == 2 * 7 / 8 * 4 * (8 * states * (4 * L + 2))


def test_context_divides_the_sequence_and_gathers_keys_and_values():
    def of(mesh):
        return step_cost.make_plan(small(mesh), abstract(small(mesh)))

    one, found = of("1,1,8"), of("1,1,1,8")
    assert found.batch == 16 * (4 * (4 + 4) + 4)  # of 32 tokens 4, and the first
    assert found.cache == 8 * one.cache - 7 * (4 + 4 * 16)  # heads are split no more
    keys = L * 2 * 16 * 32 * D * 4  # and values, of all rows and layers
    assert found.collectives == {
        "all-gather": 7 / 8 * keys,
        "reduce-scatter": 7 / 8 * keys,
        "all-reduce": 2 * 7 / 8 * 4 * PARAMETERS,
    }
    whole = step_cost.make_plan(small("1,1,1"), abstract(small("1,1,1"), 1)).activations
    # An eighth of everything, but for the keys, which are whole in every layer.
    assert whole / 8 < found.activations < whole / 8 + keys + L * 16 * 8 * 32 * 32 * 4 / 8


def test_what_gradients_and_activations_take():
    """A chain of products, counted by hand: x [4, 8] through w1, tanh and w2 [8, 8]."""
    import jax.numpy as jnp

    def loss(w, x):
        return (jnp.tanh(x @ w[0]) @ w[1]).sum()

    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    traced = jax.make_jaxpr(jax.grad(loss))([w, w], x).jaxpr
    grads, most = peak_memory.peak(traced, (), {})
    assert grads == 2 * 4 * 64
    # The last product makes dw1 [8, 8] beside dw2, and reads dy w2^T (1 - tanh^2) [4, 8].
    assert most == 2 * 4 * 64 + 4 * 32
    split = dict.fromkeys(traced.outvars, 8)
    assert peak_memory.peak(traced, (), split)[0] == grads // 8


def test_products_of_experts_are_written():
    """A ragged product is not a part of the operations that read it, as an addition is."""
    import jax.numpy as jnp

    x, w, sizes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(6, 8), (2, 8, 4), (2,)])
    traced = jax.make_jaxpr(lambda x, w, n: jax.lax.ragged_dot(x, w, n.astype(int)).sum(0))(x, w, sizes).jaxpr
    assert peak_memory.peak(traced, (), {})[1] == 4 * (6 * 4 + 4)


@pytest.mark.parametrize("sizes, gib", [((1, 16, 2, 1, 8), 8.25), ((2, 16, 1, 1, 8), 11.36)])
def test_the_memory_of_experts_is_near_what_the_tpu_compiler_uses(sizes, gib):
    """The figures of libtpu 0.0.50.1 for experiments/configs/mixtral_8x7b.py on a v5e:16x16, jax 0.12.0."""
    config = for_accelerator(load_config(f"{ROOT}/experiments/configs/mixtral_8x7b.py"))
    memory = step_cost.make_plan(config, parallel.abstract_mesh(sizes, "tpu")).memory / 2**30
    assert 0.9 < memory / gib < 1.1


def test_the_memory_of_a_cpu_is_near_what_xla_allocates():
    model = ModelConfig(vocab_size=256, context=128, layers=3, dim=128, heads=4)
    config = Config(model=model, optim=OptimConfig(warmup_steps=0), train=TrainConfig(batch_size=16, mesh="1,1,1"))
    mesh = parallel.make_mesh("1,1,1", jax.devices()[:1])
    optimizer, _ = train.make_optimizer(config.optim, 10)
    state = train.abstract_state(nn.build(model), optimizer, config, mesh)
    step = train.make_train_step(nn.build(model), optimizer, config)
    used = train.compile_step(step, state, train.abstract_batch(config, mesh), mesh).memory_analysis()
    written = used.output_size_in_bytes - used.alias_size_in_bytes
    exact = used.argument_size_in_bytes + used.temp_size_in_bytes + written
    assert 0.8 < step_cost.make_plan(config, mesh).memory / exact < 1.25


@pytest.mark.parametrize("B, gigabytes", [(32, 13.4), (128, 40.8)])  # XLA's figures for an H200, jax 0.11.2
def test_the_memory_of_a_gpu_is_near_what_xla_allocated(B, gigabytes):
    config = Config(optim=OptimConfig(warmup_steps=0), train=TrainConfig(batch_size=B))
    config = dataclasses.replace(config, model=preset("gpt2", dtype="bfloat16"))
    memory = step_cost.make_plan(config, parallel.abstract_mesh((1, 1, 1), "gpu")).memory / 2**30
    assert 0.85 < memory / gigabytes < 1.15


def test_roofline_by_hand():
    config = small("8,1,1")
    found = dataclasses.replace(
        step_cost.make_plan(config, abstract(config)),
        flops_per_token=1e9,
        tokens=8000,
        memory_traffic=3e9,
        collectives={"a": 1e9, "b": 3e9},
    )
    chip = parallel.CHIPS["v5e"]
    assert chip.flops == 197e12
    bounds = step_cost.roofline(found, chip)
    assert bounds == pytest.approx((1e12 / 197e12, 3e9 / 819e9, 4e9 / 200e9))
    assert (bounds.bound, bounds.seconds) == ("network", bounds.network)
    assert step_cost.projected_mfu(found, chip) == pytest.approx(bounds.compute / bounds.network)
    again = step_cost.roofline(found, chip, "blocks")
    assert again.compute == pytest.approx(4 / 3 * bounds.compute)


@pytest.mark.parametrize(
    "name, parameters",
    [  # of the published models
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("t5-11b", 11_307_321_344),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    from nanoflax.nn import build

    shapes = parallel.param_shapes(build(preset(name)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize(
    "model",
    [
        dict(architecture="encoder_decoder"),
        dict(architecture="lstm"),
        dict(architecture="encoder", head="tag"),
        dict(architecture="encoder", head="classify"),
        dict(architecture="decoder", embed_dim=64, norm_scale=False, parallel=True, shared_norm=True),
    ],
)
def test_other_architectures_are_planned(model):
    config = small("2,4,1")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    found = step_cost.make_plan(config, abstract(config))
    assert found.activations > 0 and (found.cache > 0) == (model["architecture"] != "encoder")


# Beside what is real, on eight fake devices.


def arrays():
    from nanoflax import nn, train

    out = {}
    for mesh_shape in MESHES:
        config = small(mesh_shape)
        mesh = parallel.make_mesh(mesh_shape)
        optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
        state = train.init_state(nn.build(config.model), optimizer, config, mesh)
        step = train.compile_step(
            train.make_train_step(nn.build(config.model), optimizer, config),
            state,
            train.abstract_batch(config, mesh),
            mesh,
        )
        found = step_cost.make_plan(config, abstract(config))

        def held(tree):
            first = jax.devices()[0]
            return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)

        out[mesh_shape] = {
            "weights": held(state.params),
            "optimizer": held((state.opt_state, state.ema)),
            "plan": dataclasses.asdict(found),
            "hlo": moved(step.as_text()),
        }
    return out


def moved(hlo):
    """[kind, bytes of results, whether in a loop, whether of the embedding] of each collective."""
    out = []
    for line in hlo.splitlines():
        m = re.match(
            r"\s*(?:ROOT )?\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|"
            r"collective-permute)(?:-start)?\(",
            line,
        )
        if m:
            numbers = [s.split(",") for s in re.findall(r"[fs]32\[([\d,]*)\]", m[1])]
            size = sum(4 * eval("*".join(n) or "1") for n in numbers)
            name = re.search(r'op_name="([^"]*)"', line)
            name = name[1] if name else ""
            # An all-reduce of several arrays is XLA's of many, under the name of the first.
            many = m[2] == "all-reduce" and len(numbers) > 1
            out.append([m[2], size, "while/body" in name, "embed" in name and not many])
    return out


@pytest.fixture(scope="module")
def real():
    return run_child("arrays")


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_and_optimizer_are_what_a_device_holds(real, mesh):
    assert real[mesh]["weights"] == real[mesh]["plan"]["weights"] > 0
    assert real[mesh]["optimizer"] == real[mesh]["plan"]["optimizer"]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_compiled_step_holds_the_collectives_that_are_planned(real, mesh):
    # XLA on CPU reduces and then cuts, where the plan has a reduce-scatter; and how it looks up an
    # embedding that is split both ways is its own affair.
    planned = {"all-reduce" if kind == "reduce-scatter" else kind for kind in real[mesh]["plan"]["collectives"]}
    assert {kind for kind, _, _, embedding in real[mesh]["hlo"] if not embedding} == planned


def test_fsdp_gathers_the_bytes_that_are_planned_and_no_more(real):
    gathered = sum(
        size * (4 if loop else 1)
        for kind, size, loop, embedding in real["1,8,1"]["hlo"]
        if kind == "all-gather" and not embedding
    )
    assert gathered * 7 / 8 == real["1,8,1"]["plan"]["collectives"]["all-gather"]


# The program.


def program(*flags):
    return processes.run(["-m", "experiments.plan", *flags], timeout=600)


SMALL = ["--config=pydocs_tiny", "--config.model.layers=1", "--nocompile"]


def test_a_plan_as_text_and_json(tmp_path):
    done = program(*SMALL, "--topology=v5e:2x4", f"--json={tmp_path}/plan.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    best = found["meshes"][0]
    assert best["fits"] and best["memory"] == sum(
        best[k] for k in ("weights", "optimizer", "batch", "gradients", "activations")
    )
    assert "take --config.train.mesh=" + parallel.mesh_name(tuple(best["mesh"].values())) in done.stdout
    assert "projection" in done.stdout
    assert len(found["meshes"]) == 4 and not found["refused"]


def test_what_does_not_fit_is_said(tmp_path):
    done = program(*SMALL, "--devices=8", "--chip=h100", "--meshes=8,1,1", "--config.train.batch_size=1048576")
    assert done.returncode == 0 and "does not fit" in done.stdout and "nothing fits" in done.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--topology=v5e:3x3"], "--topology=v5e:3x3 is not known; known: v5e:2x2, v5e:2x4"),
        (["--topology=v9:2x2"], "--topology=v9:2x2 is not known; known: v4:2x2x1"),
        ([], "plan needs one of --topology=v5e:16x16 and --devices=8"),
        (["--topology=v5e:2x4", "--devices=8"], "plan needs one of"),
        (["--devices=8", "--meshes=3,1,1"], "does not use the 8 devices"),
        (["--devices=8", "--meshes=1,1,8"], "model.heads=4 is not divisible by tensor=8"),
        (["--devices=8", "--chip=a10"], "chip"),
    ],
)
def test_misuse(flags, words):
    done = program(*SMALL, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_that_is_shipped_is_valid(path):
    config = load_config(str(path))
    configs.validate(config)
    assert "\nCommand:" in path.read_text().split('"""')[1]


# Against the TPU compiler: python -m pytest -m plan (half an hour, and needs the extra tpu-plan).


@pytest.mark.plan
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "flags",
    [
        [
            "--config=gpt2_124m",
            "--topology=v5e:2x4",
            "--meshes=8,1,1",
            "--config.train.batch_size=8",
            "--config.train.accumulate=1",
        ],
        ["--config=llama_8b", "--topology=v5e:16x16"],
        ["--config=llama_70b", "--topology=v5p:4x8x8"],
        pytest.param(
            ["--config=mixtral_8x7b", "--topology=v5e:16x16"],
            marks=pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="libtpu 0.0.42 has a fault here"),
        ),
    ],
    ids=["124M", "8B", "70B", "8x7B"],
)
def test_the_compilers_memory(tmp_path, flags):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan", *flags, f"--json={tmp_path}/plan.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    best = found["meshes"][0]
    assert abs(best["memory"] / best["compiler"]["live"] - 1) < 0.1
    assert best["compiler"]["reserved"] < 0.9 * found["chip"]["memory"]
