"""The cost of a training step, before a machine is rented: bytes, FLOPs, traffic, least time.

Weights and optimizer state are exact, from shapes and the sharding rules. Gradients and activations
are an estimate (`peak_memory`) from the traced gradient of one chip's part of the model. Time is a
roofline, a lower bound (Williams et al. 2009).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jaxtyping import PyTree

from nanoflax import nn, parallel, train
from nanoflax.config import Config, ModelConfig
from nanoflax.errors import UserError
from nanoflax.planning import peak_memory
from nanoflax.planning.flops import count_parameters, flops_per_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of a training step of a Config on a mesh. All bytes are of one chip."""

    mesh: dict[str, int]
    parameters: int  # of the model, on all chips together
    active: int  # parameters that one token uses: of experts only those that its router chooses
    weights: int  # bytes
    optimizer: int  # bytes of optimizer state and moving average
    batch: int  # bytes
    gradients: int  # bytes
    activations: int  # bytes at the peak, with the gathered weights of a matrix product
    cache: int  # bytes of keys and values, to generate the batch at its full length
    flops_per_token: float
    tokens: int  # in a step, on all chips together
    collectives: dict[str, int]  # kind -> bytes that a chip receives in a step
    memory_traffic: float  # bytes read and written in a step, at least

    @property
    def memory(self) -> int:
        """Bytes that a step needs on a chip."""
        return self.weights + self.optimizer + self.batch + self.gradients + self.activations


class Roofline(NamedTuple):
    """Lower bounds of the time of a step, in seconds."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return self._fields[self.index(max(self))]


def make_plan(config: Config, mesh: parallel.AnyMesh) -> Plan:
    """The Plan of a Config on a mesh (an AbstractMesh suffices). Nothing is computed or compiled.

    Raises: UserError if the mesh does not divide the model or the batch.
    """
    parallel.check_mesh(config, mesh)
    model = nn.build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state = train.abstract_state(model, optimizer, config, mesh)
    weights = parallel.bytes_per_device(state.params)
    optimizer_bytes = parallel.bytes_per_device((state.opt_state, state.ema))
    gradients, peak = gradient_bytes(config, mesh)
    return Plan(
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        active=count_parameters(config.model)[1],
        weights=weights,
        optimizer=optimizer_bytes,
        batch=parallel.bytes_per_device(_sharded_batch(config, mesh)),
        gradients=gradients,
        activations=peak - gradients,
        cache=cache_bytes(config, mesh),
        flops_per_token=flops_per_token(config.model),
        tokens=config.train.batch_size * config.model.context,
        collectives=collectives(config, mesh, state.params),
        # The update reads and writes weights and optimizer state. A micro-batch reads the weights
        # three times (forward, and two products backward); activations are written and read.
        memory_traffic=2 * (weights + optimizer_bytes)
        + config.train.accumulate * (3 * _compute_weight_bytes(config, mesh) + 2 * (peak - gradients)),
    )


def roofline(plan: Plan, chip: parallel.Chip, remat: str = "none") -> Roofline:
    """The Roofline of a Plan on a chip. remat: as in train.remat; "blocks" computes blocks twice."""
    chips = math.prod(plan.mesh.values())
    recomputation = 4 / 3 if remat == "blocks" else 1
    return Roofline(
        plan.flops_per_token * plan.tokens * recomputation / chips / chip.flops,
        plan.memory_traffic / chip.bandwidth,
        sum(plan.collectives.values()) / chip.network,
    )


def projected_mfu(plan: Plan, chip: parallel.Chip, remat: str = "none") -> float:
    """An upper bound of the model FLOPs utilisation (0 to 1): the step takes the time of its Roofline."""
    chips = math.prod(plan.mesh.values())
    return plan.flops_per_token * plan.tokens / chips / chip.flops / roofline(plan, chip, remat).seconds


def compile_for_topology(config: Config, topology: str) -> dict[str, int]:
    """The memory that the TPU compiler reports for the step on a slice such as "v5e:2x4", in bytes of one chip.

    Needs libtpu but no TPU; takes minutes. Returns {"arguments", "temporary", "code", "reserved":
    arguments + temporary, "live": the largest number of reserved bytes in use at once}.
    Raises: UserError with the compiler's message if the step is too large.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = parallel.make_mesh(config.train.mesh, devices)
    model = nn.build(config.model, config.train.remat)
    optimizer, _ = train.make_optimizer(config.optim, config.train.steps)
    state, batch = train.abstract_state(model, optimizer, config, mesh), _sharded_batch(config, mesh)
    step = train.make_train_step(model, optimizer, config, _objective(config.model))
    try:
        memory = train.compile_step(step, state, batch, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler cannot compile the step: {str(error)[:300]}") from error
    assert memory is not None  # the TPU compiler reports it
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "live": memory.peak_memory_in_bytes,
        "reserved": arguments + memory.temp_size_in_bytes,
    }


# If a chip's part of D is smaller than this, the TPU compiler stores the complete sum of a gradient
# before it splits the sum. Observed for parts of 16 and 128, not for 256.
MIN_SPLIT_DIM = 256


def _row_shards(mesh: parallel.AnyMesh) -> int:
    """The number of parts into which a mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in parallel.BATCH[0])


def config_per_chip(config: Config, mesh: parallel.AnyMesh) -> Config:
    """The Config of the part that one chip computes in a micro-batch: fewer rows, T, heads, F, V."""
    m, t, r, split = config.model, config.train, config.model.recurrent, mesh.shape["tensor"]
    rows = t.batch_size // t.accumulate // _row_shards(mesh)
    if m.head == "lm" and not m.reads_source:  # the number of chunks is that of the complete micro-batch
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
            recurrent=dataclasses.replace(r, heads=max(1, r.heads // split), groups=max(1, r.groups // split)),
            decoder_heads=None,  # other heads of the decoder have as many numbers in all as those of the encoder
            decoder_mlp_dim=m.decoder.F // split if m.cross_layers else None,
            vocab_size=m.vocab_size // split,
        )
    if m.moe.experts:  # the chip's own experts; `_gathered_tokens_bytes` adds the tokens of other chips
        own = m.moe.experts // mesh.shape["expert"]
        moe = dict(experts=own, active=min(m.moe.active, own), groups=1, top_groups=1)
        moe |= dict(expert_dim=(m.moe.expert_dim or config.model.F) // split, shared_dim=m.moe.shared_dim // split)
        m = dataclasses.replace(m, moe=dataclasses.replace(m.moe, **moe))
    return dataclasses.replace(config, model=m, train=dataclasses.replace(t, batch_size=rows, accumulate=1))


def _abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch."""
    m, B, T = config.model, config.train.batch_size, config.model.context
    tokens, flags = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), bool)
    weights = jax.ShapeDtypeStruct((B, T), jnp.float32)
    if m.reads_source:
        return {"source": tokens, "source_mask": flags, "targets": tokens, "weights": weights}
    if m.head == "lm":
        batch = train.abstract_batch(config, parallel.abstract_mesh((1, 1, 1)))
        # Without the shardings: JAX 0.12 refuses to trace a step with two meshes.
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    row = jax.ShapeDtypeStruct((B,), jnp.int32)
    batch = {"tokens": tokens, "padding_mask": flags}
    if m.head == "classify":
        return batch | {"label": row, "weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    if m.head in ("tag", "mlm"):
        return batch | {"tags" if m.head == "tag" else "targets": tokens, "weights": weights}
    raise UserError(
        f"model.head={m.head!r} has no training step to plan; possible are decoders, "
        "encoder-decoders, and the heads classify, tag and mlm"
    )


def _sharded_batch(config: Config, mesh: parallel.AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.batch_sharding(mesh, x.ndim))
        for name, x in _abstract_batch(config).items()
    }


def _objective(m: ModelConfig) -> Callable:
    if m.reads_source:
        return train.seq2seq
    return {"lm": train.causal_lm, "classify": train.classify, "tag": train.tag, "mlm": train.masked_lm}[m.head]


def _gathered_keys_bytes(config: Config, mesh: parallel.AnyMesh) -> int:
    """Bytes per chip for the keys of the other chips along context, which `config_per_chip` leaves out."""
    local, t = config_per_chip(config, mesh), config.train
    m, other_keys = local.model, config.model.context - local.model.context
    attentions = 1 if t.remat == "blocks" else m.layers + 2 * m.cross_layers
    numbers = m.heads * m.context + 2 * m.G * m.K  # per key: its attention weights, the key and the value
    return local.train.batch_size * other_keys * numbers * nn.build(m).compute_dtype.itemsize * attentions


def _gathered_tokens_bytes(config: Config, mesh: parallel.AnyMesh) -> int:
    """Bytes per chip for the tokens of the other chips along expert, which `config_per_chip` leaves out.

    Any of them may choose the chip's experts: for each, room for its state, two of F, the results of the experts that
    it chooses, and the gradients of all.
    """
    local, t = config_per_chip(config, mesh), config.train
    m, others = local.model, mesh.shape["expert"] - 1
    if not others:
        return 0
    layers = 1 if t.remat == "blocks" else sum(map(m.is_sparse, range(m.layers)))
    numbers = m.moe.active * (2 * m.dim + 4 * (m.moe.expert_dim or m.F)) + 2 * config.model.moe.active * m.dim
    return others * local.train.batch_size * m.context * numbers * nn.build(m).compute_dtype.itemsize * layers


@functools.cache  # one chip has the same part on several meshes
def _traced_gradient(local: Config, platform: str) -> tuple[Any, list[str]]:
    """The jaxpr of the gradient of one chip's loss, and the paths of its parameters (its first inputs)."""
    model = nn.build(local.model, local.train.remat)
    objective = _objective(local.model)
    t, params = local.train, parallel.param_shapes(model)
    if t.scan_layers:
        params = parallel.stack(params, local.model.layer_groups)
    rng = jax.random.PRNGKey(0) if local.model.dropout else None

    def loss(params, batch):
        return objective(
            model, params, batch, rng, chunks=t.loss_chunks, z_loss=t.z_loss, label_smoothing=t.label_smoothing
        )[0]

    paths = [train.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    with jax.sharding.use_abstract_mesh(parallel.abstract_mesh((1, 1, 1), platform)):
        return jax.make_jaxpr(jax.grad(loss))(params, _abstract_batch(local)).jaxpr, paths


def gradient_bytes(config: Config, mesh: parallel.AnyMesh) -> tuple[int, int]:
    """(bytes of the gradients on a chip, bytes of gradients and activations together at the peak)."""
    device = mesh.abstract_mesh.abstract_device if isinstance(mesh, jax.sharding.Mesh) else mesh.abstract_device
    platform = "cpu" if device is None else device.platform
    traced, paths = _traced_gradient(config_per_chip(config, mesh), platform)
    params, fsdp = traced.invars[: len(paths)], mesh.shape["fsdp"]
    specs = [parallel.partition_spec(path, v.aval.shape) for path, v in zip(paths, params, strict=True)]
    gathered = {v for v, spec in zip(params, specs, strict=True) if "fsdp" in spec and fsdp > 1}
    # Gradients of blocks with small parts are split only in the update; gradients of embeddings earlier.
    small = config.model.dim // fsdp < MIN_SPLIT_DIM
    parts = [
        fsdp if "fsdp" in spec and not (small and "/block" in path) else 1
        for path, spec in zip(paths, specs, strict=True)
    ]
    split = dict(zip(traced.outvars, parts, strict=True))
    gradients, peak = peak_memory.peak(traced, gathered, split, writes_operands=platform != "tpu")
    peak += _gathered_keys_bytes(config, mesh) + _gathered_tokens_bytes(config, mesh)
    # The compiler casts all layers of a stacked kernel [L, D, F] before the scan over layers.
    itemsize = nn.build(config.model).compute_dtype.itemsize
    peak += sum(
        v.aval.size * itemsize // (fsdp if "fsdp" in spec else 1)
        for path, v, spec in zip(paths, params, specs, strict=True)
        if parallel.STACKED.search(path) and v.aval.ndim >= 3 and itemsize < 4
    )
    if config.train.accumulate > 1:  # the float32 sum over micro-batches
        total = sum(math.prod(v.aval.shape) * 4 // n for v, n in zip(params, parts, strict=True))
        return total, total + peak
    return gradients, peak


def cache_bytes(config: Config, mesh: parallel.AnyMesh) -> int:
    """Bytes of the decode cache of a chip's rows at full length; 0 for a model that does not decode."""
    local, T = config_per_chip(config, mesh), config.model.context  # the cache is not split along S
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


def _compute_weight_bytes(config: Config, mesh: parallel.AnyMesh) -> int:
    """Bytes of the weights that one chip computes with, in the compute dtype."""
    model = nn.build(config_per_chip(config, mesh).model)
    return sum(x.size for x in jax.tree.leaves(parallel.param_shapes(model))) * model.compute_dtype.itemsize


class _Received:
    """Counts the bytes that a chip receives, by the kind of collective."""

    KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")

    def __init__(self):
        self.bytes: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)

    def add(self, kind: str, chips: int, size: float) -> None:
        """A collective of `size` bytes over `chips` chips, in a ring (Chan et al. 2007): each chip
        receives (chips - 1) / chips of the size, and twice that of an all-reduce."""
        self.bytes[kind] += (chips - 1) / chips * size * (2 if kind == "all-reduce" else 1)


def collectives(config: Config, mesh: parallel.AnyMesh, params: PyTree) -> dict[str, int]:
    """Bytes that a chip receives in a step, by the kind of collective; kinds without any are absent.

    params: the shapes of the parameters.
    """
    received = _Received()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _add_parameter(received, config, mesh, train.path_of(path), leaf)
    _add_activations(received, config, mesh)
    return {kind: round(size) for kind, size in received.bytes.items() if size}


def _tokens_per_chip(config: Config, mesh: parallel.AnyMesh) -> int:
    """Tokens of a chip in a step, in all micro-batches together."""
    rows = config.train.batch_size // _row_shards(mesh)
    return rows * config.model.context // mesh.shape["context"]


def _add_parameter(received: _Received, config: Config, mesh: parallel.AnyMesh, path: str, leaf: Any) -> None:
    """The traffic of one parameter and its gradient."""
    m, t = config.model, config.train
    data, fsdp, tensor, context, expert = (mesh.shape[axis] for axis in parallel.AXES)
    itemsize = nn.build(m).compute_dtype.itemsize
    spec = parallel.partition_spec(path, leaf.shape)
    size = leaf.size // (tensor if "tensor" in spec else 1) // (expert if "expert" in spec else 1)
    copies = data * context * (1 if "expert" in spec else expert)  # devices with the same part, apart from fsdp
    head = {True: "embed/embedding", False: "unembed/kernel"}[m.tied] if m.head in ("lm", "mlm") else None
    if "fsdp" not in spec or fsdp == 1:  # replicated, and so is its gradient
        received.add("all-reduce", copies * fsdp, size * itemsize * t.accumulate)
    elif path == head and m.vocab_size % (tensor * fsdp):  # gathered once for the loss
        received.add("all-gather", fsdp, size * itemsize * t.accumulate)
        received.add("all-reduce", copies * fsdp, size * 4 * t.accumulate)  # a float32 gradient
    elif path == head:
        # The split of the head changes from D to V; hidden states, targets and weights are gathered.
        tokens = _tokens_per_chip(config, mesh)
        received.add("all-to-all", fsdp, size / fsdp * (itemsize + 4) * t.accumulate)
        received.add("all-gather", fsdp, fsdp * tokens * (m.dim * itemsize + 8))
        received.add("reduce-scatter", fsdp, fsdp * tokens * m.dim * itemsize)
        received.add("all-reduce", copies, size / fsdp * 4 * t.accumulate)
    else:
        if path != "embed/embedding":  # forward and backward
            received.add("all-gather", fsdp, 2 * size * itemsize * t.accumulate)
        received.add("reduce-scatter", fsdp, size * itemsize * t.accumulate)
        received.add("all-reduce", copies, size * itemsize / fsdp * t.accumulate)


def _add_activations(received: _Received, config: Config, mesh: parallel.AnyMesh) -> None:
    """The traffic of hidden states, keys and values."""
    m, remat = config.model, config.train.remat == "blocks"
    fsdp, tensor, context = (mesh.shape[axis] for axis in ("fsdp", "tensor", "context"))
    itemsize = nn.build(m).compute_dtype.itemsize
    tokens = _tokens_per_chip(config, mesh)
    states = tokens * m.dim * itemsize
    if fsdp > 1:  # each chip embeds the tokens of all chips, with its part of D; the gradients go back
        received.add("all-to-all", fsdp, 2 * states)
    # Keys and values of every attention are gathered along context, and their gradients reduce-scattered.
    attentions = m.layers + 2 * m.cross_layers
    keys = attentions * 2 * tokens * context * m.G // tensor * m.K * itemsize
    received.add("all-gather", context, keys * (2 if remat else 1))
    received.add("reduce-scatter", context, keys)
    # The output of an attention or MLP, and the gradient of its input, are sums over heads or F.
    sums = 2 * m.layers + 3 * m.cross_layers
    # Chips along expert gather each other's tokens and sum what their experts give; backward, the same of gradients.
    expert, sparse = mesh.shape["expert"], sum(map(m.is_sparse, range(m.layers)))
    received.add("all-gather", expert, sparse * expert * (states * (3 if remat else 2) + 8 * tokens * m.moe.active))
    received.add("reduce-scatter", expert, sparse * expert * (2 * states + tokens * m.moe.active * itemsize))
    received.add("all-reduce", tensor, states * (sums * (1 + (1.5 if remat else 1)) + 2))
