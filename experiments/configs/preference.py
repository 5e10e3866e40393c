"""DPO: the right date in words is preferred to a wrong one, with the mean cross entropy of the right one in the loss.

Command:   python -m experiments.finetune --config=instruct --workdir=runs/dates \\
               --config.data.train=dates:en-fr --config.data.tokenizer=bpe:512 --config.task.length=64 \\
               --config.model.layers=4 --config.model.dim=128 --config.model.heads=4 --config.train.batch_size=32 \\
               --config.train.steps=300
           python -m experiments.finetune --config=preference --workdir=runs/preference
           Your own pairs: --config.data.train=preferences:FILE (prompt, chosen, rejected; texts or messages).
           Other losses: --config.task.loss=ipo
Hardware:  two CPU cores with much other work, 2 minutes and 5 minutes
Figure:    of 1,105 held-out pairs 27% are right at the start, where nearly all rewards are 0, 99% after 50 steps and
           100% after 150; the right dates gain 2.0 nats, the wrong ones lose 2.8. Without task.nll_weight, 90% of them
           are right after 100 steps, and the right dates lose 8 nats too.
"""

from nanoflax.config import Config, ExampleData, ModelConfig, OptimConfig, Prefer, TrainConfig


def get_config():
    return Config(
        model=ModelConfig(init_from="runs/dates"),
        data=ExampleData(train="wrong_dates:en-fr"),
        optim=OptimConfig(schedule="linear", end_factor=0.0),
        task=Prefer(length=64, nll_weight=1.0),
        train=TrainConfig(
            steps=150,
            batch_size=16,
            evaluate_every=50,
            evaluate_batches=20,
            checkpoint_every=50,
            metric="preference_accuracy",
        ),
    )
