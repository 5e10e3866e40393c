"""T5 11B from scratch by span corruption, in T5's batches of 2,048 sources of 512 tokens.

Command:   python -m experiments.finetune --config=t5_11b --workdir=runs/t5_11b
Hardware:  a TPU v6e-256 slice (--topology=v6e:16x16)
Data:      --config.data.train=text:GLOB; data.tokenizer: at most 32,000 pieces, such as a tokenizer directory
           (100 sentinels follow them)
Figure:    projected by experiments.plan for targets as long as sources: 9.1 GiB a chip on v6e:16x16. Not trained.
"""

from nanoflax.config import Config, Denoise, ExampleData, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset("t5-11b"),
        data=ExampleData(train="text:corpus/*.txt", tokenizer="bpe:32000"),
        optim=OptimConfig(
            name="adafactor", learning_rate=1e-2, warmup_steps=10_000, schedule="cosine", weight_decay=0.0
        ),
        task=Denoise(length=512, target_length=128),
        train=TrainConfig(
            steps=500_000,
            batch_size=2048,
            mesh="8,4,8",
            remat="blocks",
            scan_layers=True,
            loss_chunks=8,
            evaluate_every=1000,
            evaluate_batches=16,
            checkpoint_every=1000,
        ),
    )
