"""Speed of nanoflax beside Transformers' PyTorch GPT-2 of the same shape, and beside the machine.

    python -m experiments.benchmark train --shape=small        # also --shape=vocabulary, gpt2
    python -m experiments.benchmark decode --batch_size=1      # GPT-2 124M, random weights
    python -m experiments.benchmark compile --layers=32        # train.scan_layers beside the loop

Each side lives in its own process and they take turns, round after round, so that a machine whose
speed drifts treats both alike: read the paired ratio, not the seconds. The limits are this
machine's own: a float32 matrix product, and reading memory. Without torch and transformers
(pip install nanoflax[test]) nanoflax runs alone, as on a GPU or TPU.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import flags

from experiments.flags import launch
from nanoflax import runs
from nanoflax.config import ModelConfig, preset
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
SHAPES = {  # layers, dim, heads, length T, vocabulary V, batch B
    "small": (6, 384, 6, 256, 256, 16),
    "vocabulary": (4, 256, 4, 128, 8192, 32),
    "gpt2": (12, 768, 12, 1024, 50257, 8),
}
flags.DEFINE_enum("shape", "small", list(SHAPES), "of the model that train runs")
flags.DEFINE_integer("batch_size", 0, "rows; 0 means the shape's, or 1 for decode", 0)
flags.DEFINE_integer("new_tokens", 64, "tokens that decode generates in a round", 1)
flags.DEFINE_integer("steps", 3, "training steps in a round", 1)
flags.DEFINE_integer("layers", 32, "of the model that compile compiles", 1)
flags.DEFINE_integer("rounds", 7, "turns that each side takes", 1)
flags.DEFINE_bool("alone", False, "leave PyTorch out")
flags.DEFINE_string("side", "", "(internal) the process of one side: nanoflax, torch or machine")

PROMPT = 16  # tokens before decode's new ones


def main():
    if len(FLAGS.arguments) != 1 or FLAGS.arguments[0] not in ("train", "decode", "compile"):
        raise UserError("benchmark needs one argument: train, decode or compile")
    (job,) = FLAGS.arguments
    if job == "compile":
        return compile_times()
    if FLAGS.side:
        return serve({"nanoflax": nanoflax_side, "torch": torch_side, "machine": machine_side}[FLAGS.side](job))
    names = ["nanoflax", "machine"] + ([] if FLAGS.alone or not has_torch() else ["torch"])
    sides = {
        name: subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark", *sys.argv[1:], f"--side={name}"],
            env=os.environ | ({} if name == "nanoflax" else {"JAX_PLATFORMS": "cpu"}),  # as they are
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    try:
        about = {name: ask(side) for name, side in sides.items()}  # ready, compiled and warm
        if not about["nanoflax"]["cpu"] and "torch" in names:  # PyTorch here is on the CPU
            names.remove("torch")
        results = {name: [] for name in names}
        for i in range(FLAGS.rounds):
            for name in names if i % 2 else reversed(names):
                results[name].append(ask(sides[name], "go"))
            print(
                f"round {i + 1}/{FLAGS.rounds}: "
                + "  ".join(f"{n} {results[n][-1]['seconds']:.3f} s" for n in names if n != "machine"),
                file=sys.stderr,
                flush=True,
            )
    finally:
        for side in sides.values():
            side.kill()
    summarise(job, about["nanoflax"], results)


def summarise(job, about, results):
    """Print medians, the paired ratio, and fractions of the machine's limits."""
    middle = lambda rounds, key="seconds": statistics.median(r[key] for r in rounds)
    print(f"{job}: {about['what']}, on {about['device']}")
    for name in ("nanoflax", "torch"):
        if name in results:
            seconds = middle(results[name])
            print(f"  {name:9} median {seconds:8.3f} s a round  {about['tokens'] / seconds:10,.0f} tokens/s")
    if "torch" in results:
        ratios = sorted(t["seconds"] / n["seconds"] for t, n in zip(results["torch"], results["nanoflax"]))
        print(
            f"  nanoflax is {statistics.median(ratios):.2f} times as fast (paired, "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )
    if not about["cpu"] and not about["peak"]:
        print("  the limit of this device is not known")
        return
    rates = [
        about["work"] / n["seconds"] / (about["peak"] or m[about["limit"]])
        for n, m in zip(results["nanoflax"], results["machine"])
    ]
    limit = {"flops": "matrix-product rate", "bytes": "memory bandwidth"}[about["limit"]]
    top = about["peak"] or middle(results["machine"], about["limit"])
    unit = {"flops": "GFLOP/s", "bytes": "GB/s"}[about["limit"]]
    print(
        f"  {about['work'] / middle(results['nanoflax']) / 1e9:,.1f} {unit}: "
        f"{statistics.median(rates):.0%} of the {'stated' if about['peak'] else 'measured'} "
        f"{limit}, {top / 1e9:,.1f} {unit}\n  ({about['formula']})"
    )


def ask(side, word=None):
    if word:
        side.stdin.write(word + "\n")
        side.stdin.flush()
    line = side.stdout.readline()
    if not line:
        raise UserError("a side of the benchmark ended early; its error stands above")
    return json.loads(line)


def serve(side):
    """Say what is measured, then run one round for each line read."""
    about, round_ = side
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = round_() or {}
        print(json.dumps({"seconds": time.perf_counter() - begin} | found), flush=True)


def has_torch():
    import importlib.util

    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def shape():
    layers, dim, heads, T, V, B = SHAPES[FLAGS.shape]
    return layers, dim, heads, T, V, FLAGS.batch_size or B


def nanoflax_side(job):
    import jax

    runs.setup_jax()
    device = jax.devices()[0]
    about, run = (nanoflax_train if job == "train" else nanoflax_decode)(device)
    run()
    count = jax.device_count() if job == "train" else 1
    return about | {"device": f"{device.device_kind} x {count}", "cpu": device.platform == "cpu"}, run


def prepared(model_config, **options):
    """What a training step is made of: (model, mesh, state, batch, the step to be compiled)."""
    import numpy as np

    import nanoflax
    from nanoflax import parallel, train
    from nanoflax.config import Config, OptimConfig, TrainConfig

    config = Config(
        model=model_config, optim=OptimConfig(schedule="constant", warmup_steps=0), train=TrainConfig(**options)
    )
    mesh = parallel.make_mesh("-1,1,1")
    parallel.check_mesh(config, mesh)
    model = nanoflax.build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 1000)
    state = train.init_state(model, optimizer, config, mesh)
    B, T = config.train.batch_size, model_config.context
    batch = parallel.put_batch(
        {
            "targets": np.random.default_rng(0).integers(0, model_config.vocab_size, (B, T), np.int32),
            "first": np.zeros(B, np.int32),
            "weights": np.ones((B, T), np.float32),
        },
        mesh,
    )
    return model, mesh, state, batch, train.make_train_step(model, optimizer, config)


def compile_times():
    """Seconds until a training step of many small layers can run, with and without scan_layers."""
    from nanoflax import train

    config = ModelConfig(vocab_size=256, context=64, layers=FLAGS.layers, dim=64, heads=4)
    print(f"compile: a step of {FLAGS.layers} blocks, traced, lowered and compiled", flush=True)
    seconds = []
    for name, scan in (("scan_layers", True), ("loop", False)):
        _, mesh, state, batch, step = prepared(config, batch_size=8, scan_layers=scan)
        begin = time.perf_counter()
        step = train.compile_step(step, state, batch, mesh)
        seconds.append(time.perf_counter() - begin)
        state, _ = step(state, batch)
        print(
            f"  {name:12}{seconds[-1]:8.2f} s; loss of the second step {float(step(state, batch)[1]['loss']):.6f}",
            flush=True,
        )
    print(f"  scan_layers is {seconds[1] / seconds[0]:.1f} times as fast")


def nanoflax_train(device):
    import jax

    from nanoflax import nn, parallel, train

    layers, dim, heads, T, V, B = shape()
    config = ModelConfig(vocab_size=V, context=T, layers=layers, dim=dim, heads=heads)
    model, mesh, state, batch, step = prepared(config, batch_size=B)
    step = train.compile_step(step, state, batch, mesh)

    def run():
        nonlocal state
        for _ in range(FLAGS.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    tokens = FLAGS.steps * B * T
    peak = parallel.peak_flops(device)
    return {
        "what": f"GPT-2 with L={layers} D={dim} T={T} V={V} B={B}, {model.compute_dtype}, AdamW, clipping",
        "tokens": tokens,
        "work": tokens * nn.flops_per_token(config),
        "limit": "flops",
        "peak": peak and peak * mesh.size,
        "formula": "6 FLOPs per weight of a product and token, 12 L H K T for attention",
    }, run


def nanoflax_decode(device):
    import jax
    import numpy as np

    import nanoflax
    from nanoflax import parallel

    B, config = FLAGS.batch_size or 1, preset("gpt2")
    model = nanoflax.build(config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (B, PROMPT)).tolist()
    size = sum(p.size for p in jax.tree.leaves(params)) - config.context * config.dim
    return {
        "what": f"GPT-2 124M, greedy, B={B}, {PROMPT} + {FLAGS.new_tokens} tokens, {model.compute_dtype}",
        "tokens": B * FLAGS.new_tokens,
        "work": size * model.compute_dtype.itemsize * FLAGS.new_tokens,
        "limit": "bytes",
        "peak": parallel.memory_bandwidth(device),
        "formula": "every weight but the position table read once for each token of a row",
    }, lambda: nanoflax.sample(model, params, prompts, FLAGS.new_tokens, temperature=0) and None


def torch_side(job):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    off = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    if job == "decode":
        model, B = GPT2LMHeadModel(GPT2Config()).eval(), FLAGS.batch_size or 1
        prompts = torch.randint(0, 50257, (B, PROMPT))

        def run():
            with torch.no_grad():
                model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=False,
                    max_new_tokens=FLAGS.new_tokens,
                    min_new_tokens=FLAGS.new_tokens,
                    pad_token_id=0,
                )
    else:
        layers, dim, heads, T, V, B = shape()
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=V, n_positions=T, n_layer=layers, n_embd=dim, n_head=heads, **off)
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(0, V, (B, T))

        def run():
            for _ in range(FLAGS.steps):
                optimizer.zero_grad()
                model(tokens, labels=tokens, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

    run()
    return {}, run


def machine_side(job):
    """The machine's limits, measured each round: FLOP/s of a product, bytes/s of reading."""
    from nanoflax import parallel

    def run():
        if job == "train":
            return {"flops": parallel.measure_peak_flops(2048, 0.5)}
        return {"bytes": parallel.measure_bandwidth()}

    run()
    return {}, run


if __name__ == "__main__":
    launch(main, arguments=True)
