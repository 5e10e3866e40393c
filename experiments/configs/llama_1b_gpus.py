"""Llama 3.2 1B from scratch on one node.

Command:   python -m experiments.pretrain --config=llama_1b_gpus --workdir=runs/llama_1b_gpus
Hardware:  eight GPUs of 80 GB (--devices=8 --chip=h100)
Data:      prepare tfds:NAME first; data.tokenizer: at most 128,256 pieces, such as a tokenizer directory
Figure:    projected by experiments.plan: at least 0.40 s a step and 20.2 GiB a GPU, at most 75% MFU (blocks
           are computed twice). Not trained.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("llama-1b", context=4096),
        data=TextData(train="tfds:openwebtext", tokenizer="bpe:128000", validation_fraction=0.0005),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000, schedule="cosine"),
        train=TrainConfig(
            steps=300_000,
            batch_size=64,
            mesh="1,8,1",
            remat="blocks",
            scan_layers=True,
            loss_chunks=8,
            evaluate_every=1000,
            evaluate_batches=50,
            checkpoint_every=1000,
            sample_tokens=0,
        ),
    )
