"""Every architecture on every kind of mesh: the numbers of one device, and only the traffic that the
axes of the mesh account for."""

import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import objectives, peft, sharding
from nanoflax.config import ModelConfig, PeftConfig
from nanoflax.models import build

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHILD = """
import importlib, json, sys
module = importlib.import_module("tests." + sys.argv[1])
print(json.dumps(getattr(module, sys.argv[2])(*sys.argv[3:])))
"""


def run_child(*arguments, file="mesh_test"):
    """What a function of a test file gives in a process of eight devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"  # of code that runs once
    done = subprocess.run([sys.executable, "-c", CHILD, file, *arguments], cwd=ROOT, text=True,
                          timeout=900, capture_output=True, env=os.environ | {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


B, T, V = 8, 16, 520
MESHES = ("8,1,1", "1,8,1", "2,2,2", "1,2,2,2")


def model_of(**changes):
    return ModelConfig(**dict(vocab_size=V, context=T, layers=1, dim=24, heads=4, kv_heads=2,
                              head_dim=6, mlp_dim=56, positions="rotary", tied=False) | changes)


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
        batch |= {"tokens": ids(B, T), "padding_mask": real, "targets": ids(B, T),
                  "tags": ids(B, T) % 3}
        if name == "classify":
            batch |= {"label": ids(B) % 2, "weights": np.ones(B, np.float32)}
        return batch
    batch |= {"targets": ids(B, T)}
    if name in ("encoder_decoder", "lstm"):
        return batch | {"source": ids(B, T), "source_mask": real}
    batch["first"] = ids(B)
    if name == "packed":
        batch |= {"segments": np.sort(rng.integers(1, 4, (B, T)), 1).astype(np.int32),
                  "start": ids(B)}
    return batch


def objective_of(name):
    return {"mlm": objectives.masked_lm, "classify": objectives.classify, "tag": objectives.tag,
            "encoder_decoder": objectives.seq2seq, "lstm": objectives.seq2seq}.get(
                name, objectives.causal_lm)


def prepared(case):
    """(a function of parameters and a batch to loss and gradients, parameters, batch) of a case."""
    name = "decoder" if case in ADAPTERS else case
    model = build(MODELS[name])
    params = sharding.init(model, jax.random.PRNGKey(0))
    if case in ADAPTERS:
        params = peft.add(params, PeftConfig(kind=case, rank=3, target_rank=2, bottleneck=5,
                                             virtual_tokens=3), jax.random.PRNGKey(1))
    # Larger than it begins, so that every part has its share in the loss; and no zeros.
    paths, rng = jax.tree_util.tree_leaves_with_path(params), np.random.default_rng(2)
    params = jax.tree.unflatten(jax.tree.structure(params), [
        x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for _, x in paths])

    def loss(params, batch):
        total, _, weight = objective_of(name)(model, params, batch, chunks=2)
        return total / weight

    return jax.value_and_grad(loss), params, batch_of(name)


def on_meshes(*cases):
    """Of each case and mesh: the largest difference to one device, relative to the largest number
    of its leaf, and the collectives of the compiled step."""
    out = {}
    for case in cases:
        step, params, batch = prepared(case)
        whole = jax.device_get(jax.jit(step)(params, batch))
        for shape in MESHES:
            mesh = sharding.make_mesh(shape)
            if case == "lstm" and mesh.shape["context"] > 1:
                continue
            places = sharding.shardings(params, mesh)
            there = jax.device_put(params, places)
            compiled = jax.jit(sharding.traced_on(mesh, step),
                               out_shardings=(None, places)).lower(
                there, sharding.put_batch(batch, mesh)).compile()
            found = jax.device_get(compiled(there, sharding.put_batch(batch, mesh)))
            errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(1, np.abs(b).max())),
                                  found, whole)
            out[f"{case} {shape}"] = {
                "loss": float(whole[0]), "error": max(jax.tree.leaves(errors)),
                "least gradient": min(float(np.abs(g).max()) for g in jax.tree.leaves(whole[1])),
                "collectives": collectives(compiled.as_text(), mesh, params)}
    return out


def collectives(hlo, mesh, params):
    """[kind, the axes along which it joins devices, shapes of its results] of each collective."""
    ids, out = np.arange(8).reshape(tuple(mesh.shape.values())), []
    for line in hlo.splitlines():
        m = re.match(r"\s*(?:ROOT )?\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|"
                     r"collective-permute)(?:-start)?\(", line)
        if not m:
            continue
        shapes = [[int(n) for n in s.split(",") if n]
                  for s in re.findall(r"\w+\[([\d,]*)\]", m[1])]
        if m[2] == "collective-permute":
            together = groups(re.search(r"source_target_pairs=(\{\{.*?\}\})", line)[1])
        else:
            together = groups(re.search(
                r"replica_groups=(\{\{.*?\}\}|\[.*?\]<=\[.*?\](?:T\(.*?\))?|mesh.*?\{.*?\})",
                line)[1])
        places = [[np.argwhere(ids == i)[0] for i in group] for group in together]
        axes = [axis for i, axis in enumerate(sharding.AXES)
                if any(len({place[i] for place in group}) > 1 for group in places)]
        name = re.search(r'op_name="([^"]*)"', line)
        out.append([m[2], axes, shapes, name[1] if name else ""])
    return out


def groups(text):
    """The groups of HLO's replica_groups: {{0,1},{2,3}} or [4,2]<=[4,2]T(1,0), devices cut into
    rows, or mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, those along axes."""
    if text.startswith("{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    iota = re.search(r"(?:<=|\()\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    numbers = lambda found: [int(n) for n in found.split(",")]  # noqa: E731
    ids = np.arange(8)
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
