"""Which kernels compute the attention of a training step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from nanoflax import parallel, train
from nanoflax.nn import Attention, LanguageModel


def attention_backends(
    model: LanguageModel, params: Any, batch: dict, mesh: Mesh, objective: Callable = train.causal_lm
) -> str:
    """The kernels that compute a step's attention on the mesh, as text; "" for a model without attention.

    params, batch: arrays or their shapes. Nothing is compiled.
    Raises: UserError if config.attention_backend names a kernel that cannot compute the attention.
    """
    kernels = []

    def record(method, arguments, named, context):
        result = method(*arguments, **named)
        if isinstance(context.module, Attention) and context.method_name == "backend":
            name, why = result
            kernels.append(f"{name} ({why})" if why else name)
        return result

    with nn.intercept_methods(record):
        jax.eval_shape(parallel.with_mesh(mesh, lambda params, batch: objective(model, params, batch)), params, batch)
    return ", ".join(dict.fromkeys(kernels))
