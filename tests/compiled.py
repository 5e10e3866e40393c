"""Models called as one compiled program. Operation by operation, each shape would compile dozens of programs."""

from functools import partial

import jax


@partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *inputs, **named):
    """model.apply with these parameters."""
    return model.apply({"params": params}, *inputs, **named)


@partial(jax.jit, static_argnums=(0, 4))
def prefill(model, params, tokens, lengths, new_tokens):
    """model.prefill with these parameters."""
    return model.prefill(params, tokens, lengths, new_tokens)
