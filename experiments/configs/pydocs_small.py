"""A larger model of Python's documentation, which compresses better than `xz -9e` (1.84 bits per byte) and PPMd.

Command:   python -m experiments.pretrain --config=pydocs_small
Hardware:  one CPU core, 30 minutes at 2.8k tokens/s
Figure:    1.608 bits per byte (1.6077, Python 3.11.7; seeds 1 and 2: 1.596 and 1.611); 1.582 with
           `experiments.evaluate --stride=64`. For xz see pydocs_tiny; PPMd of order 16, which remembers whole phrases
           of the training text, needs 1.614.

The text has 562,000 tokens, so the steps go over it 8 times, and a model of this size learns it by heart: without much
dropout the validation loss rises. Bits per byte with the recipe of pydocs_tiny; one seed, one CPU core:

    L=6, D=256, bpe:4096, tied, dropout 0.1, one rate of 3e-3, 500 steps of 16 x 256 tokens     1.743
    L=4, D=192, unigram:4096, not tied, dropout 0.3, 2,000 steps of 8 x 256                     1.737
    L=6, D=256, unigram:4096, not tied, dropout 0.3, 1,200 steps of 16 x 256                    1.718
    L=4, D=192, dropout 0.3, T=256 after 1,250 steps of 2,048 tokens (dropout 0.1: 1.790)       1.803
    the same with dropout 0.2 and T=1024                                                        1.832

Random pieces of words (data.segmentations=8, Kudo 2018) make each epoch another one: with them the third row gains
until its last step, with dropout 0.2. A model that has only seen random pieces spreads its probability over all
segmentations of a word, and validation counts one: the last steps must read the best pieces. In two epochs, as of
pydocs_tiny, they gain nothing (1.808 with one random segmentation in the first half of the steps, 1.813 without).

    random pieces to the end                                                                    1.694
    the same with T=512: 1.697; weight decay 0.3 at step 800: 1.839 instead of                  1.793
    delta, delta and full attention in turn, at step 200: 2.011 instead of                      2.005
    random pieces in the first 70% of the steps                                                 1.624
    in the first 80%                                                                            1.608
"""

from nanoflax.config import Config, ModelConfig, OptimConfig, TextData, TrainConfig


def get_config():
    return Config(
        model=ModelConfig(
            layers=6,
            dim=256,
            heads=4,
            context=256,
            norm="rmsnorm",
            activation="silu",
            gated=True,
            positions="rotary",
            bias=False,
            tied=False,
            embed_scale=16,
            dropout=0.2,
        ),
        data=TextData(train="pydocs", tokenizer="unigram:4096", segmentations=8),
        optim=OptimConfig(
            name="muon",
            learning_rate=8e-3,
            muon_learning_rate=0.03,
            warmup_steps=10,
            schedule="linear",
            end_factor=0.05,
        ),
        train=TrainConfig(
            steps=1200, batch_size=16, evaluate_every=200, checkpoint_every=200, sample_prompt="The function returns"
        ),
    )
