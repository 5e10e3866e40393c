"""Every choice of a run, as frozen dataclasses: what the model is, what it reads, how it is trained.

A configuration is a value: `dataclasses.replace` changes it, `validate` refuses a bad one with every
problem in one go, `to_dict` and `from_dict` carry it through JSON.
"""

from nanoflax.config.checks import diff, from_dict, to_dict, type_name
from nanoflax.config.model import LSTM_ATTENTIONS, LSTM_STARTS, POSITIONS, PRESETS, ModelConfig, preset
from nanoflax.config.run import (
    MAX_SEED,
    METRICS,
    OPTIMIZERS,
    PEFT_KINDS,
    SCHEDULES,
    Config,
    DataConfig,
    OptimConfig,
    PeftConfig,
    TaskConfig,
    TrainConfig,
    read_class_weights,
    validate,
)

__all__ = [
    "Config", "DataConfig", "LSTM_ATTENTIONS", "LSTM_STARTS", "MAX_SEED", "METRICS", "ModelConfig", "OPTIMIZERS",
    "OptimConfig", "PEFT_KINDS", "POSITIONS", "PRESETS", "PeftConfig", "SCHEDULES", "TaskConfig", "TrainConfig",
    "diff", "from_dict", "preset", "read_class_weights", "to_dict", "type_name", "validate"]  # fmt: skip
