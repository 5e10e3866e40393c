"""What is measured: a training step or decoding by nanoflax, by PyTorch, and the machine's limits.

A side is (facts about it as a dict for JSON, a function that runs one round).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import nanoflax
from nanoflax import nn, parallel, runs, train
from nanoflax.config import Config, ModelConfig, OptimConfig, TrainConfig, preset

Side = tuple[dict[str, Any], Callable[[], dict[str, float] | None]]
PROMPT_TOKENS = 16  # before the new tokens of decoding
SHAPES = {  # layers, dim, heads, length T, vocabulary V, batch B
    "small": (6, 384, 6, 256, 256, 16),
    "vocabulary": (4, 256, 4, 128, 8192, 32),
    "gpt2": (12, 768, 12, 1024, 50257, 8),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A round of the benchmark."""

    kind: str  # train or decode
    shape: str = "small"  # a key of SHAPES, for train
    batch_size: int = 0  # rows; 0: that of the shape, or 1 for decode
    steps: int = 3  # training steps in a round
    new_tokens: int = 64  # tokens that decoding generates in a round

    @property
    def sizes(self) -> tuple[int, ...]:
        """layers, dim, heads, T, V, B of a training step."""
        *sizes, B = SHAPES[self.shape]
        return (*sizes, self.batch_size or B)


def nanoflax_side(job: Job) -> Side:
    """nanoflax on JAX's default device, or for training on all of them."""
    runs.setup_jax()
    device = jax.devices()[0]
    facts, run = (_nanoflax_train if job.kind == "train" else _nanoflax_decode)(job, device)
    run()  # compiles
    count = jax.device_count() if job.kind == "train" else 1
    return facts | {"device": f"{device.device_kind} x {count}", "cpu": device.platform == "cpu"}, run


def prepare_step(model_config: ModelConfig, **options: Any) -> tuple[Any, Any, Any, Any, Callable]:
    """(model, mesh, state, batch, step function to compile) of random tokens. options: of TrainConfig."""
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    config = Config(model=model_config, optim=optim, train=TrainConfig(**options))
    mesh = parallel.make_mesh("-1,1,1")
    parallel.check_mesh(config, mesh)
    model = nanoflax.build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 1000)
    state = train.init_state(model, optimizer, config, mesh)
    B, T = config.train.batch_size, model_config.context
    targets = np.random.default_rng(0).integers(0, model_config.vocab_size, (B, T), np.int32)
    batch = {"targets": targets, "first": np.zeros(B, np.int32), "weights": np.ones((B, T), np.float32)}
    return model, mesh, state, parallel.put_batch(batch, mesh), train.make_train_step(model, optimizer, config)


def _nanoflax_train(job: Job, device: Any) -> Side:
    layers, dim, heads, T, V, B = job.sizes
    config = ModelConfig(vocab_size=V, context=T, layers=layers, dim=dim, heads=heads)
    model, mesh, state, batch, step = prepare_step(config, batch_size=B)
    step = train.compile_step(step, state, batch, mesh)

    def run():
        nonlocal state
        for _ in range(job.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    tokens = job.steps * B * T
    peak = parallel.peak_flops(device)
    return {
        "what": f"GPT-2 with L={layers} D={dim} T={T} V={V} B={B}, {model.compute_dtype}, AdamW, clipping",
        "tokens": tokens,
        "work": tokens * nn.flops_per_token(config),
        "limit": "flops",
        "peak": peak and peak * mesh.size,
        "formula": "6 FLOPs per weight of a product and token, 12 L H K T for attention",
    }, run


def _nanoflax_decode(job: Job, device: Any) -> Side:
    B, config = job.batch_size or 1, preset("gpt2")
    model = nanoflax.build(config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (B, PROMPT_TOKENS)).tolist()
    size = sum(p.size for p in jax.tree.leaves(params)) - config.context * config.dim
    return {
        "what": f"GPT-2 124M, greedy, B={B}, {PROMPT_TOKENS} + {job.new_tokens} tokens, {model.compute_dtype}",
        "tokens": B * job.new_tokens,
        "work": size * model.compute_dtype.itemsize * job.new_tokens,
        "limit": "bytes",
        "peak": parallel.memory_bandwidth(device),
        "formula": "every weight but the position table read once for each token of a row",
    }, lambda: nanoflax.sample(model, params, prompts, job.new_tokens, temperature=0) and None


def torch_side(job: Job) -> Side:
    """Transformers' GPT-2 in PyTorch, on CPU."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    if job.kind == "decode":
        model = GPT2LMHeadModel(GPT2Config()).eval()
        prompts = torch.randint(0, 50257, (job.batch_size or 1, PROMPT_TOKENS))
        lengths = {"max_new_tokens": job.new_tokens, "min_new_tokens": job.new_tokens}

        def run():
            with torch.no_grad():
                mask = torch.ones_like(prompts)
                model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    else:
        layers, dim, heads, T, V, B = job.sizes
        off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        config = GPT2Config(vocab_size=V, n_positions=T, n_layer=layers, n_embd=dim, n_head=heads, **off)
        model = GPT2LMHeadModel(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(0, V, (B, T))

        def run():
            for _ in range(job.steps):
                optimizer.zero_grad()
                model(tokens, labels=tokens, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

    run()
    return {}, run


def machine_side(job: Job) -> Side:
    """The machine's limits, measured in each round: FLOP/s of a matrix product, or bytes/s of reading."""

    def run():
        if job.kind == "train":
            return {"flops": parallel.measure_peak_flops(2048, 0.5)}
        return {"bytes": parallel.measure_bandwidth()}

    run()
    return {}, run


def compile_times(layers: int) -> None:
    """Print the seconds until a training step of many small layers can run, with and without scan_layers."""
    config = ModelConfig(vocab_size=256, context=64, layers=layers, dim=64, heads=4)
    print(f"compile: a step of {layers} blocks, traced, lowered and compiled", flush=True)
    seconds = []
    for name, scan in (("scan_layers", True), ("loop", False)):
        _, mesh, state, batch, step = prepare_step(config, batch_size=8, scan_layers=scan)
        begin = time.perf_counter()
        step = train.compile_step(step, state, batch, mesh)
        seconds.append(time.perf_counter() - begin)
        state, _ = step(state, batch)
        loss = float(step(state, batch)[1]["loss"])
        print(f"  {name:12}{seconds[-1]:8.2f} s; loss of the second step {loss:.6f}", flush=True)
    print(f"  scan_layers is {seconds[1] / seconds[0]:.1f} times as fast")
