"""A model whose parameters are split over several devices: everything is what one device computes."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import generate, kernels, nn
from nanoflax.config import Config, ExampleData, LanguageModel, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import opening
from nanoflax.serve.embeddings import Embedder
from tests import processes
from tests.generate.sampling_test import make
from tests.runs.adapter_test import LLAMA, write_base
from tests.serve.engine_test import FAMILIES, Reply, alone, mixed

SETTINGS = dict(max_new_tokens=20, temperature=1.0, top_k=0, seed=3)
QUESTIONS = [{"prompt": "the number", "candidates": [" returns", " of a function", "x"]}]


def computed(sources, mesh=""):
    """What the models compute, and the largest part of their parameters that a device has."""
    found = []
    for source, data in sources:
        run = nanoflax.open(source, mesh=mesh)
        texts = run.generate(["the", "a function", "x"], **SETTINGS)
        scores = [row["log_likelihood"] for row in run.rank(QUESTIONS)["rankings"][0]["candidates"]]
        leaves = jax.tree.leaves(run.params)
        device = leaves[0].sharding.mesh.devices.flat[0] if mesh else jax.devices()[0]
        held = sum(s.data.size for x in leaves for s in x.addressable_shards if s.device == device)
        found.append([texts, [*scores, run.evaluate(data)["bits_per_byte"]], held / sum(x.size for x in leaves)])
    return found


def in_a_process(call, *arguments, devices=4):
    code = f"import json; from tests.runs import open_mesh_test as t; print(json.dumps(t.{call}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=processes.ROOT, text=True, capture_output=True, env=processes.quick(devices)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A published model, a run of pretrain, a run of LoRA, its adapters, and a published model whose vocabulary no mesh
    divides, each with data."""
    root = tmp_path_factory.mktemp("open_mesh")
    (root / "a.txt").write_text("the function returns a number of words. " * 60)
    rows = [{"text": f"the number of them is {i}"} for i in range(12)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, examples = f"text:{root}/a.txt", f"jsonl:{root}/rows.jsonl"
    short = TrainConfig(steps=2, batch_size=4, evaluate_every=2, sample_tokens=0, tensorboard=False)
    published = write_base(root / "published", LLAMA)
    odd = write_base(root / "odd", dataclasses.replace(LLAMA, vocab_size=261))
    data = TextData(train=text, tokenizer="bytes", cache=str(root / "cache"), workers=1)
    model = ModelConfig(layers=2, dim=32, heads=4, context=48, positions="rotary", tied=True)
    nanoflax.pretrain(Config(model=model, data=data, train=short), str(root / "run"))
    tuned = Config(
        data=ExampleData(train=examples),
        optim=OptimConfig(warmup_steps=0, learning_rate=0.02),
        task=LanguageModel(length=48),
        train=short,
    )
    nanoflax.finetune(published, peft="lora", workdir=str(root / "lora"), config=tuned)
    return [
        (published, text), (str(root / "run"), text), (str(root / "lora"), examples),
        (str(root / "lora" / "adapter"), text), (odd, text),
    ]  # fmt: skip


def test_text_scores_and_losses_are_those_of_one_device(sources):
    found, wanted = in_a_process("computed", sources, "1,2,-1"), computed(sources)
    for (texts, numbers, held), (same, scores, all_), (source, _) in zip(found, wanted, sources, strict=True):
        assert texts == same, source
        np.testing.assert_allclose(numbers, scores, rtol=1e-5, err_msg=source)
        assert held < (0.6 if source.endswith("odd") else 0.3) and all_ == 1, source


def started(source):
    """Whether a training on a mesh starts from a model's parameters; the largest part of one on a device, when they are
    read."""
    mesh, found, parts = nanoflax.parallel.make_mesh("1,2,2"), opening.open_source(source), []
    model = nanoflax.build(nanoflax.parallel.pad_vocabulary(found.config, mesh))

    def load():
        params = found.load()
        parts.extend(x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(params) if x.ndim > 1)
        return params

    params, whole = opening.initialize_from(model, load, 0, mesh), jax.tree.map(np.asarray, found.load())
    assert jax.tree.map(lambda x: x.sharding, params) == nanoflax.parallel.shardings(params, mesh)
    config, params = nn.without_padding(model.config, params)
    assert config == found.config
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, params, whole))), max(parts)


def test_a_training_reads_only_a_part_of_its_source_on_each_device(sources):
    published, *_, odd = (source for source, _ in sources)
    assert in_a_process("started", published) == [True, 1 / 4]
    assert in_a_process("started", odd) == [True, 1 / 2]  # the table [261, D] is split along D alone


def served(mesh):
    """Whether an engine on the mesh gives the texts that `generate.sample` gives on one device, for each kind of model;
    the largest part of a cache on one device."""
    mesh, found = nanoflax.parallel.make_mesh(mesh), {}
    for family in ("recurrent", "latent experts", "windows, tied"):
        model, params = make(vocab_size=32, **FAMILIES[family])
        split = jax.device_put(params, nanoflax.parallel.shardings(params, mesh))
        with nanoflax.serve.Engine(model, split, None, slots=4) as engine:
            replies = [Reply(engine, **fields) for fields in mixed(8)]
            texts = [reply.ids() for reply in replies]
            keys = [x for x in jax.tree.leaves(engine._state.cache) if x.ndim == 5 and x.shape[2] > 1]
        held = [np.prod(x.addressable_shards[0].data.shape) / x.size for x in keys]
        found[family] = texts == alone(model, params, [reply.request for reply in replies]), max(held, default=0.0)
    return found


def test_the_engine_serves_on_several_devices():
    for family, (equal, held) in in_a_process("served", "2,1,2").items():
        assert equal and held <= 1 / 4, family


def traced():
    """The sizes of tensor for which attention chose its kernel, which XLA cannot split, in scores and in embeddings."""
    mesh, found = nanoflax.parallel.make_mesh("1,1,-1"), []
    choose = kernels.choose
    kernels.choose = lambda *call: found.append(nanoflax.parallel.axis_size("tensor")) or choose(*call)
    for fields in dict(layers=1), dict(layers=1, architecture="encoder", head="none"):
        model, params = make(vocab_size=32, **fields)
        split = jax.device_put(params, nanoflax.parallel.shardings(params, mesh))
        if model.config.is_causal:
            generate.log_likelihoods(model, split, [[1, 2]], [[3]])
        else:
            Embedder(model, split, None)([[1, 2]])
    return found


def test_scores_and_embeddings_are_compiled_for_the_mesh():
    assert in_a_process("traced") == [4, 4]


def test_other_meshes_are_refused_in_one_line(sources):
    for mesh, words in {"2,1,1": "mesh='2,1,1' needs 2 devices", "x": "mesh='x' must be three sizes"}.items():
        with pytest.raises(UserError, match=words):
            nanoflax.open(sources[0][0], mesh=mesh)
    done = processes.run(
        ["-m", "experiments.sample", f"--model={sources[0][0]}", "--mesh=3,1,1"], env=processes.quick(2)
    )
    assert done.returncode == 2 and "mesh='3,1,1' needs 3 devices, and 2 are present" in done.stderr
    assert chr(10) not in done.stderr.strip()
