"""GPT-2 124M on web text, with GPT-2's batch of 0.5M tokens.

Command:   python -m experiments.pretrain --config=gpt2_124m --workdir=runs/gpt2_124m
Hardware:  eight GPUs of 80 GB, or a TPU v4-16 or v5e-16 slice
Data:      any TensorFlow data set with a text feature; prepare it first, on a machine with a network:
           --config.data.train=tfds:NAME:FIELD
Figure:    not measured.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("gpt2", vocab_size=32_000),
        data=TextData(train="tfds:openwebtext", tokenizer="bpe:32000", validation_fraction=0.0005),
        optim=OptimConfig(name="adamw", learning_rate=6e-4, warmup_steps=2000, schedule="cosine", weight_decay=0.1),
        train=TrainConfig(
            steps=600_000,
            batch_size=480,
            accumulate=5,
            evaluate_every=1000,
            evaluate_batches=50,
            checkpoint_every=1000,
            keep=3,
            mesh="-1,1,1",
            sample_prompt="Once upon a time",
            sample_tokens=128,
        ),
    )
