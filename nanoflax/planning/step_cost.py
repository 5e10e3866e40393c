"""What a training step needs, before a machine is rented: bytes, FLOPs, traffic, time at best.

Weights and optimizer state are exact, from shapes and the table of `sharding`. Gradients and
activations are an estimate: what one chip's share of the model keeps when its gradient is traced,
with elementwise work fused into the products around it. Time is a roofline, a bound from below.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nanoflax import nn, parallel, train
from nanoflax.errors import UserError
from nanoflax.planning import peak_memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step of a Config on a mesh. All bytes are of one chip."""

    mesh: dict
    parameters: int  # of the model, over all chips
    weights: int  # bytes
    optimizer: int  # bytes of optimizer state, and of the moving average
    batch: int  # bytes
    gradients: int  # bytes
    activations: int  # bytes, at their most, with what a product needs beside them
    cache: int  # bytes of keys and values, were the batch sampled to its whole length
    flops_per_token: float
    tokens: int  # in a step, over all chips
    collectives: dict  # kind -> bytes that a chip receives in a step
    memory_traffic: float  # bytes read and written in a step, at least

    @property
    def memory(self):
        """Bytes that a step needs on a chip."""
        return self.weights + self.optimizer + self.batch + self.gradients + self.activations


class Roofline(NamedTuple):
    """The least time of a step, in seconds, by what bounds it."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self):
        return max(self)

    @property
    def bound(self):
        return self._fields[self.index(max(self))]


def make_plan(config, mesh):
    """The Plan of a Config on a mesh (an AbstractMesh will do). Computes and compiles nothing.

    Raises: UserError if the mesh does not divide the model or the batch.
    """
    parallel.check_mesh(config, mesh)
    model = nn.build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state = train.abstract_state(model, optimizer, config, mesh)
    batch = _batch(config)
    grads, most = gradient_bytes(config, mesh)
    weights, rest = map(parallel.bytes_per_device, (state.params, (state.opt_state, state.ema)))
    traffic = (
        2 * (weights + rest)  # the update reads and writes both
        + config.train.accumulate * (3 * _passes_bytes(config, mesh) + 2 * (most - grads))
    )
    return Plan(
        dict(mesh.shape),
        sum(x.size for x in jax.tree.leaves(state.params)),
        weights,
        rest,
        sum(
            math.prod(parallel.batch_sharding(mesh, x.ndim).shard_shape(x.shape)) * x.dtype.itemsize
            for x in batch.values()
        ),
        grads,
        most - grads,
        cache_bytes(config, mesh),
        nn.flops_per_token(config.model),
        config.train.batch_size * config.model.context,
        collectives(config, mesh, state.params),
        traffic,
    )


def roofline(plan, chip, remat="none"):
    """The Roofline of a Plan on a hardware.Chip. remat: blocks are computed a second time."""
    chips = math.prod(plan.mesh.values())
    again = 4 / 3 if remat == "blocks" else 1
    return Roofline(
        plan.flops_per_token * plan.tokens * again / chips / chip.flops,
        plan.memory_traffic / chip.bandwidth,
        sum(plan.collectives.values()) / chip.network,
    )


def projected_mfu(plan, chip, remat="none"):
    """The share of peak FLOP/s that a step taking no longer than its roofline would reach."""
    chips = math.prod(plan.mesh.values())
    return plan.flops_per_token * plan.tokens / chips / chip.flops / roofline(plan, chip, remat).seconds


def compile_for_topology(config, topology):
    """The compiler's own figures for the step on a TPU slice, in bytes of one chip.

    Needs libtpu and no TPU; takes minutes. Returns {arguments, temporary, code: bytes, reserved:
    the first two, live: the most of them in use at once}.
    Raises: UserError if the compiler finds the step too large, with its words.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = parallel.make_mesh(config.train.mesh, devices)
    model = nn.build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state, batch = train.abstract_state(model, optimizer, config, mesh), _batch(config)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.batch_sharding(mesh, x.ndim))
        for name, x in batch.items()
    }
    step = train.make_train_step(model, optimizer, config, _objective(config.model))
    try:
        found = train.compile_step(step, state, batch, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler refuses the step: {str(error)[:300]}") from error
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporary": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "live": found.peak_memory_in_bytes,
        "reserved": arguments + found.temp_size_in_bytes,
    }


THIN = 256  # a part of D below this is thin to the TPU compiler: 16 and 128 were seen to be, not 256


def candidate_meshes(count, dim):
    """Shapes worth a look for `count` devices: all of data or fsdp, as much of fsdp as leaves no
    thin parts, and tensor 2, 4 or 8."""
    shapes = [(count, 1, 1), (1, count, 1)]
    wide = math.gcd(count, max(1, dim // THIN))
    shapes += [(count // wide, wide, 1)]
    shapes += [(1, count // t, t) for t in (2, 4, 8) if count % t == 0 and count > t]
    return list(dict.fromkeys(shapes))


# One chip's share.


def config_per_chip(config, mesh):
    """The Config of what one chip computes in a micro-batch: a part of the rows, T, heads, F, V."""
    m, t, split = config.model, config.train, mesh.shape["tensor"]
    rows = t.batch_size // t.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
    if m.head == "lm" and not m.reads_source:  # the pieces that the whole micro-batch is cut into
        t = dataclasses.replace(
            t, loss_chunks=t.loss_chunks or nn.chunks_of(t.batch_size // t.accumulate, m.context, m.vocab_size)
        )
    m = dataclasses.replace(m, context=m.context // mesh.shape["context"])
    if m.has_blocks:
        m = dataclasses.replace(
            m,
            heads=m.heads // split,
            kv_heads=m.G // split,
            head_dim=m.K,
            mlp_dim=m.F // split,
            vocab_size=m.vocab_size // split,
        )
    return dataclasses.replace(config, model=m, train=dataclasses.replace(t, batch_size=rows, accumulate=1))


def _batch(config):
    """The shapes of a batch, by what the architecture learns from."""
    m, B, T = config.model, config.train.batch_size, config.model.context
    tokens, flags = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), bool)
    weights = jax.ShapeDtypeStruct((B, T), jnp.float32)
    if m.reads_source:
        return {"source": tokens, "source_mask": flags, "targets": tokens, "weights": weights}
    if m.head == "lm":
        return train.abstract_batch(config, parallel.abstract_mesh((1, 1, 1)))
    row = jax.ShapeDtypeStruct((B,), jnp.int32)
    batch = {"tokens": tokens, "padding_mask": flags}
    if m.head == "classify":
        return batch | {"label": row, "weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    if m.head in ("tag", "mlm"):
        return batch | {"tags" if m.head == "tag" else "targets": tokens, "weights": weights}
    raise UserError(
        f"model.head={m.head!r} has no training step to plan; decoders, "
        "encoder-decoders, and the heads classify, tag and mlm have"
    )


def _objective(m):
    if m.reads_source:
        return train.seq2seq
    return {"lm": train.causal_lm, "classify": train.classify, "tag": train.tag, "mlm": train.masked_lm}[m.head]


def _others_keys(config, mesh):
    """Bytes that a chip's share does not show: its queries meet the keys of all of context."""
    local, t = config_per_chip(config, mesh), config.train
    m, more = local.model, config.model.context - local.model.context
    attentions = m.layers + 2 * m.cross_layers
    numbers = m.heads * m.context + 2 * m.G * m.K  # for each key: its weights, and itself
    return (
        local.train.batch_size
        * more
        * numbers
        * nn.build(m).compute_dtype.itemsize
        * (1 if t.remat == "blocks" else attentions)
    )


@functools.cache  # meshes often have the same share
def _gradient(local, platform):
    """The jaxpr of the gradient of a share's loss, and the paths of its parameters."""
    model = nn.build(local.model, local.train.remat)
    objective = _objective(local.model)
    t, params = local.train, parallel.param_shapes(model)
    if t.scan_layers:
        params = parallel.stack(params)
    rng = jax.random.PRNGKey(0) if local.model.dropout else None

    def loss(params, batch):
        return objective(
            model, params, batch, rng, chunks=t.loss_chunks, z_loss=t.z_loss, label_smoothing=t.label_smoothing
        )[0]

    names = [train.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    with jax.sharding.use_abstract_mesh(parallel.abstract_mesh((1, 1, 1), platform)):
        return jax.make_jaxpr(jax.grad(loss))(params, _batch(local)).jaxpr, names


def gradient_bytes(config, mesh):
    """(bytes of the gradients on a chip, the most that gradients and activations take together)."""
    device = mesh.abstract_mesh.abstract_device if isinstance(mesh, jax.sharding.Mesh) else (mesh.abstract_device)
    # cuDNN's kernel cannot be traced without a GPU.
    platform = "tpu" if device is not None and device.platform == "tpu" else "cpu"
    traced, names = _gradient(config_per_chip(config, mesh), platform)
    specs = [parallel.partition_spec(name, v.aval.shape) for name, v in zip(names, traced.invars)]
    gathered = {v for v, spec in zip(traced.invars, specs) if "fsdp" in spec and mesh.shape["fsdp"] > 1}
    # Gradients that would be cut into thin parts the TPU compiler reduces whole, and keeps until the
    # update. The embeddings' are split by other means.
    thin = config.model.dim // mesh.shape["fsdp"] < THIN
    parts = [
        mesh.shape["fsdp"] if "fsdp" in spec and not (thin and "/block" in name) else 1
        for name, spec in zip(names, specs)
    ]
    grads, most = peak_memory.peak(traced, gathered, dict(zip(traced.outvars, parts)))
    most += _others_keys(config, mesh)
    # The compiler casts stacked kernels [L, D, F] before the loops, not a layer at a time in them.
    item = nn.build(config.model).compute_dtype.itemsize
    most += sum(
        v.aval.size * item // (mesh.shape["fsdp"] if "fsdp" in spec else 1)
        for name, v, spec in zip(names, traced.invars, specs)
        if parallel.STACKED.search(name) and v.aval.ndim == 3 and item < 4
    )
    if config.train.accumulate > 1:  # the sum so far, float32
        total = sum(math.prod(v.aval.shape) * 4 // n for v, n in zip(traced.invars, parts))
        return total, total + most
    return grads, most


def cache_bytes(config, mesh):
    """Bytes of the decode cache of a chip's rows at the whole context; 0 if nothing is decoded."""
    local, T = config_per_chip(config, mesh), config.model.context  # which context does not split
    if local.model.head != "lm":
        return 0
    model = nn.build(dataclasses.replace(local.model, context=T))
    B = local.train.batch_size * config.train.accumulate

    def caches(params):
        rows, lengths = jnp.zeros((B, T), jnp.int32), jnp.full(B, T)
        if local.model.reads_source:
            return model.prefill(params, rows, lengths, T)[1]
        return model.empty_cache(B, T)

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(caches, parallel.param_shapes(model))))


# Traffic.


def _passes_bytes(config, mesh):
    """Bytes of the weights of a chip's share in the compute dtype: read once in every pass."""
    model = nn.build(config_per_chip(config, mesh).model)
    return sum(x.size for x in jax.tree.leaves(parallel.param_shapes(model))) * model.compute_dtype.itemsize


def collectives(config, mesh, params):
    """Bytes that a chip receives in a step, by the kind of collective; kinds with none are absent.

    params: the shapes of the parameters. Over n chips an all-gather or reduce-scatter of s bytes
    brings each (n - 1) / n s, an all-reduce twice that, in rings (Chan et al. 2007).
    """
    m, t, sizes = config.model, config.train, mesh.shape
    data, fsdp, tensor, context = (sizes[axis] for axis in parallel.AXES)
    item = nn.build(m).compute_dtype.itemsize
    out = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "all-to-all"), 0)

    def ring(n, size):
        return (n - 1) / n * size

    rows = t.batch_size // (data * fsdp)
    tokens = rows * m.context // context  # of a chip, of all micro-batches
    head = None  # of a vocabulary
    if m.head in ("lm", "mlm"):
        head = "embed/embedding" if m.tied else "unembed/kernel"
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = train.path_of(path)
        spec = parallel.partition_spec(name, leaf.shape)
        size = leaf.size // (tensor if "tensor" in spec else 1)
        if "fsdp" not in spec or fsdp == 1:  # its gradient is needed whole
            out["all-reduce"] += 2 * ring(data * fsdp * context, size * item) * t.accumulate
            continue
        if name == head:  # its gradient is a float32 sum of all tokens'
            if m.vocab_size % (tensor * fsdp):  # gathered once for the loss
                out["all-gather"] += ring(fsdp, size * item) * t.accumulate
                out["all-reduce"] += 2 * ring(data * fsdp * context, size * 4) * t.accumulate
            else:  # a part of V for a part of D; instead all tokens' states, targets and weights
                out["all-to-all"] += ring(fsdp, size / fsdp * (item + 4)) * t.accumulate
                out["all-gather"] += ring(fsdp, fsdp * tokens * (m.dim * item + 8))
                out["reduce-scatter"] += ring(fsdp, fsdp * tokens * m.dim * item)
                out["all-reduce"] += 2 * ring(data * context, size / fsdp * 4) * t.accumulate
            continue
        if name != "embed/embedding":  # forward and backward
            out["all-gather"] += 2 * ring(fsdp, size * item) * t.accumulate
        out["reduce-scatter"] += ring(fsdp, size * item) * t.accumulate
        out["all-reduce"] += 2 * ring(data * context, size * item / fsdp) * t.accumulate
    x = tokens * m.dim * item  # their states
    if fsdp > 1:  # the embedding is looked up, and its gradient added, a part of D on each chip
        out["all-to-all"] += 2 * ring(fsdp, x)
    # A block's output and its input's gradient are sums over the heads, and over F.
    sums = 2 * m.layers + 3 * m.cross_layers
    again = 1.5 if t.remat == "blocks" else 1
    # Of each attention the keys and values, and their gradients on the way back.
    attentions = m.layers + 2 * m.cross_layers
    keys = attentions * 2 * rows * m.context * m.G // tensor * m.K * item
    out["all-gather"] += ring(context, keys) * (2 if t.remat == "blocks" else 1)
    out["reduce-scatter"] += ring(context, keys)
    out["all-reduce"] += 2 * ring(tensor, x) * (sums * (1 + again) + 2)
    return {kind: round(size) for kind, size in out.items() if size}
