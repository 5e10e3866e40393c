"""A policy that learned some arithmetic improves by the rewards of its own answers.

Command:   python -m experiments.finetune --config=arithmetic --workdir=runs/arithmetic
           python -m experiments.finetune --config=grpo --workdir=runs/grpo
"""

from nanoflax.config import GRPO, Config, ExampleData, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(init_from="runs/arithmetic"),
        data=ExampleData(train="arithmetic:2", tokenizer="bytes"),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=10, schedule="constant"),
        task=GRPO(length=16, target_length=8, group=8),
        train=TrainConfig(steps=300, batch_size=256, evaluate_every=50, checkpoint_every=50, metric="reward"),
    )
