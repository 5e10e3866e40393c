"""Continue training a decoder on your own text; by default a new model reads Python's documentation.

Command:   python -m experiments.finetune --config=language_model --workdir=runs/own \\
               --config.data.train='text:notes/*.md' --config.model.init_from=SOURCE
           --config.peft.kind=lora trains only few parameters. For a large corpus use pretrain.
Hardware:  two CPU cores, 4 minutes from scratch
Figure:    perplexity 167 from scratch; the learning rate is chosen for pretrained models.
"""

from nanoflax.config import Config, ExampleData, LanguageModel, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-5m"),
        data=ExampleData(train="pydocs", tokenizer="bpe:2048"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, schedule="linear", end_factor=0.0),
        task=LanguageModel(length=256),
        train=TrainConfig(steps=200, batch_size=16, evaluate_every=100, evaluate_batches=10, checkpoint_every=100),
    )
