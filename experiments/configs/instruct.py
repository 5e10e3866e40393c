"""Instructions and replies, such as "Write the docstring of `textwrap.dedent(text)`." and the docstring.

Command:   python -m experiments.finetune --config=instruct --workdir=runs/instruct \\
               --config.model.init_from=SOURCE --config.peft.kind=lora
           SOURCE: for example SmolLM2-135M-Instruct (README). Your own chats:
           --config.data.train=jsonl:FILE
Hardware:  two CPU cores, 17 minutes for 60 steps of 4 with SmolLM2-135M-Instruct and LoRA
Figure:    perplexity of held-out replies 28.0 before, 19.3 after 30 steps, 18.7 after 60, with 1.78% of
           the parameters trained (9.8 MB; train.evaluate_every=30, evaluate_batches=12,
           optim.warmup_steps=5). From scratch, 200 steps: perplexity 292 (evaluate_batches=0).
           With --config.task.packing=best_fit --config.train.batch_size=3 the 200 steps from scratch read 1,699
           examples instead of 1,600, in 0.69 times the processor time: perplexity 249.
"""

from nanoflax.config import Config, ExampleData, Instruct, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-5m"),
        data=ExampleData(train="pychats", tokenizer="bpe:2048"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10, schedule="linear", end_factor=0.0),
        task=Instruct(length=256),
        train=TrainConfig(steps=200, batch_size=8, evaluate_every=50, evaluate_batches=10, checkpoint_every=50),
    )
