"""A reward model: dates in words get a larger score if they are the date of the question.

Command:   python -m experiments.finetune --config=reward --config.model.init_from=runs/dates --workdir=runs/reward
           runs/dates: the first command of the config `preference`. Your own pairs:
           --config.data.train=preferences:FILE. Scores in Python: nanoflax.open("runs/reward").rewards(chats)
Hardware:  two CPU cores with much other work, 9 minutes
Figure:    81% of 1,105 held-out pairs; of the first 320 of them 53% after 100 steps, 64% after 300, 82% after 600.
           From scratch: not measured.
"""

from nanoflax.config import Config, ExampleData, OptimConfig, RewardModel, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-1m"),
        data=ExampleData(train="wrong_dates:en-fr", tokenizer="bpe:512"),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=20, schedule="linear", end_factor=0.0),
        task=RewardModel(length=64),
        train=TrainConfig(
            steps=600,
            batch_size=32,
            evaluate_every=100,
            evaluate_batches=10,
            checkpoint_every=100,
            metric="preference_accuracy",
        ),
    )
