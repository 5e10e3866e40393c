"""The text of a run of pretrain: its sources, what is read of them, and how the model is measured on them."""

import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from nanoflax import data, parallel, report, tokenizers, train
from nanoflax.config import Config, TextData
from nanoflax.runs.trainer import TrainingData
from nanoflax.runs.vocabulary import existing_tokenizer, train_on_first_process

TRAINING = 1  # of a tokenizer's cache key; changes with tokenizers.train_sentencepiece and how text is read and cleaned


def tokenizer_texts(config: Config) -> Iterator[str]:
    """The documents that train a tokenizer, in the proportions in which the run reads the sources of a mixture."""
    text = config.data
    assert isinstance(text, TextData)  # see pretrain.check
    sources = data.sources_of(text)
    if len(sources) == 1:
        return data.documents(next(iter(sources.values())), "train")
    return data.mixed_documents(sources, data.stages_of(text, config.train.steps), config.train.steps)


def text_tokenizer(config: Config, directory: str) -> Any:
    """The tokenizer of the run in directory, or of a new run."""
    found = known_tokenizer(config, directory)
    return train_tokenizer(config, directory) if found is None else found


def known_tokenizer(config: Config, directory: str) -> Any:
    """`text_tokenizer`, or None if it must be trained. A source of tokens has one, so none is trained."""
    assert isinstance(config.data, TextData)  # see pretrain.check
    names = [source.name for source in data.sources_of(config.data).values() if source.name.startswith("tokens:")]
    given = data.made_tokenizer(names[0]) if names else None
    found = existing_tokenizer(config.data, directory, given)
    if names and found is given:
        print(f"tokenizer: that of {names[0]}, not a new one of data.tokenizer={config.data.tokenizer}")
    return found


def train_tokenizer(config: Config, directory: str) -> Any:
    """A tokenizer trained on the text, for the run in directory. Its model is cached on disk."""
    d, t = config.data, config.train
    assert isinstance(d, TextData)  # see pretrain.check
    kind, size = tokenizers.parse(d.tokenizer)
    sources = data.sources_of(d)
    for source in sources.values():
        data.check_segmentations(source, kind=kind)
    read = {name: data.settings_of(source.without_segmentations()) for name, source in sources.items()}
    texts = [[name, read[name], data.source_version(source)] for name, source in sources.items()]
    if len(sources) > 1:
        texts.append([t.steps, [[stage.step, stage.counts] for stage in data.stages_of(d, t.steps) or ()]])
    version = [TRAINING, importlib.metadata.version("sentencepiece")]
    make = lambda: tokenizers.train_sentencepiece(tokenizer_texts(config), size, kind).model
    cached = lambda: data.cached("tokenizer", [*version, kind, size, texts], make, d.cache or None)
    return train_on_first_process(lambda: tokenizers.SentencePieceTokenizer(cached()), directory)


def read_text(
    config: Config, mesh: jax.sharding.Mesh, model: Any, tokenizer: Any, sample: Callable[[Any], str]
) -> TrainingData:
    """The TrainingData: windows of both splits of each source, whose tokens are cached on disk.

    sample: a function of the parameters, the text to print after the losses of an evaluation.
    """
    t = config.train
    stores, held_out = (prepare_split(config, tokenizer, split) for split in ("train", "validation"))
    batches = training_batches(config, stores, parallel.own_rows(mesh, t.batch_size))
    lines = store_lines(stores, "training") + store_lines(held_out, "validation") + reading_lines(batches, config)
    print("\n".join(lines))
    measures = None
    if isinstance(batches, data.Mixture):
        measures = lambda step: {f"epoch/{name}": n for name, n in batches.epochs(step).items()}
    identity = {
        "tokenizer": tokenizer.fingerprint,
        "data": training_fingerprint(batches),
        "validation": _fingerprint(held_out),
    }
    evaluate = _evaluation(config, mesh, model, held_out, sample)
    return TrainingData(batches, evaluate, identity, t.batch_size * config.window, measures)


def prepare_split(config: Config, tokenizer: Any, split: str) -> dict[str, data.TokenStore]:
    """{name of a source: the tokens of one of its splits, train or validation}, cached on disk."""
    d = config.data
    assert isinstance(d, TextData)  # see pretrain.check
    sources = data.sources_of(d) if split == "train" else data.validation_of(d)
    options = d.cache or None, d.workers or None, parallel.is_main_process()
    stores = {}
    for name, source in sources.items():
        with data.field_of_source(sources, name):
            stores[name] = data.prepare(source, tokenizer, split, *options)
    return stores


def store_lines(stores: Mapping[str, data.TokenStore], title: str) -> list[str]:
    """Lines that tell the size of a split of each source, and what is wrong in its text."""
    lines = []
    for name, store in stores.items():
        lines.append(
            f"{title}{' of ' * bool(name)}{name}: {store.n_documents:,} documents, "
            f"{report.format_bytes(store.n_bytes)} of text, {report.format_count(store.n_tokens)} tokens"
        )
        lines += [f"  {line}" for line in store.report]
    return lines


def windows_of(config: Config, stores: Mapping[str, data.TokenStore]) -> dict[str, data.Windows]:
    assert isinstance(config.data, TextData)  # see pretrain.check
    isolated = config.data.packing == "isolated"
    return {name: data.Windows(store, config.window, isolated) for name, store in stores.items()}


def training_batches(
    config: Config, stores: Mapping[str, data.TokenStore], host_rows: Sequence[int] | None = None
) -> data.Batches | data.Mixture:
    """The batches that a run trains on: a Mixture if there are several sources. host_rows: see data.Batches."""
    t, windows = config.train, windows_of(config, stores)
    if len(windows) == 1:
        (of_source,) = windows.values()
        return data.Batches(of_source, t.batch_size, t.seed, True, host_rows, window_ranges(config, of_source))
    assert isinstance(config.data, TextData)  # see pretrain.check
    return data.Mixture(windows, data.stages_of(config.data, t.steps), t.batch_size, t.seed, host_rows)


def window_ranges(config: Config, windows: data.Windows) -> dict[int, range]:
    """{first step: windows} of a run on one source: all of them, or those of random segmentations and then the best."""
    assert isinstance(config.data, TextData)  # see pretrain.check
    n, end_of_best = len(windows), windows.store.n_best_tokens // windows.length
    if not 0 < end_of_best < n:
        return {0: range(n)}
    until = round(config.data.segmentation_until * config.train.steps)
    return {0: range(end_of_best, n), until: range(end_of_best)} if until else {0: range(end_of_best)}


def reading_lines(batches: data.Batches | data.Mixture, config: Config) -> list[str]:
    """Lines that tell what the steps read, if not always all of one source."""
    steps = config.train.steps
    if isinstance(batches, data.Mixture):
        return mixture_table(batches, steps, config.window).splitlines()
    if len(batches.ranges) == 1:
        return []
    until = max(batches.ranges)
    if until >= steps:
        return ["all steps read random segmentations"]
    return [f"steps 0 to {until - 1:,} read random segmentations, steps {until:,} to {steps - 1:,} the best ones"]


def training_fingerprint(batches: data.Batches | data.Mixture) -> str:
    """The fingerprint of the training data: the store's, or of a mixture a hash over its sources and its stages."""
    if isinstance(batches, data.Batches):
        return batches.windows.store.fingerprint
    stores = {name: windows.store for name, windows in batches.windows.items()}
    return _fingerprint(stores, [[stage.step, stage.counts] for stage in batches.stages])


def _fingerprint(stores: Mapping[str, data.TokenStore], stages: Any = None) -> str:
    """The fingerprint of one store; of several, a hash over their names, their fingerprints and the stages."""
    if len(stores) == 1:
        return next(iter(stores.values())).fingerprint
    parts = [[[name, store.fingerprint] for name, store in stores.items()], stages]
    return hashlib.blake2b(report.to_json(parts).encode(), digest_size=16).hexdigest()


def _evaluation(
    config: Config,
    mesh: jax.sharding.Mesh,
    model: Any,
    stores: Mapping[str, data.TokenStore],
    sample: Callable[[Any], str],
) -> Callable[[Any, int], tuple[dict[str, float], str]]:
    """The function TrainingData.evaluate: the loss on the windows of all stores together, and on those of each."""
    score = train.make_evaluation(model, config, mesh)
    windows = windows_of(config, stores)

    def evaluate(params: Any, step: int) -> tuple[dict[str, float], str]:
        sums = {name: score(params, of_source) for name, of_source in windows.items()}
        nats, tokens = map(math.fsum, zip(*sums.values(), strict=True))
        metrics = {"validation_loss": nats / tokens}
        if not config.train.evaluate_batches:
            metrics["bits_per_byte"] = nats / math.log(2) / sum(store.n_bytes for store in stores.values())
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()]
        if len(sums) > 1:
            for name, (of_source, n) in sums.items():
                metrics[f"validation_loss/{name}"] = of_source / n
                shown.append(f"{name} {of_source / n:.4f}")
        text = "\n  | ".join(sample(params).splitlines())
        return metrics, f"step {step}: {'  '.join(shown)}" + (f"\n  | {text}" if text else "")

    return evaluate


def mixture_table(mixture: data.Mixture, steps: int, window: int) -> str:
    """A table as text: what each stage reads of each source, in tokens and in epochs. window: tokens of a row."""
    table = [("steps", "source", "rows", "share", "tokens", "epochs")]
    begins = [stage.step for stage in mixture.stages]
    spans = [*zip(begins, [*begins[1:], steps], mixture.stages, strict=True)]
    for begin, end, stage in [*spans, (0, steps, None)] if len(spans) > 1 else spans:
        before, after = (mixture.schedule.rows_before(step * mixture.batch_size) for step in (begin, end))
        label = f"{begin:,} to {end - 1:,}" if stage else "all"
        for name, rows in zip(mixture.names, (after - before).tolist(), strict=True):
            if stage and name not in stage.counts:
                continue
            counts = f"{stage.counts[name]} of {stage.block}" if stage else ""
            share = rows / ((end - begin) * mixture.batch_size)
            epochs = rows / len(mixture.windows[name])
            table.append((label, name, counts, f"{share:.1%}", report.format_count(rows * window), f"{epochs:.2f}"))
            label = ""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pad = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust]
    return "\n".join("  ".join(f(x, n) for f, x, n in zip(pad, row, widths, strict=True)) for row in table)
