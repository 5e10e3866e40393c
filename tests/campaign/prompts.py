"""Ragged prompts in random batches: each must be continued as it is alone, by every kind of model that generates."""

import random
import time

from tests.campaign import Outcome

KINDS = {
    "decoder": dict(architecture="decoder", layers=2, dim=32, heads=2, context=64),
    "encoder-decoder": dict(architecture="encoder_decoder", layers=2, dim=32, heads=2, context=64),
    "LSTM": dict(architecture="lstm", layers=2, dim=32, context=64),
}
NEW = 12
SIZES = [2, 3, 5, 8, 13]  # of batches; each is compiled once for each bucket of lengths


def model_of(kind):
    """A model with random weights, enlarged so that the likeliest tokens are no ties."""
    import jax

    import nanoflax
    from nanoflax.config import ModelConfig

    model = nanoflax.build(ModelConfig(vocab_size=97, **KINDS[kind]))
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    return model, jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    import nanoflax

    outcomes = []
    for kind in KINDS:
        end = time.monotonic() + budget_seconds / len(KINDS)
        model, params = model_of(kind)
        tried, problems = 0, []
        answer = lambda prompts: nanoflax.sample(model, params, prompts, NEW, temperature=0.0, eos_id=[7, 23])
        while time.monotonic() < end and tried < 2_000:
            prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 40))] for _ in range(rng.choice(SIZES))]
            together = answer(prompts)
            for prompt, found in zip(prompts, together, strict=True):
                tried += 1
                if found != (alone := answer([prompt])[0]):
                    problems.append(f"{prompt}: {found} in a batch of {len(prompts)}, alone {alone}")
        outcomes.append(Outcome(kind, tried, problems))
    return outcomes
