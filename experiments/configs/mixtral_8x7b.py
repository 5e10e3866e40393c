"""A mixture of 8 experts with the shape of Mixtral 8x7B from scratch, at 2,048 tokens a chip.

Command:   python -m experiments.pretrain --config=mixtral_8x7b --workdir=runs/mixtral_8x7b
Hardware:  a TPU v5e-256 or v6e-256 slice (--topology=v5e:16x16 or v6e:16x16)
Data:      prepare tfds:NAME first; data.tokenizer: at most 32,000 pieces, such as a tokenizer directory
Figure:    projected by experiments.plan: at least 1.1 s a step and 8.1 GiB a chip on v5e:16x16 (the TPU compiler,
           libtpu 0.0.50 with jax 0.12: 8.3 in use, 11.6 reserved; libtpu 0.0.42 ends with an internal error), at most
           75% MFU (blocks are computed twice). Not trained.
"""

from nanoflax.config import Config, OptimConfig, TextData, TrainConfig, preset


def get_config():
    return Config(
        model=preset("mixtral-8x7b", context=2048),
        data=TextData(train="tfds:openwebtext", tokenizer="bpe:32000", validation_fraction=0.0005),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000, schedule="cosine"),
        train=TrainConfig(
            steps=300_000,
            batch_size=256,
            mesh="1,16,2,1,8",
            remat="blocks",
            scan_layers=True,
            loss_chunks=8,
            evaluate_every=1000,
            evaluate_batches=50,
            checkpoint_every=1000,
            sample_tokens=0,
        ),
    )
