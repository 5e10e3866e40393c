"""A student of 4 layers learns Python's documentation from a teacher of 8 layers.

Command:   python -m experiments.pretrain --config.model.layers=8 --config.train.steps=800 --workdir=runs/teacher
           python -m experiments.finetune --config=distill --workdir=runs/student
           The same student without a teacher, from the same weights on the same batches:
           python -m experiments.finetune --config=distill --workdir=runs/alone \\
               --config.task.kind=language_model --config.data.tokenizer=runs/teacher/tokenizer
           The student reads the tokenizer of its teacher.
Hardware:  two CPU cores, used by other programs too: 26 minutes for the teacher, 5 for each student
Figure:    bits per byte of the validation split after 300 steps (seed 0); the teacher has 1.720 after 800:

    alone                                                        1.976
    with the teacher                                             1.868
    and half of the objective is cross entropy, task.mix=0.5     1.895
    and task.start=teacher, the first 4 layers of the teacher    1.787

Steps on its own samples (task.on_policy=1, task.divergence=reverse_kl, model.init_from=runs/student,
optim.learning_rate=1e-3, optim.muon_learning_rate=0.003) lower KL(student, teacher) on 48 validation rows from 0.571
to 0.531 after 30 steps, and raise KL(teacher, student) from 0.492 to 0.504.
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
