"""Which of ten standard packages a docstring belongs to, from scratch.

Command:   python -m experiments.finetune --config=classify --workdir=runs/topics
Hardware:  two CPU cores
Figure:    not measured yet.
"""

from nanoflax.config import (
    Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig)


def get_config():
    return Config(
        model=ModelConfig(architecture="encoder", head="classify", layers=2, dim=128, heads=4,
                          context=128, norm="rmsnorm", activation="silu", gated=True,
                          positions="rotary", bias=False, dropout=0.1),
        data=DataConfig(train="pymodules", tokenizer="bpe:2048", validation_fraction=0.1),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30, schedule="linear", end_factor=0.0),
        task=TaskConfig(kind="classify", length=128),
        train=TrainConfig(steps=300, batch_size=32, evaluate_every=100, checkpoint_every=100,
                          sample_tokens=0),
    )
