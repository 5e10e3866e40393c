"""A decoder goes on with text of your own; without any, it reads Python's documentation.

Command:   python -m experiments.finetune --config=language_model --workdir=runs/own \\
               --config.data.train='text:notes/*.md' --config.model.init_from=SOURCE
           (jsonl:FILE too; SOURCE is a workdir, a Transformers directory, a hub name or a .gguf;
           --config.peft.kind=lora trains little. Without a SOURCE, from scratch.)
Hardware:  two CPU cores, from scratch 4 minutes
Figure:    from scratch a perplexity of 167 a token: the rate is one to go on with. `pretrain` takes
           the same text further.
"""

from nanoflax.config import Config, ExampleData, LanguageModel, ModelConfig, OptimConfig, TrainConfig


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
        data=ExampleData(train="pydocs", tokenizer="bpe:2048"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, schedule="linear", end_factor=0.0),
        task=LanguageModel(length=256),
        train=TrainConfig(steps=200, batch_size=16, evaluate_every=100, evaluate_batches=10, checkpoint_every=100),
    )
