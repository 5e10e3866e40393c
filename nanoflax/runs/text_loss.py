"""How well a language model predicts a text: loss, perplexity and bits per byte."""

import dataclasses
import math
from typing import Any

from nanoflax import config as configs
from nanoflax import data, tasks, train

MAX_TOKENS = 8192  # in a batch of an imported model: with more, the attention scores of a long context fill the memory


def open_text(run: Any, name: str, split: str, fields: str | None) -> dict[str, data.TokenStore]:
    """{name: the tokens of a source of text}, by the settings of a Run; several if the text is a mixture.

    name: empty for the run's own validation data. split, fields: as in Run.evaluate. Raises: UserError for a source
    that cannot be read.
    """
    text = configs.as_kind(configs.TextData, run.config.data)
    sources = data.sources_of(text, name) if name else data.validation_of(text)
    if fields is not None:
        field = tasks.TaskSource(name, fields=fields).renamed_fields(tasks.Text).get("text", "text")
        sources = {key: dataclasses.replace(source, field=field) for key, source in sources.items()}
    split, cache = split if name else "validation", text.cache or None
    with data.field_flag("--fields", "text="):
        return {
            key: data.prepare(source.without_segmentations(), run.tokenizer, split, cache)
            for key, source in sources.items()
        }


def over_windows(
    run: Any, stores: dict[str, data.TokenStore], mesh: Any, params: dict
) -> dict[str, tuple[float, float]]:
    """{name: (the cross entropy in nats, the predicted tokens) of a store}, summed over windows as in training.

    params: on the mesh.
    """
    c = run.config
    isolated = configs.as_kind(configs.TextData, c.data).packing == "isolated"
    rows = c.train.batch_size if run.workdir else max(1, min(c.train.batch_size, MAX_TOKENS // c.window))
    every_batch = dataclasses.replace(c, train=dataclasses.replace(c.train, evaluate_batches=0, batch_size=rows))
    score = train.make_evaluation(run.model, every_batch, mesh)
    return {name: score(params, data.Windows(store, c.window, isolated)) for name, store in stores.items()}


def text_metrics(
    run: Any, name: str, stores: dict[str, data.TokenStore], sums: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """loss (nats per token), perplexity and bits per byte of a text, as JSON values.

    sums: of each store, the nats and the predicted tokens. Of several stores, also the loss of each, loss/NAME.
    """
    nats, tokens = map(math.fsum, zip(*sums.values(), strict=True))
    n_bytes = sum(store.n_bytes for store in stores.values())
    several = {f"loss/{key}": of_source / n for key, (of_source, n) in sums.items()} if len(sums) > 1 else {}
    return {
        "data": name or getattr(run.config.data, "validation", "") or f"{run.config.data.train} (validation)",
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        **several,
        "documents": sum(store.n_documents for store in stores.values()),
        "tokens": int(tokens),
        "bytes": n_bytes,
        "report": [f"{key}: {line}" if several else line for key, store in stores.items() for line in store.report],
    }
