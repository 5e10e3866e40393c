"""What is measured: a training step, decoding or encoding by nanoflax, and the machine's limits.

A side is (facts about it as a dict for JSON, a function that runs one round). The sides of PyTorch are in
torch_sides.py.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import nanoflax
from nanoflax import parallel, peft, planning, runs, train
from nanoflax.config import Config, ModelConfig, OptimConfig, TrainConfig, preset

Side = tuple[dict[str, Any], Callable[[], dict[str, float] | None]]
PROMPT_TOKENS = 16  # before the new tokens of decoding
ENCODED_TOKENS = 128  # T of a text that is encoded
SHAPES = {  # layers, dim, heads, length T, vocabulary V, batch B
    "small": (6, 384, 6, 256, 256, 16),
    "vocabulary": (4, 256, 4, 128, 8192, 32),
    "chats": (4, 256, 4, 512, 2048, 8),  # of `packing`
    "gpt2": (12, 768, 12, 1024, 50257, 8),
    "tiny": (2, 64, 2, 64, 256, 4),  # to try the program; also a tiny model of decode and encode
}
USED_MEMORY = 0.8  # of an accelerator, by the plan's estimate, when the batch is chosen by memory


@dataclasses.dataclass(frozen=True)
class Job:
    """A round of the benchmark."""

    kind: str  # train, decode or encode
    shape: str = "small"  # a key of SHAPES
    batch_size: int = 0  # rows; 0: that of the shape, 1 for decode, 8 for encode
    steps: int = 3  # training steps or batches to encode in a round
    new_tokens: int = 64  # tokens that decoding generates in a round
    bias: bool = True  # biases in every Linear and norm, for train
    quantize: str = ""  # int8 or int4: kind of the matrices of nanoflax, for decode
    alone: bool = False  # without PyTorch; then an accelerator's memory decides the rows of gpt2

    @property
    def sizes(self) -> tuple[int, ...]:
        """layers, dim, heads, T, V, B of a training step."""
        *sizes, B = SHAPES[self.shape]
        return (*sizes, self.batch_size or B)

    @property
    def decoder(self) -> ModelConfig:
        """The model of `train`, `decode` and `serve`."""
        layers, dim, heads, T, V, _ = self.sizes
        if self.kind in ("decode", "serve") and self.shape != "tiny":
            return preset("gpt2")
        return ModelConfig(vocab_size=V, context=T, layers=layers, dim=dim, heads=heads, bias=self.bias)

    @property
    def encoder(self) -> ModelConfig:
        """The model of `encode`: BERT-base (Devlin et al. 2018) without its pooler."""
        layers, dim, heads = (2, 64, 2) if self.shape == "tiny" else (12, 768, 12)
        return ModelConfig(
            architecture="encoder", head="none", vocab_size=30522, context=512, layers=layers, dim=dim, heads=heads,
            activation="gelu", norm_place="post", norm_eps=1e-12, embed_norm=True, token_types=2)  # fmt: skip


def nanoflax_side(job: Job) -> Side:
    """nanoflax on JAX's default device, or for training on all of them."""
    runs.setup_jax(trains=job.kind == "train")
    device = jax.devices()[0]
    facts, run = {"train": _train, "decode": _decode, "encode": _encode}[job.kind](job, device)
    begin = time.perf_counter()
    run()
    count = jax.device_count() if job.kind == "train" else 1
    facts |= {"device": f"{device.device_kind} x {count}", "cpu": device.platform == "cpu"}
    facts["first_round_seconds"] = time.perf_counter() - begin
    facts["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")  # of the whole process
    return facts, run


def prepare_step(model_config: ModelConfig, **options: Any) -> tuple[Any, Any, Any, Any, Callable]:
    """(model, mesh, state, batch, step function to compile) of random tokens. options: of TrainConfig."""
    config = training_config(model_config, **options)
    mesh = parallel.make_mesh(config.train.mesh)
    parallel.check_mesh(config, mesh)
    model = nanoflax.build(config.model)
    optimizer, _ = train.make_optimizer(config.optim, 1000)
    state = train.init_state(model, optimizer, config, mesh)
    B, T = config.train.batch_size, model_config.context
    targets = np.random.default_rng(0).integers(0, model_config.vocab_size, (B, T), np.int32)
    batch = {"targets": targets, "first": np.zeros(B, np.int32), "weights": np.ones((B, T), np.float32)}
    return model, mesh, state, parallel.put_batch(batch, mesh), train.make_train_step(model, optimizer, config)


def training_config(model: ModelConfig, **options: Any) -> Config:
    """The Config of a training step. options: of TrainConfig."""
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    return Config(model=model, optim=optim, train=TrainConfig(mesh="-1,1,1", **options))


def planned_bytes(config: ModelConfig, batch_size: int) -> int:
    """Bytes of one device that a training step needs, by the estimate of experiments.plan."""
    config = dataclasses.replace(config, dtype=nanoflax.build(config).compute_dtype.name)
    return planning.make_plan(training_config(config, batch_size=batch_size), parallel.make_mesh("-1,1,1")).memory


def batch_that_fits(config: ModelConfig, device: Any) -> int:
    """The largest batch size, a power of two up to 256 for each device, whose plan fits the device's memory."""
    limit = device.memory_stats()["bytes_limit"] * USED_MEMORY
    sizes = [2**n * jax.device_count() for n in range(8, -1, -1)]
    return next((B for B in sizes if planned_bytes(config, B) <= limit), sizes[-1])


def _train(job: Job, device: Any) -> Side:
    B, by_memory = job.sizes[-1], job.shape == "gpt2" and job.alone and not job.batch_size and device.memory_stats()
    if by_memory:
        B = batch_that_fits(job.decoder, device)
    while True:
        try:
            facts, run = _train_batch(job, device, B)
            run()
            return facts, run
        except jax.errors.JaxRuntimeError as error:
            if not by_memory or B == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"B={B} does not fit; trying half of it", file=sys.stderr, flush=True)
            B //= 2


def _train_batch(job: Job, device: Any, B: int) -> Side:
    c = job.decoder
    model, mesh, state, batch, step = prepare_step(c, batch_size=B)
    begin = time.perf_counter()
    step = train.compile_step(step, state, batch, mesh)
    seconds, memory = time.perf_counter() - begin, step.memory_analysis()

    def run():
        nonlocal state
        for _ in range(job.steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    tokens, peak = job.steps * B * c.context, parallel.peak_flops(device)
    facts = {
        "what": f"GPT-2 with L={c.layers} D={c.dim} T={c.context} V={c.vocab_size} B={B}, {model.compute_dtype}, "
        f"{'' if job.bias else 'no biases, '}AdamW, clipping",
        "tokens": tokens,
        "work": tokens * planning.flops_per_token(c),
        "limit": "flops",
        "peak": peak and peak * mesh.size,
        "formula": "6 FLOPs per weight of a product and token, 12 L H K T for attention, not halved for the mask",
        "compile_seconds": seconds,
        "planned_bytes": planned_bytes(c, B),
    }
    if memory is not None:
        written = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state is written in place
        facts["compiler_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes + written
    return facts, run


def _decode(job: Job, device: Any) -> Side:
    B, config = job.batch_size or 1, job.decoder
    model = nanoflax.build(config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    new = min(job.new_tokens, config.context - PROMPT_TOKENS)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (B, PROMPT_TOKENS)).tolist()
    itemsize = model.compute_dtype.itemsize
    nbytes = sum(p.size * itemsize for p in jax.tree.leaves(params))
    if job.quantize:
        params = peft.quantize_params(params, job.quantize)
        nbytes = sum(p.nbytes for p in jax.tree.leaves(params))
    nbytes -= config.context * config.dim * itemsize  # the position table
    cached = sum(range(PROMPT_TOKENS, PROMPT_TOKENS + new)) * B  # tokens whose keys and values are read

    def run():
        nanoflax.sample(model, params, prompts, new, temperature=0)

    weight_bytes, cache_bytes = nbytes * new, cached * 2 * config.layers * config.G * config.K * itemsize
    return {
        "what": f"GPT-2 with L={config.layers} D={config.dim}, greedy, B={B}, {PROMPT_TOKENS} + {new} tokens, "
        f"{model.compute_dtype}{job.quantize and f', weights {job.quantize}'}",
        "tokens": B * new,
        "work": weight_bytes + cache_bytes,
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "limit": "bytes",
        "peak": parallel.memory_bandwidth(device),
        "formula": "for each token of a row: every weight but the position table, read once for all rows "
        f"({weight_bytes / 1e9:.3g} GB a round), and the keys and values of all tokens before it "
        f"({cache_bytes / 1e9:.3g} GB)",
    }, run


def _encode(job: Job, device: Any) -> Side:
    B, T, config = job.batch_size or 8, ENCODED_TOKENS, job.encoder
    model = nanoflax.build(config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda p: p.astype(model.compute_dtype) if p.ndim > 1 else p, params)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, T), np.int32)
    options = parallel.compiler_options(device.platform)
    forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens), compiler_options=options)

    def run():
        for _ in range(job.steps):
            states = forward(params, tokens)
        jax.block_until_ready(states)

    return {
        "what": f"BERT with L={config.layers} D={config.dim}, forward, {B}x{T} tokens, {model.compute_dtype}",
        "tokens": job.steps * B * T,
        "work": job.steps * B * T * planning.flops_per_token(config, T) // 3,
        "limit": "flops",
        "peak": parallel.peak_flops(device),
        "formula": "2 FLOPs per weight of a product and token, 4 L H K T for attention",
    }, run


def machine_side(job: Job) -> Side:
    """The machine's limits, measured in each round: FLOP/s of a matrix product, or bytes/s of reading."""

    def run():
        if job.kind == "decode":
            return {"bytes": parallel.measure_bandwidth()}
        return {"flops": parallel.measure_peak_flops(2048, 0.5)}

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
