"""Every choice of a run, as frozen dataclasses: what the model is, what it reads, how it is trained.

A configuration is a value: `dataclasses.replace` changes it, `validate` refuses a bad one with every problem at
once, `to_dict` and `from_dict` carry it through JSON. The sections data, peft and task are of several kinds, each a
dataclass of its own.
"""

from nanoflax.config import fields
from nanoflax.config.data import DataConfig, ExampleData, TextData
from nanoflax.config.fields import as_kind, diff, from_dict, to_dict, validate
from nanoflax.config.model import LSTM_ATTENTIONS, LSTM_STARTS, POSITIONS, PRESETS, ModelConfig, preset
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
from nanoflax.config.run import MAX_SEED, METRICS, OPTIMIZERS, SCHEDULES, Config, OptimConfig, TrainConfig
from nanoflax.config.task import (
    TASK_KINDS,
    AnyTask,
    Classify,
    Denoise,
    ExampleTask,
    Instruct,
    LabelTask,
    LanguageModel,
    MaskedLM,
    Pretrain,
    ShiftTask,
    Tag,
    TargetTask,
    Translate,
    read_class_weights,
)

__all__ = [
    "AdaLoRA", "AnyPeft", "AnyTask", "Classify", "Config", "DataConfig", "Denoise", "DoRA", "ExampleData",
    "ExampleTask", "FullFineTuning", "Houlsby", "Instruct", "LSTM_ATTENTIONS", "LSTM_STARTS", "LabelTask",
    "LanguageModel", "LoRA", "LowRank", "MAX_SEED", "METRICS", "MaskedLM", "ModelConfig", "OPTIMIZERS",
    "OptimConfig", "PEFT_KINDS", "POSITIONS", "PRESETS", "PeftConfig", "Pfeiffer", "PrefixTuning", "Pretrain",
    "PromptTuning", "SCHEDULES", "ShiftTask", "TASK_KINDS", "Tag", "TargetTask", "TextData", "TrainConfig",
    "Translate", "as_kind", "diff", "fields", "from_dict", "preset", "read_class_weights", "to_dict", "validate",
]  # fmt: skip
