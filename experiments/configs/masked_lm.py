"""Masked language modelling (BERT) on Python's documentation, from scratch.

Command:   python -m experiments.finetune --config=masked_lm --workdir=runs/masked
           Continue with an encoder: --config.model.init_from=SOURCE; with your own texts:
           --config.data.train=jsonl:FILE or text:GLOB. `classify` and `tag` start from
           runs/masked/final
Hardware:  two CPU cores with other work too, 18 minutes (1,044 s of processor time)
Figure:    29.1% of the masked tokens guessed right, perplexity 62.2. With BERT's transform in the head
           (model.mlm_transform=True) 30.2% and 52.9, but Transformers can then not open the model: its class
           for these layers, EuroBERT, has no transform.
"""

from nanoflax.config import Config, ExampleData, MaskedLM, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset("nano-1m", architecture="encoder", head="mlm", mlm_transform=False, dim=192, heads=6),
        data=ExampleData(train="pydocs", tokenizer="bpe:2048"),
        optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=20, schedule="linear", end_factor=0.05),
        task=MaskedLM(length=128),
        train=TrainConfig(steps=600, batch_size=32, evaluate_every=200, evaluate_batches=10, checkpoint_every=200),
    )
