"""What a user writes about a mixture: named sources, and their weights by stage.

    data.train    web=text:web/**/*.jsonl; code=text:code/**/*.jsonl
    data.mixture  0: web=0.8,code=0.2; 8000: web=0.5,code=0.5

Both can be in one file, data.train=mixture:FILE, one source or one stage on a line; lines with # are comments.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from nanoflax.config import TextData
from nanoflax.data.report import field_flag
from nanoflax.data.source import Source, source_of
from nanoflax.errors import UserError

MAX_BLOCK = 1000  # rows; weights that need more are rounded
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
STEP = re.compile("[0-9]{1,12}")
NAMES = "a NAME begins with a letter and has letters, digits, _ . and -"
WEIGHT = re.compile(r"\d{1,12}(\.\d{0,12})?|\.\d{1,12}|\d{1,12}/[1-9]\d{0,11}")
Weights = Mapping[str, Fraction]


@dataclasses.dataclass(frozen=True)
class Stage:
    """From this step on, each block of rows has `counts[name]` rows of each source; the others have none."""

    step: int
    counts: Mapping[str, int]

    @property
    def block(self) -> int:
        return sum(self.counts.values())


def is_mixture(text: str) -> bool:
    """Whether data.train has the form NAME=SOURCE; NAME=SOURCE, not that of one source."""
    return bool(re.match(rf"\s*{NAME.pattern}\s*=", text))


def parse_names(text: str, setting: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE; NAME=VALUE. A first VALUE without a name has the name "".

    setting: its name in messages. Raises: UserError for any other form.
    """
    found = {}
    for i, entry in enumerate(filter(None, map(str.strip, text.split(";")))):
        name, equals, value = (x.strip() for x in entry.partition("="))
        if not (equals and NAME.fullmatch(name)) and i == 0 and not is_mixture(text):
            name, value = "", entry
        elif not (equals and NAME.fullmatch(name) and value):
            raise UserError(f"{setting}: {entry!r} is not NAME=VALUE; {NAMES}, and values are divided by ;")
        if name in found:
            raise UserError(f"{setting}: the name {name} occurs twice; each source needs its own")
        found[name] = value
    return found


def parse_stages(text: str, names: Sequence[str], steps: int) -> list[Stage]:
    """The stages of data.mixture, such as 0: web=0.8,code=0.2; 8000: web=0.5,code=0.3,math=0.2.

    names: of all sources. steps: train.steps. A text without "0:" is one stage. Weights are decimal numbers or
    fractions (1/3); only their ratios matter. Raises: UserError for unknown or unused names, weights that are not
    positive, and steps that do not begin at 0, ascend and stay below train.steps.
    """
    stages: list[Stage] = []
    for i, entry in enumerate(filter(None, map(str.strip, text.split(";")))):
        before, colon, weights = entry.rpartition(":")
        if not (STEP.fullmatch(before.strip()) if colon else i == 0):
            raise UserError(f"data.mixture: {entry!r} is not STEP: NAME=WEIGHT,NAME=WEIGHT")
        step = int(before) if colon else 0
        if i == 0 and step:
            raise UserError(f"data.mixture: the first stage begins at step {step}; it must begin at step 0")
        if i and step <= stages[-1].step:
            raise UserError(f"data.mixture: step {step} comes after step {stages[-1].step}; the steps must ascend")
        if step >= steps:
            raise UserError(f"data.mixture: the stage at step {step} never begins: train.steps={steps}")
        where = f"data.mixture, stage at step {step}"
        stages.append(Stage(step, block_counts(_parse_weights(weights, names, where), where)))
    if unused := [name for name in names if not any(name in stage.counts for stage in stages)]:
        raise UserError(f"data.mixture: no stage uses {', '.join(unused)}; give a weight, or remove it from data.train")
    return stages


def _parse_weights(text: str, names: Sequence[str], where: str) -> dict[str, Fraction]:
    weights = {}
    for entry in map(str.strip, text.split(",")):
        name, _, weight = (x.strip() for x in entry.partition("="))
        if name not in names:
            raise UserError(f"{where}: {entry!r} is not NAME=WEIGHT with a name of data.train: {', '.join(names)}")
        if name in weights:
            raise UserError(f"{where}: {name} occurs twice")
        if not WEIGHT.fullmatch(weight) or not Fraction(weight):
            raise UserError(f"{where}: the weight {weight!r} of {name} must be a positive number, such as 0.8 or 1/3")
        weights[name] = Fraction(weight)
    return weights


def block_counts(weights: Weights, where: str) -> dict[str, int]:
    """{name: rows in a block}: the smallest block in which the counts have exactly the ratios of the weights.

    If it is larger than MAX_BLOCK, a block has MAX_BLOCK rows, rounded by the largest remainders.
    Raises: UserError, which begins with `where`, if a weight gets no row.
    """
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    block = min(math.lcm(*(share.denominator for share in shares.values())), MAX_BLOCK)
    counts = {name: int(share * block) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * block)  # stable: ties by order
    for name in by_remainder[: block - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"{where}: {name} has a share of {float(shares[name]):.2g}, less than one row in {MAX_BLOCK:,}; give "
                "it a larger weight in data.mixture"
            )
    return counts


def with_mixture_file(config: TextData) -> TextData:
    """The TextData with the text of the file in place of data.train=mixture:FILE. Raises: UserError."""
    if not config.train.startswith("mixture:"):
        return config
    path = os.path.expanduser(config.train.removeprefix("mixture:").strip())
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.train={config.train}: {path} cannot be read: {error}") from error
    one_stage = re.compile(rf"{NAME.pattern}\s*=\s*({WEIGHT.pattern})\s*(,.*)?;?")
    stages = [line for line in lines if line[0].isdecimal() or one_stage.fullmatch(line)]
    sources = "; ".join(line.rstrip(";") for line in lines if line not in stages)
    if not is_mixture(sources):
        raise UserError(f"data.train={config.train}: {path} has no line of the form NAME=SOURCE")
    if stages and config.mixture:
        raise UserError(f"data.mixture={config.mixture!r}: {path} has stages too; give the weights in one place")
    weights = "; ".join(line.rstrip(";") for line in stages)
    return dataclasses.replace(config, train=sources, mixture=weights or config.mixture)


def sources_of(config: TextData, name: str = "") -> dict[str, Source]:
    """{name: Source} of data.train, or of other text, read with the same settings; a single source has the name "".

    Raises: UserError for a mixture that is not well formed, and for names in other settings that it does not have.
    """
    other, of_mixture = bool(name), is_mixture(config.train)
    config = with_mixture_file(dataclasses.replace(config, train=name, mixture="", validation="") if other else config)
    if not is_mixture(config.train):
        if config.mixture:
            raise UserError(
                f"data.mixture={config.mixture!r} needs named sources in data.train, as NAME=SOURCE; NAME=SOURCE"
            )
        # Of a run on a mixture, other text is in the field that sources have by default.
        field = (
            parse_names(config.field, "data.field").get("", TextData.field) if other and of_mixture else config.field
        )
        if re.match(r"[^:;]*=\s*(pydocs|[a-z]+:)", config.train):
            raise UserError(f"data.train: {config.train!r} is not NAME=SOURCE; {NAMES}")
        if re.search(r";\s*(pydocs|[a-z]+:)", config.train):
            raise UserError(f"{config.train!r}: several sources need names; write NAME=SOURCE; NAME=SOURCE")
        return {"": source_of(dataclasses.replace(config, field=field), name or None)}
    if config.segmentations and not other:
        raise UserError(
            f"data.segmentations={config.segmentations} is for one source; for a source of a mixture set it in "
            "experiments.tokenize, and name tokens:DIRECTORY"
        )
    named = parse_names(config.train, "--data" if other else "data.train")
    fields, validation = parse_names(config.field, "data.field"), parse_names(config.validation, "data.validation")
    default = fields.get("", TextData.field)
    for setting, found in (("field", {} if other else fields), ("validation", validation)):
        if unknown := [key for key in found if key not in ("", *named)]:
            raise UserError(f"data.{setting}: data.train has no source {', '.join(unknown)}; it has {', '.join(named)}")
    if "" in validation and len(validation) > 1:
        raise UserError("data.validation: give one source for all, or NAME=SOURCE for each source that has one")
    found = {}
    for key, source in named.items():
        own = TextData.field if source.startswith("tokens:") else default  # tokens have no field
        settings = {"field": fields.get(key, own), "train": source, "mixture": ""}
        settings["validation"] = validation.get(key, validation.get("", ""))
        of_key = source_of(dataclasses.replace(config, **settings), source if other else None)
        of_validation = "" if key in validation or not of_key.validation else default
        of_evaluation = default if of_key.quality.evaluation else ""
        found[key] = dataclasses.replace(of_key, validation_field=of_validation, evaluation_field=of_evaluation)
    return found


@contextlib.contextmanager
def field_of_source(sources: Mapping[str, Source], name: str) -> Iterator[None]:
    """A FieldError of this source of a mixture, inside, tells how data.field names the field of one of its sources."""
    others = [f"{key}={x.field}" for key, x in sources.items() if key != name and x.field != TextData.field]
    prefix = "; ".join([TextData.field, *others, f"{name}="]) if len(sources) > 1 else ""
    with field_flag("--config.data.field", prefix):
        yield


def validation_of(config: TextData) -> dict[str, Source]:
    """{name: Source} whose splits "validation" the run is measured on: of each source of data.train, or one with the
    name "" if data.validation is one source for all."""
    config = with_mixture_file(config)
    sources = sources_of(config)
    if not is_mixture(config.train) or not config.validation or is_mixture(config.validation):
        return sources
    return {"": next(iter(sources.values()))}


def stages_of(config: TextData, steps: int) -> list[Stage] | None:
    """The stages of data.mixture in a run of train.steps steps; None if it is empty. Raises: UserError; see
    parse_stages."""
    config = with_mixture_file(config)
    return parse_stages(config.mixture, list(sources_of(config)), steps) if config.mixture else None
