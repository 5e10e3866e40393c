"""Every architecture on every kind of mesh: the numbers of one device, and only the traffic that the
axes of the mesh account for."""

import json
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanoflax import generate, parallel, peft, train
from nanoflax.config import PEFT_KINDS, ModelConfig, as_kind
from nanoflax.nn import build
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = """
import importlib, json, sys
module = importlib.import_module("tests." + sys.argv[1])
print(json.dumps(getattr(module, sys.argv[2])(*sys.argv[3:])))
"""


def run_child(*arguments, file="parallel.mesh_test"):
    """What a function of a test file gives in a process of eight devices."""
    done = processes.run(["-c", CHILD, file, *arguments], env=processes.quick(devices=8), timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


B, T, V = 8, 16, 520
MESHES = ("8,1,1", "1,8,1", "2,2,2", "1,2,2,2")


def model_of(**changes):
    # Sizes such that no half of a matrix has the shape of another.
    return ModelConfig(
        **dict(
            vocab_size=V,
            context=T,
            layers=1,
            dim=24,
            heads=6,
            kv_heads=2,
            head_dim=10,
            mlp_dim=56,
            positions="rotary",
            tied=False,
        )
        | changes
    )


ENCODER = dict(architecture="encoder", positions="learned")
MODELS = {
    "decoder": model_of(window=5, norm_place="sandwich"),
    "packed": model_of(positions="learned", tied=True, gated=True),
    "mlm": model_of(head="mlm", tied=True, head_bias=True, **ENCODER),
    "classify": model_of(head="classify", token_types=2, **ENCODER),
    "tag": model_of(head="tag", labels=3, **ENCODER),
    "encoder_decoder": model_of(architecture="encoder_decoder", positions="relative"),
    "lstm": model_of(architecture="lstm", dim=32),
}
ADAPTERS = ("lora", "adalora", "houlsby", "prefix")


def batch_of(name):
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(0, V, shape).astype(np.int32)  # noqa: E731
    real = np.arange(T) < rng.integers(1, T + 1, (B, 1))
    batch = {"weights": (rng.random((B, T)) < 0.7).astype(np.float32)}
    if name in ("mlm", "classify", "tag"):
        batch |= {"tokens": ids(B, T), "padding_mask": real, "targets": ids(B, T), "tags": ids(B, T) % 3}
        if name == "classify":
            batch |= {"label": ids(B) % 2, "weights": np.ones(B, np.float32)}
        return batch
    batch |= {"targets": ids(B, T)}
    if name in ("encoder_decoder", "lstm"):
        return batch | {"source": ids(B, T), "source_mask": real}
    batch["first"] = ids(B)
    if name == "packed":
        batch |= {"segments": np.sort(rng.integers(1, 4, (B, T)), 1).astype(np.int32), "start": ids(B)}
    return batch


def objective_of(name):
    return {
        "mlm": train.masked_lm,
        "classify": train.classify,
        "tag": train.tag,
        "encoder_decoder": train.seq2seq,
        "lstm": train.seq2seq,
    }.get(name, train.causal_lm)


def prepared(case):
    """(a function of parameters and a batch to loss and gradients, parameters, batch) of a case."""
    name = "decoder" if case in ADAPTERS else case
    model = build(MODELS[name])
    params = parallel.init(model, jax.random.PRNGKey(0))
    if case in ADAPTERS:
        params = peft.add(
            params,
            as_kind(PEFT_KINDS[case], SimpleNamespace(rank=3, target_rank=2, bottleneck=5, virtual_tokens=3)),
            jax.random.PRNGKey(1),
        )
    # Larger than it begins, so that every part has its share in the loss; and no zeros.
    paths, rng = jax.tree_util.tree_leaves_with_path(params), np.random.default_rng(2)
    params = jax.tree.unflatten(
        jax.tree.structure(params), [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for _, x in paths]
    )

    def loss(params, batch):
        sums = objective_of(name)(model, params, batch, chunks=2)
        return sums.objective / sums.weight

    return jax.value_and_grad(loss), params, batch_of(name)


def on_meshes():
    """Of each case and mesh: the loss, the largest difference to one device, and the collectives of
    the compiled step; whether any gathers a parameter that tensor splits."""
    out = {}
    for case in (*MODELS, *ADAPTERS):
        step, params, batch = prepared(case)
        whole = jax.device_get(jax.jit(step)(params, batch))
        for shape in MESHES[:-1] if case == "lstm" else MESHES:
            mesh = parallel.make_mesh(shape)
            places = parallel.shardings(params, mesh)
            arguments = jax.device_put(params, places), parallel.put_batch(batch, mesh)
            compiled = jax.jit(parallel.with_mesh(mesh, step), out_shardings=(None, places)).lower(*arguments).compile()
            found = jax.device_get(compiled(*arguments))
            moved = collectives(compiled.as_text(), mesh)
            split = [
                sorted(x.shape)
                for x, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
                if "tensor" in jax.tree.leaves(tuple(place.spec)) and x.ndim > 1
            ]
            out[f"{case} {shape}"] = {
                "loss": float(whole[0]),
                "error": difference(found, whole),
                "gradient": max(float(np.abs(g).max()) for g in jax.tree.leaves(whole[1])),
                # What XLA does with a few ids or an adapter's small matrices is its own affair.
                "kinds": sorted({kind for kind, _, shapes in moved if sum(map(math.prod, shapes)) > LITTLE}),
                "axes": sorted({axis for _, axes, _ in moved for axis in axes}),
                "gathered whole": [
                    shapes
                    for kind, _, shapes in moved
                    if kind == "all-gather"
                    and mesh.shape["tensor"] > 1
                    and any(sorted(n for n in shape if n > 1) in split for shape in shapes)
                ],
            }
    return out


def difference(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


LITTLE = 2 * B * T
# On the CPU a reduce-scatter is an all-reduce of which a part is kept.
KINDS = {
    "8,1,1": {"all-reduce"},  # of gradients
    # Parameters, gathered by fsdp; the embedding's rows, exchanged by it.
    "1,8,1": {"all-reduce", "all-gather", "all-to-all"},
    "2,2,2": {"all-reduce", "all-gather", "all-to-all"},  # also sums over heads and F
    "1,2,2,2": {"all-reduce", "all-gather", "all-to-all"},  # also keys and values, gathered
}
AXES = {
    "8,1,1": {"data"},
    "1,8,1": {"fsdp"},
    "2,2,2": {"data", "fsdp", "tensor"},
    "1,2,2,2": {"fsdp", "tensor", "context"},
}
# Where only fsdp splits a matrix, XLA may bring a part to it by way of another axis.
DETOURS = {"lstm 2,2,2": {"collective-permute"}}


@pytest.fixture(scope="module")
def found():
    return run_child("on_meshes")


CASES = [f"{case} {mesh}" for case in (*MODELS, *ADAPTERS) for mesh in MESHES if (case, mesh) != ("lstm", MESHES[-1])]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(found, case):
    assert found[case]["error"] < 1e-5
    assert found[case]["loss"] > 0.1 and found[case]["gradient"] > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_step_moves_what_its_mesh_accounts_for(found, case):
    mesh = case.split()[1]
    assert set(found[case]["kinds"]) == KINDS[mesh] | DETOURS.get(case, set())
    assert set(found[case]["axes"]) == AXES[mesh]
    assert found[case]["gathered whole"] == []


def collectives(hlo, mesh, count=8):
    """(kind, the axes along which it joins devices, shapes of its results) of each collective."""
    ids, out = np.arange(count).reshape(tuple(mesh.shape.values())), []
    for line in hlo.splitlines():
        m = re.match(
            r"\s*(?:ROOT )?\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|"
            r"collective-permute)(?:-start)?\(",
            line,
        )
        if not m:
            continue
        shapes = [[int(n) for n in s.split(",") if n] for s in re.findall(r"\w+\[([\d,]*)\]", m[1])]
        if m[2] == "collective-permute":
            together = groups(re.search(r"source_target_pairs=(\{\{.*?\}\})", line)[1], count)
        else:
            together = groups(
                re.search(r"replica_groups=(\{\{.*?\}\}|\[.*?\]<=\[.*?\](?:T\(.*?\))?|mesh.*?\{.*?\})", line)[1], count
            )
        places = [[np.argwhere(ids == i)[0] for i in group] for group in together]
        axes = [
            axis
            for i, axis in enumerate(parallel.AXES)
            if any(len({place[i] for place in group}) > 1 for group in places)
        ]
        out.append((m[2], axes, shapes))
    return out


def groups(text, count=8):
    """The groups of HLO's replica_groups: {{0,1},{2,3}} or [4,2]<=[4,2]T(1,0), devices cut into
    rows, or mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, those along axes."""
    if text.startswith("{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    iota = re.search(r"(?:<=|\()\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    numbers = lambda found: [int(n) for n in found.split(",")]  # noqa: E731
    ids = np.arange(count)
    if iota:
        ids = ids.reshape(numbers(iota[1]))
        ids = ids.transpose(numbers(iota[2])) if iota[2] else ids
    if not text.startswith("mesh"):
        return ids.reshape(numbers(re.match(r"\[([\d,]+)\]", text)[1])).tolist()
    axes = re.findall(r"'(\w+)'=(\d+)", text)
    chosen = re.findall(r"'(\w+)'", re.search(r"\{(.*)\}", text)[1])
    ids = ids.reshape([int(n) for _, n in axes])
    for name in chosen:
        ids = np.moveaxis(ids, [n for n, _ in axes].index(name), -1)
    return ids.reshape(-1, math.prod(int(n) for name, n in axes if name in chosen)).tolist()


# Evaluation and decoding.


def evaluated():
    """What an evaluation and an Evaluator find on one device and on a mesh, and what they are split by."""
    from nanoflax import tasks, tokenizers, train
    from nanoflax.config import Config, MaskedLM, TrainConfig

    class Windows:
        def __len__(self):
            return 12

        def batch(self, indices):
            full = batch_of("packed")
            return {name: x[indices % B] for name, x in full.items()} | {
                "weights": full["weights"][indices % B] * (indices < 12)[:, None]
            }

    class Rows(SimpleNamespace):
        def __len__(self):
            return 8

    batch, out, ways = batch_of("mlm"), {}, []
    rows = Rows(
        rows=[{name: x[i] for name, x in batch.items()} for i in range(8)],
        examples=[None] * 8,
        with_noise=lambda draws: rows,
        batch=lambda indices, lengths: {name: x[indices] for name, x in batch.items()},
        lengths=lambda indices: None,
    )

    def objective(*arguments, **options):
        ways.append(parallel.batch_splits(B, T))
        return train.causal_lm(*arguments, **options)

    for shape in ("1,1,1", "1,2,2,2"):
        mesh = parallel.make_mesh(shape, jax.devices()[: 1 if shape == "1,1,1" else 8])
        config = Config(model=MODELS["packed"], train=TrainConfig(batch_size=B), task=MaskedLM())
        put = lambda params: jax.device_put(params, parallel.shardings(params, mesh))  # noqa: E731
        model, masked_model = build(MODELS["packed"]), build(MODELS["mlm"])
        evaluate = train.make_evaluation(model, config, mesh, objective)
        found = list(evaluate(put(parallel.init(model, jax.random.PRNGKey(0))), Windows()))
        evaluator = tasks.Evaluator(masked_model, config, tokenizers.load("bytes"), rows, mesh)
        params = put(jax.tree.map(lambda x: 6 * x, parallel.init(masked_model, jax.random.PRNGKey(0))))
        guesses = evaluator.guesses(params, parallel.put_batch(batch, mesh))
        out[shape] = {
            "sums": found + [float(x) for x in evaluator._sums(params, parallel.put_batch(batch, mesh)).values()],
            "guesses": np.asarray(guesses).tolist(),
        }
    return out | {"ways": ways}


def test_evaluation_is_split_and_finds_the_same():
    found = run_child("evaluated")
    one, mesh = found["1,1,1"], found["1,2,2,2"]
    np.testing.assert_allclose(mesh["sums"], one["sums"], rtol=1e-6)
    assert mesh["guesses"] == one["guesses"]
    assert len({t for row in one["guesses"] for t in row}) > 5
    assert found["ways"] == [[1, 1], [2, 2]]


def decoded():
    """Tokens of each architecture on one device and on a mesh, drawn and searched for."""
    from nanoflax import beam_search, sample

    mesh, out, prompts = parallel.make_mesh("2,2,2"), {}, [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    for name in ("packed", "encoder_decoder", "lstm"):
        model = build(MODELS[name])
        params = jax.tree.map(lambda x: 6 * x, parallel.init(model, jax.random.PRNGKey(0)))
        split = jax.device_put(params, parallel.shardings(params, mesh))

        def tokens(params):
            drawn = sample(model, params, prompts, 6, top_k=9, rng=jax.random.PRNGKey(3))
            streamed = list(generate.stream(model, params, prompts[:3], 6, temperature=0))
            return [drawn, streamed, beam_search(model, params, prompts[:2], 2, 6)]

        out[name] = [tokens(params), tokens(split)]
    zero = jax.device_put(np.float32(0), jax.NamedSharding(mesh, jax.P()))
    cache = jax.jit(
        parallel.with_mesh(
            mesh, lambda zero: jax.tree.map(lambda x: x + zero, build(MODELS["packed"]).empty_cache(8, 12)["layers"])
        )
    )(zero)
    out["cache"] = [x.addressable_shards[0].data.shape for x in jax.tree.leaves(cache)]
    return out


def test_decoding_on_a_mesh_gives_the_same_tokens():
    found = run_child("decoded")
    assert found.pop("cache") == [[2, 1, 12, 10]] * 2  # [8, 2, 12, 10] over data x fsdp and tensor
    for name, (one, mesh) in found.items():
        assert one == mesh and len({t for row in one[0] for t in row}) > 5, name
