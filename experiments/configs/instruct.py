"""Instructions and replies: "Write the docstring of `textwrap.dedent(text)`.", and the docstring.

Command:   python -m experiments.finetune --config=instruct --workdir=runs/instruct \\
               --config.model.init_from=SOURCE --config.peft.kind=lora
           (SOURCE may be SmolLM2-135M-Instruct, which a package carries: see the README. Without
           one, from scratch. --config.data.train=jsonl:FILE reads messages of your own.)
Hardware:  two CPU cores
Figure:    SmolLM2-135M-Instruct with LoRA (1.78% of the parameters, 9.8 MB) by 60 steps of 4
           (train.evaluate_every=30, evaluate_batches=12, optim.warmup_steps=5): perplexity of
           held-out replies 28.0 before, 19.3 after 30 steps (10 minutes), 18.7 after 60, 16 min 47 s
           in all. From scratch not measured.
"""

from nanoflax.config import Config, ExampleData, Instruct, ModelConfig, OptimConfig, TrainConfig


def get_config():
    return Config(
        model=ModelConfig(
            layers=4,
            dim=256,
            heads=4,
            context=256,
            norm="rmsnorm",
            activation="silu",
            gated=True,
            positions="rotary",
            bias=False,
        ),
        data=ExampleData(train="pychats", tokenizer="bpe:2048"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10, schedule="linear", end_factor=0.0),
        task=Instruct(length=256),
        train=TrainConfig(steps=200, batch_size=8, evaluate_every=50, evaluate_batches=10, checkpoint_every=50),
    )
