"""How well a language model predicts a text: loss, perplexity and bits per byte."""

import dataclasses
import math
from typing import Any

from nanoflax import config as configs
from nanoflax import data, tasks, train

MAX_TOKENS = 8192  # in a batch of an imported model: with more, the attention scores of a long context fill the memory


def open_text(run: Any, name: str, split: str, fields: str | None) -> data.TokenStore:
    """The tokens of a source of text, by the settings of a Run. name: empty for the run's own validation data.
    split, fields: as in Run.evaluate.

    Raises: UserError for a source that cannot be read.
    """
    text = configs.as_kind(configs.TextData, run.config.data)
    source = data.source_of(text, name)
    if fields is not None:
        field = tasks.TaskSource(name, fields=fields).renamed_fields(tasks.Text).get("text", "text")
        source = dataclasses.replace(source, field=field)
    return data.prepare(source, run.tokenizer, split if name else "validation", text.cache or None)


def over_windows(run: Any, store: data.TokenStore, mesh: Any, params: dict) -> tuple[float, float]:
    """(the cross entropy in nats, the predicted tokens), summed over windows as in training. params: on the mesh."""
    c = run.config
    windows = data.Windows(store, c.window, configs.as_kind(configs.TextData, c.data).packing == "isolated")
    rows = c.train.batch_size if run.workdir else max(1, min(c.train.batch_size, MAX_TOKENS // c.window))
    every_batch = dataclasses.replace(c, train=dataclasses.replace(c.train, evaluate_batches=0, batch_size=rows))
    return train.make_evaluation(run.model, every_batch, mesh)(params, windows)


def text_metrics(run: Any, name: str, store: data.TokenStore, nats: float, tokens: float) -> dict[str, Any]:
    """loss (nats per token), perplexity and bits per byte of a text, as JSON values. nats: the sum over `tokens`."""
    return {
        "data": name or f"{run.config.data.train} (validation)",
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / store.n_bytes,
        "documents": store.n_documents,
        "tokens": int(tokens),
        "bytes": store.n_bytes,
        "report": store.report,
    }
