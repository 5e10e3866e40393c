"""A character-level model of Shakespeare, from TensorFlow Datasets (a download of 1 MB).

Command:   python -m experiments.pretrain --config=tiny_shakespeare
Hardware:  two CPU cores
Figure:    not measured.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-5m", context=256, dropout=0.1),
        data=TextData(train="tfds:tiny_shakespeare", tokenizer="bytes"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50, schedule="linear", end_factor=0.05),
        train=TrainConfig(
            steps=2000,
            batch_size=16,
            evaluate_every=250,
            checkpoint_every=250,
            sample_prompt="ROMEO:",
            sample_tokens=200,
        ),
    )
