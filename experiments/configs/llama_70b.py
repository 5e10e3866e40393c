"""Llama 3 70B from scratch, at 4,096 tokens a chip.

Command:   python -m experiments.pretrain --config=llama_70b --workdir=runs/llama_70b
Hardware:  a TPU v5p-512 slice, which has 256 chips (--topology=v5p:4x8x8)
Data:      prepare tfds:NAME first; data.tokenizer: at most 128,256 pieces, such as a tokenizer directory
Figure:    projected by experiments.plan: at least 5.3 s a step and 43.4 GiB a chip (the TPU compiler: 44.7 in
           use, 53.0 reserved), at most 75% MFU (blocks are computed twice). Not trained.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("llama-70b", context=4096),
        data=TextData(train="tfds:openwebtext", tokenizer="bpe:128000", validation_fraction=0.0005),
        optim=OptimConfig(name="adamw", learning_rate=1.5e-4, warmup_steps=2000, schedule="cosine"),
        train=TrainConfig(
            steps=300_000,
            batch_size=256,
            mesh="8,32,1",
            remat="blocks",
            scan_layers=True,
            loss_chunks=8,
            evaluate_every=1000,
            evaluate_batches=50,
            checkpoint_every=1000,
            sample_tokens=0,
        ),
    )
