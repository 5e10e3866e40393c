"""A student of 4 layers learns Python's documentation from a teacher of 8 layers.

Commands:  python -m experiments.pretrain --config.model.layers=8 --config.train.steps=800 --workdir=runs/teacher
           python -m experiments.finetune --config=distill --workdir=runs/student
           The same student without a teacher, from the same weights on the same batches:
           python -m experiments.finetune --config=distill --workdir=runs/alone \\
               --config.task.kind=language_model --config.data.tokenizer=runs/teacher/tokenizer
           The student reads the tokenizer of its teacher.
Hardware:  two CPU cores, used by other programs too: 26 minutes for the teacher, 5 for each student
Figure:    bits per byte of the validation split after 300 steps: 1.868 with the teacher, 1.976 without (seed 0); the
           teacher has 1.720.
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
