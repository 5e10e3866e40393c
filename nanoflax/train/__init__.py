"""One training step as a pure function, its state, objectives and optimizers, and the loop."""

from nanoflax.train.loop import Tracking, fit
from nanoflax.train.objectives import (
    Batch,
    Sums,
    causal_lm,
    classify,
    dropout,
    guesses,
    hidden_options,
    map_logits,
    masked_lm,
    seq2seq,
    tag,
)
from nanoflax.train.optim import make_optimizer, path_of
from nanoflax.train.state import TrainState, abstract_batch, abstract_state, compile_init, init_state
from nanoflax.train.step import compile_step, jit_step, make_evaluation, make_train_step

__all__ = [
    "Batch", "Sums", "Tracking", "TrainState", "abstract_batch", "abstract_state", "causal_lm",
    "classify", "compile_init", "compile_step", "dropout", "fit", "guesses", "hidden_options",
    "init_state", "jit_step", "make_evaluation", "make_optimizer", "make_train_step", "map_logits", "masked_lm",
    "path_of", "seq2seq", "tag"]  # fmt: skip
