"""Shift training: dates in words, English to French, measured on clean and on shifted sources.

Command:   python -m experiments.sweep --config=shift --workdir=runs/shift \\
               --grid config.task.shift_probability=0,0.5 --grid config.model.output_delay=0,2 \\
               --metric=bleu_shifted
Hardware:  two CPU cores
Figure:    not measured yet.

Every validation source is also measured with one or two of its tokens put in, dropped or rotated
(batching.moved), against the same target.
"""

import dataclasses

from experiments import common


def get_config():
    config = common.load_config("translate")
    return dataclasses.replace(config, task=dataclasses.replace(config.task, max_shift=2))
