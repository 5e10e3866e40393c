"""All settings of a run, as frozen dataclasses: model, data, optimizer, adapters, task and training loop.

`dataclasses.replace` makes a changed copy, `validate` raises one error that names all problems, `to_dict` and
`from_dict` convert to and from JSON. The sections data, peft and task have several kinds, with one dataclass each.
"""

from nanoflax.config import fields
from nanoflax.config.data import DataConfig, ExampleData, TextData
from nanoflax.config.fields import as_float, as_kind, diff, from_dict, to_dict, validate
from nanoflax.config.generation import CACHE_DTYPES, COLDEST, OF_LENGTH, OF_SAMPLING, QUANTIZE, GenerationDefaults
from nanoflax.config.layers import (
    LAYER_TYPES,
    RECURRENT,
    ROPE_SCALINGS,
    LatentConfig,
    MoEConfig,
    RecurrentConfig,
    RopeConfig,
)
from nanoflax.config.model import LSTM_ATTENTIONS, LSTM_STARTS, POSITIONS, ModelConfig
from nanoflax.config.peft import (
    PEFT_KINDS,
    AdaLoRA,
    AnyPeft,
    DoRA,
    FullFineTuning,
    Houlsby,
    LoRA,
    LowRank,
    PeftConfig,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
)
from nanoflax.config.presets import PRESETS, preset
from nanoflax.config.recipes import RECIPE_FIELDS, RECIPES, Recipe, fill, recipe_of, with_recipe
from nanoflax.config.run import MAX_SEED, METRICS, OPTIMIZERS, SCHEDULES, Config, OptimConfig, TrainConfig
from nanoflax.config.task import (
    GRPO,
    PREFERENCE_LOSSES,
    TASK_KINDS,
    AnyTask,
    Classify,
    Denoise,
    Distill,
    DistillChat,
    DistillTask,
    ExampleTask,
    Instruct,
    LabelTask,
    LanguageModel,
    MaskedLM,
    PackedTask,
    PairTask,
    Prefer,
    Pretrain,
    RewardModel,
    ShiftTask,
    Tag,
    TargetTask,
    Translate,
    read_class_weights,
)

__all__ = [
    "CACHE_DTYPES", "COLDEST", "GRPO", "LAYER_TYPES", "LSTM_ATTENTIONS", "LSTM_STARTS", "MAX_SEED", "METRICS",
    "OF_LENGTH", "OF_SAMPLING", "OPTIMIZERS", "PEFT_KINDS", "POSITIONS", "PREFERENCE_LOSSES", "PRESETS", "QUANTIZE",
    "RECIPES", "RECIPE_FIELDS", "RECURRENT", "ROPE_SCALINGS", "SCHEDULES", "TASK_KINDS", "AdaLoRA", "AnyPeft",
    "AnyTask", "Classify", "Config", "DataConfig", "Denoise", "Distill", "DistillChat", "DistillTask", "DoRA",
    "ExampleData", "ExampleTask", "FullFineTuning", "GenerationDefaults", "Houlsby", "Instruct", "LabelTask",
    "LanguageModel", "LatentConfig", "LoRA", "LowRank", "MaskedLM", "MoEConfig", "ModelConfig", "OptimConfig",
    "PackedTask", "PairTask", "PeftConfig", "Pfeiffer", "Prefer", "PrefixTuning", "Pretrain", "PromptTuning",
    "Recipe", "RecurrentConfig", "RewardModel", "RopeConfig", "ShiftTask", "Tag", "TargetTask", "TextData",
    "TrainConfig", "Translate", "as_float", "as_kind", "diff", "fields", "fill", "from_dict", "preset",
    "read_class_weights", "recipe_of", "to_dict", "validate", "with_recipe",
]  # fmt: skip
