"""Llama 3 8B from scratch, at 4,096 tokens a chip.

Command:   python -m experiments.pretrain --config=llama_8b --workdir=runs/llama_8b
Hardware:  a TPU v5e-256 or v6e-256 slice (--topology=v5e:16x16 or v6e:16x16)
Data:      prepare tfds:NAME first; data.tokenizer: at most 128,256 pieces, such as a tokenizer directory
Figure:    projected by experiments.plan: at least 1.4 s a step and 10.8 GiB a chip on v5e:16x16 (the TPU
           compiler: 12.0), at most 75% MFU (blocks are computed twice). Not trained.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("llama-8b", context=4096),
        data=TextData(train="tfds:openwebtext", tokenizer="bpe:128000", validation_fraction=0.0005),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000, schedule="cosine"),
        train=TrainConfig(
            steps=300_000,
            batch_size=256,
            mesh="16,16,1",
            remat="blocks",
            scan_layers=True,
            loss_chunks=8,
            evaluate_every=1000,
            evaluate_batches=50,
            checkpoint_every=1000,
            sample_tokens=0,
        ),
    )
