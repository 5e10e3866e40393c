"""A larger model of Python's documentation, which compresses better than `xz -9e` (1.84 bits per byte).

Command:   python -m experiments.pretrain --config=pydocs_small
Hardware:  two CPU cores, 20 minutes at 1.9k tokens/s (49 minutes on a machine with other work)
Figure:    1.743 bits per byte (Python 3.11.7; 1.847 after 300 steps). For xz see pydocs_tiny.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-5m", layers=6, dropout=0.1),
        data=TextData(train="pydocs", tokenizer="bpe:4096"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=20, schedule="linear", end_factor=0.02),
        train=TrainConfig(
            steps=500, batch_size=16, evaluate_every=100, checkpoint_every=100, sample_prompt="The function returns"
        ),
    )
