"""Reward."""

from nanoflax.config import Config, ExampleData, OptimConfig, RewardModel, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-1m"),
        data=ExampleData(train="wrong_dates:en-fr", tokenizer="bpe:512"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, schedule="linear", end_factor=0.0),
        task=RewardModel(length=64),
        train=TrainConfig(
            steps=300, batch_size=16, evaluate_every=100, checkpoint_every=100, metric="preference_accuracy"
        ),
    )
