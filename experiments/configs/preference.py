"""DPO."""

from nanoflax.config import Config, ExampleData, OptimConfig, Prefer, TrainConfig


def get_config():
    return Config(
        data=ExampleData(train="pypreferences"),
        optim=OptimConfig(schedule="linear", end_factor=0.0),
        task=Prefer(length=128),
        train=TrainConfig(
            steps=150,
            batch_size=8,
            evaluate_every=50,
            evaluate_batches=16,
            checkpoint_every=50,
            metric="preference_accuracy",
        ),
    )
