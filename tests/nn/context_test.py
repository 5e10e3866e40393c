"""A text longer than the learned positions is refused when a model is called; all else is not limited."""

import jax
import jax.numpy as jnp
import pytest

import nanoflax
from nanoflax import generate, parallel, peft
from nanoflax.config import LoRA, ModelConfig, PrefixTuning, PromptTuning
from nanoflax.errors import UserError

SIZES = dict(layers=1, dim=16, heads=2, context=8, vocab_size=11)
REFUSED = "9 tokens are too many: .*model.context=8"


def tokens(n):
    return jnp.ones((2, n), jnp.int32)


CALLS = {  # architecture and head: (settings, the calls of a length that use positions)
    "decoder": (dict(), [lambda n: (tokens(n),)]),
    "last token": (dict(head="classify"), [lambda n: (tokens(n), tokens(n) > 0)]),
    **{
        head: (dict(architecture="encoder", head=head), [lambda n: (tokens(n), tokens(n) > 0)])
        for head in ("none", "mlm", "classify", "tag")
    },
    "encoder_decoder": (
        dict(architecture="encoder_decoder"),
        [lambda n: (tokens(n), tokens(3)), lambda n: (tokens(2), tokens(n))],
    ),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_only_learned_positions_end(case, positions):
    settings, calls = CALLS[case]
    model = nanoflax.build(ModelConfig(**SIZES, **settings, positions=positions))
    shapes = parallel.param_shapes(model)
    for call in calls:
        for n in (8, 9):
            run = lambda params, n=n, call=call: model.apply({"params": params}, *call(n))
            if n == 9 and positions == "learned":
                with pytest.raises(UserError, match=REFUSED):
                    jax.eval_shape(run, shapes)
            else:
                jax.eval_shape(run, shapes)


@pytest.mark.parametrize(
    "adapter", [LoRA(), PromptTuning(virtual_tokens=3), PrefixTuning(virtual_tokens=3)], ids=lambda p: p.kind
)
def test_virtual_tokens_need_no_position(adapter):
    model = nanoflax.build(ModelConfig(**SIZES))
    add = lambda params: peft.add(params, adapter, jax.random.PRNGKey(0))
    params = jax.eval_shape(add, parallel.param_shapes(model))
    call = lambda n: jax.eval_shape(lambda params: model.apply({"params": params}, tokens(n)), params)
    assert call(8)[0].shape == (2, 8, 11)
    with pytest.raises(UserError, match=REFUSED):
        call(9)


def test_a_cache_and_its_last_position_are_not_longer():
    model = nanoflax.build(ModelConfig(**SIZES))
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    with pytest.raises(UserError, match=REFUSED):
        model.empty_cache(2, 9)
    cache = model.empty_cache(2, 9, jnp.ones(2, jnp.int32))  # the first slot of both rows is padding
    _, cache = model.decode(params, tokens(8), cache)
    model.decode(params, tokens(1), cache)
    with pytest.raises(UserError, match=REFUSED):
        model.decode(params, tokens(1), cache | {"start": jnp.asarray([0, 1])})
    with pytest.raises(UserError, match=REFUSED):
        jax.eval_shape(lambda cache: model.decode(params, tokens(9), cache), cache)


def test_a_prompt_up_to_the_context_is_continued():
    model = nanoflax.build(ModelConfig(**SIZES | dict(context=21)))
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    prompts = [[1] * 19, [2] * 3]  # their bucket of lengths, 32, is longer than the context
    for prompt, new in zip(prompts, generate.sample(model, params, prompts, 2, temperature=0), strict=True):
        logits, _ = model.apply({"params": params}, jnp.asarray([prompt + new]))
        assert new == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
