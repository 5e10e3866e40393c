"""Functions, classes, parameters, attributes and strings in the source of the standard library.

Command:   python -m experiments.finetune --config=tag --workdir=runs/tags
Hardware:  two CPU cores with other work too, 10 minutes (3 min 54 s of processor time)
Figure:    entity F1 0.973 on the 3,542 entities of the validation files: functions 0.998, classes 1.0,
           attributes 0.997, parameters 0.981, strings 0.924.
"""

from nanoflax.config import Config, ExampleData, OptimConfig, Tag, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-1m", architecture="encoder", head="tag", layers=3, context=256, dropout=0.1),
        data=ExampleData(train="pytags", tokenizer="bpe:2048"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=20, schedule="linear", end_factor=0.0),
        task=Tag(length=256),
        train=TrainConfig(steps=400, batch_size=32, evaluate_every=200, evaluate_batches=20, checkpoint_every=200),
    )
