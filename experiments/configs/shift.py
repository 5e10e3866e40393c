"""Shift training: dates in words, English to French, measured on clean and on shifted sources.

Command:   python -m experiments.sweep --config=shift --workdir=runs/shift \\
               --grid config.task.shift_probability=0,0.5 --grid config.model.output_delay=0,2 \\
               --metric=bleu_shifted
Hardware:  two CPU cores, 18 minutes of processor time for the four runs
Figure:    BLEU (and exactly right) on 1,105 unseen dates, one seed each, before the model had BART's shape:

               trained with                    clean          shifted
               nothing                         99.8 (99.3%)   65.2 (34.5%)
               an output delay of 2            100.0 (100%)   50.8 (27.9%)
               half of the inputs shifted      99.5 (98.8%)   91.3 (79.6%)
               both                            99.9 (99.6%)   92.5 (81.7%)

           Training on shifted inputs helps. The delay alone is best on clean and worst on shifted sources.

A shift inserts, drops or rotates one or two tokens of a source; the target stays the same.
"""

import dataclasses

from experiments.flags import load_config


def get_config():
    config = load_config("translate")
    return dataclasses.replace(config, task=dataclasses.replace(config.task, max_shift=2))
