"""Parameter-efficient fine-tuning: adapters as leaves of the parameter tree, AdaLoRA, and quantised matrices."""

from nanoflax.peft.adalora import adalora_optimizer
from nanoflax.peft.adapters import add, join, merge, split, trainable, without_adapters
from nanoflax.peft.quantization import (
    dequantize_params,
    is_quantizable,
    quantization_of,
    quantize_array,
    quantize_frozen,
    quantize_params,
)

__all__ = [
    "adalora_optimizer", "add", "dequantize_params", "is_quantizable", "join", "merge", "quantization_of",
    "quantize_array", "quantize_frozen", "quantize_params", "split", "trainable", "without_adapters"]  # fmt: skip
