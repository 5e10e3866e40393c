"""Denoising pretraining of an encoder-decoder on Python's documentation: T5's span corruption.

Command:   python -m experiments.finetune --config=denoise --workdir=runs/denoise
           BART's noise: --config.task.noise=infilling. An autoencoder whose decoder sees one vector:
           --config.task.noise=none --config.model.bottleneck=mean --config.data.train=dates:en-fr
           --config.data.tokenizer=bytes. `translate` starts from the result with
           --config.model.init_from=runs/denoise/final
Hardware:  two CPU cores, 11 minutes
Figure:    token accuracy 29.4%; 0.5% of the targets are exactly right (before the model
           had BART's shape, which Transformers can open; not measured again).
"""

from nanoflax.config import Config, Denoise, ExampleData, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-bart", layers=3, dim=192, heads=6),
        data=ExampleData(train="pydocs", tokenizer="bpe:2048"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=20, schedule="linear", end_factor=0.05),
        task=Denoise(length=128, target_length=64),
        train=TrainConfig(steps=600, batch_size=32, evaluate_every=200, evaluate_batches=4, checkpoint_every=200),
    )
