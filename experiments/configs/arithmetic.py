"""Sums and differences of numbers below 100, such as "37-58=-21", for a small policy that grpo improves.

Command:   python -m experiments.finetune --config=arithmetic --workdir=runs/arithmetic
Hardware:  two CPU cores with much other work, 1 min 32 s
Figure:    35.9% of 926 held-out answers right (the first evaluation of grpo). It stops early on purpose: 1,000 steps
           give 18.7%, 1,300 give 77.9%, 2,000 give 97.9% of 512.
"""

from nanoflax.config import Config, ExampleData, LanguageModel, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context=32, layers=2, dim=64, heads=4, norm="rmsnorm", gated=True, bias=False, positions="rotary"
        ),
        data=ExampleData(train="arithmetic:2", tokenizer="bytes"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
        task=LanguageModel(length=16),
        train=TrainConfig(steps=1200, batch_size=64, evaluate_every=300, checkpoint_every=300),
    )
