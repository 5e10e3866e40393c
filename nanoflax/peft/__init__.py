"""Parameter-efficient fine-tuning: adapters as leaves of the parameter tree, and AdaLoRA."""

from nanoflax.peft.adalora import adalora_optimizer
from nanoflax.peft.adapters import add, join, merge, split, trainable, without_adapters

__all__ = [
    "adalora_optimizer", "add", "join", "merge", "split", "trainable", "without_adapters"]  # fmt: skip
