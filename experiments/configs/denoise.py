"""Denoising pretraining of an encoder-decoder on Python's documentation: T5's span corruption.

Command:   python -m experiments.finetune --config=denoise --workdir=runs/denoise
           (--config.task.noise=infilling for BART's; `translate` starts from it by
           --config.model.init_from=runs/denoise/final; texts of your own as in `masked_lm`)
           An autoencoder, whose decoder sees one vector alone, by --config.task.noise=none
           --config.model.bottleneck=mean --config.data.train=dates:en-fr
           --config.data.tokenizer=bytes
Hardware:  two CPU cores, 11 minutes
Figure:    29.4% of the targets' tokens likeliest, given those before (0.5% of them whole).
"""

from nanoflax.config import Config, Denoise, ExampleData, ModelConfig, OptimConfig, TrainConfig


def get_config():
    return Config(
        model=ModelConfig(
            architecture="encoder_decoder",
            layers=3,
            dim=192,
            heads=6,
            context=128,
            norm="rmsnorm",
            activation="silu",
            gated=True,
            positions="rotary",
            bias=False,
        ),
        data=ExampleData(train="pydocs", tokenizer="bpe:2048"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=20, schedule="linear", end_factor=0.05),
        task=Denoise(length=128, target_length=64),
        train=TrainConfig(steps=600, batch_size=32, evaluate_every=200, evaluate_batches=4, checkpoint_every=200),
    )
