"""A student of 4 layers learns Python's documentation from a teacher of 8 layers.

Commands:  python -m experiments.pretrain --config.model.layers=8 --config.train.steps=800 --workdir=runs/teacher
           python -m experiments.finetune --config=distill --workdir=runs/student
           The same student without a teacher, on the same batches:
           python -m experiments.finetune --config=distill --workdir=runs/alone \\
               --config.task.kind=language_model --config.data.tokenizer=runs/teacher/tokenizer
"""

import dataclasses

from experiments.flags import load_config
from nanoflax.config import Config, Distill, ExampleData


def get_config():
    base = load_config("pydocs_tiny")
    return Config(
        model=dataclasses.replace(base.model, layers=4),
        data=ExampleData(train="pydocs"),
        optim=base.optim,
        task=Distill(length=256, teacher="runs/teacher"),
        train=dataclasses.replace(base.train, steps=300, evaluate_every=150, checkpoint_every=150, sample_prompt=""),
    )
