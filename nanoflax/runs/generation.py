"""Text generation from prompts: settings, stop strings, and text in pieces while it is generated."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nanoflax import generate, speculation, tokenizers
from nanoflax.config import OF_LENGTH, OF_SAMPLING, GenerationDefaults, ModelConfig, fields
from nanoflax.constraints import Constraint
from nanoflax.errors import UserError
from nanoflax.runs.opening import open_draft

DEFAULT_NEW_TOKENS = 100
# The settings that each mode reads; an explicit setting that its mode does not read is refused. A penalty
# multiplies the log-probabilities of beams, as in Transformers, where it hardly changes likely tokens; so beams follow
# only the model's own.
_ALWAYS = {"max_new_tokens", "stop", "temperature", "beams"}
RULES = ("json_schema", "regex", "choices", "grammar")
GUESSES = ("draft", "lookup")
FILTERS = OF_SAMPLING[1:]  # all but the temperature
READ = {
    "sampling": _ALWAYS | {"repetition_penalty", "seed", *FILTERS, *GUESSES, *RULES},
    "temperature=0": _ALWAYS | {"repetition_penalty", *GUESSES, *RULES},
    "beams": _ALWAYS | {"length_penalty"},
}
_DRAWING = READ["sampling"] - READ["beams"] | {"temperature"}  # a given one asks for sampling
_UNSET = {"beams": 0, "lookup": False, "draft": ""} | generate.NO_EFFECT


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of text generation.

    max_new_tokens: None means the model's own limit, else 100, or fewer if the model's context is too short.
    temperature: 0 is greedy. top_k, top_p, min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff: the filters of
    `nanoflax.sample`; the values 0, 1, 0, 0, 1, 0 and 0 switch them off, and None takes the model's own.
    repetition_penalty: 1 switches it off. stop: a text ends before any of these strings.
    beams: above 0, beam search with this width, without temperature, filters and repetition_penalty.
    length_penalty: for beam search; above 0 favours longer texts. seed: for sampling.
    json_schema, regex, choices, grammar: see `nanoflax.constraints.Constraint`. The new text matches, unless
    max_new_tokens or a stop string cuts it.
    lookup: guess tokens that followed the same words earlier in the text, and check them together; draft: a smaller
    model with the same tokenizer that guesses (the source of `nanoflax.open`). Neither changes the distribution of the
    text; prompts are then continued one after another. See `nanoflax.speculation`.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    beams: int = 0
    length_penalty: float = 1.0
    seed: int = 0
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    lookup: bool = False
    draft: str = ""

    @property
    def mode(self) -> str:
        return "beams" if self.beams else "sampling" if self.temperature else "temperature=0"

    def limit(self, config: ModelConfig, prompts: list[list[int]]) -> int:
        """The largest number of new tokens: max_new_tokens, else that of the model, else 100; unless it is given,
        fewer if the context is too short."""
        if self.max_new_tokens:
            return self.max_new_tokens
        config.generation.refuse(() if config.generation.max_new_tokens else OF_LENGTH)
        g, used = config.generation, 0 if config.reads_source else max(map(len, prompts), default=0)
        wanted = g.max_new_tokens or (g.max_length - max(used, 1) if g.max_length else DEFAULT_NEW_TOKENS)
        return max(1, min(wanted, config.max_length - used))

    def constraints(self, tokenizer: Any, config: ModelConfig, rows: int) -> list[Constraint]:
        """The state of the rule for each row; [] without a rule. Raises: UserError for a bad rule."""
        rules = {name: rule for name in RULES if (rule := getattr(self, name)) is not None}
        return [Constraint(tokenizer, **rules, begins=config.reads_source) for _ in range(rows)] if rules else []

    def proposer(self, tokenizer: Any) -> speculation.Proposer | None:
        """What guesses tokens, if anything does. Raises: UserError for a draft with another tokenizer."""
        if not self.draft:
            return speculation.Lookup() if self.lookup else None
        model, params, own = open_draft(self.draft)
        probe = "The 3 sizes:\n\tcafé, naïve."
        if own is None or own.encode(probe) != tokenizer.encode(probe):
            raise UserError(f"draft={self.draft} has another tokenizer; a draft needs the same token ids as the model")
        return speculation.Draft(model, params)

    @classmethod
    def of(
        cls,
        given: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        generation: GenerationDefaults | None = None,
        prefix: str = "",
    ) -> "GenerationSettings":
        """The settings in `given`, the others from `defaults`, the others from the model's `generation`.

        A given setting of sampling cancels beams that are not given. prefix: of names in messages, such as "--".
        Raises: UserError for an unknown name, a value out of its range, or a setting that the mode does not read.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := given.keys() - set(names):
            raise UserError(f"{', '.join(sorted(unknown))}: not a setting of generation, which are {', '.join(names)}")
        check_ranges(given, prefix)
        task = defaults or {}
        defaults = model_settings(generation or GenerationDefaults()) | task
        if given.keys() & _DRAWING:
            defaults.pop("beams", None)
        settings = cls(**(defaults | given))
        guesses = [name for name in (*GUESSES, *RULES) if getattr(settings, name) not in (None, "", False)]
        if len(guesses) > 1 and {*GUESSES} & {*guesses}:
            raise UserError(f"{' and '.join(prefix + name for name in guesses)} do not work together; leave one out")
        # Without the model's settings, the mode is known only if its own settings are given.
        if generation is not None or given.keys() & {"temperature", "beams"}:
            mode = settings.mode
            unread = [name for name in given if name not in READ[mode] and given[name] != _UNSET.get(name)]
            if mode == "beams" and given.get("temperature"):
                unread.insert(0, "temperature")
            if unread:
                mode = f"beams={settings.beams}" if mode == "beams" else mode
                raise UserError(
                    f"{', '.join(f'{prefix}{name}={given[name]}' for name in unread)}: not read with "
                    f"{prefix if mode != 'sampling' else ''}{mode}; leave one out"
                )
            if generation is not None and settings.mode == "sampling":
                generation.refuse({*OF_SAMPLING} - given.keys() - task.keys())
            if settings.beams and "beams" not in task | given and generation and generation.do_sample:
                raise UserError(
                    f"model.generation has do_sample with num_beams={settings.beams}, sampling of beams, which "
                    f"nanoflax does not compute; give {prefix}beams or {prefix}temperature"
                )
        return dataclasses.replace(settings, stop=[settings.stop] if isinstance(settings.stop, str) else settings.stop)


def check_ranges(given: dict[str, Any], prefix: str = "") -> None:
    """Raises: UserError for settings out of their ranges. prefix: of names in messages, such as "--"."""
    same = {name: value for name, value in given.items() if name in fields.field_types(GenerationDefaults)}
    checked = dataclasses.replace(GenerationDefaults(), **same)
    problems = fields.type_problems(checked, prefix) or fields.value_problems(checked, prefix)
    for name in ("beams", "seed"):
        if name in given and not (isinstance(given[name], int) and given[name] >= 0):
            problems.append(f"{prefix}{name}={given[name]!r} must be an integer that is at least 0")
    stop = given.get("stop", ())
    if not isinstance(stop, str) and not (isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop)):
        problems.append(f"{prefix}stop={stop!r} must be a text or a list of texts")
    elif "stop" in given and "" in ([stop] if isinstance(stop, str) else stop):
        problems.append(f"{prefix}stop has an empty text, which ends nothing; leave it out")
    if problems:
        raise UserError("; ".join(problems))


def model_settings(g: GenerationDefaults) -> dict[str, Any]:
    """The settings that a model's generation_config.json decides, except the largest length."""
    found = {name: x for name in ("temperature", "top_k", "top_p", "min_p") if (x := getattr(g, name)) is not None}
    found |= {name: x for name in FILTERS[3:] if (x := getattr(g, name)) not in (None, generate.NO_EFFECT[name])}
    kept = {*OF_SAMPLING} & g.not_computed().keys()  # and refused where they are read
    if found or kept or g.do_sample:  # the others as in Transformers
        found = {name: x for name, x in (("temperature", 1.0), ("top_k", 50)) if name not in kept} | found
    if g.do_sample is False:
        found = {"temperature": 0.0}
    found |= {name: x for name in ("repetition_penalty", "length_penalty") if (x := getattr(g, name)) is not None}
    if g.num_beams and g.num_beams > 1:
        found["beams"] = g.num_beams
    return found | ({"stop": g.stop_strings} if g.stop_strings else {})


def used_of_model(given: dict[str, Any], generation: GenerationDefaults) -> str:
    """The settings of the model's generation_config.json that are used, such as "temperature=0.6, top_p=0.9"."""
    own, chosen = model_settings(generation), GenerationSettings.of(given, {}, generation)
    names = [name for name in own if name not in given and getattr(chosen, name) == own[name]]
    read = READ[chosen.mode] - ({"temperature"} if chosen.beams else set()) | {"repetition_penalty"}
    return ", ".join(f"{name}={own[name]}" for name in names if name in read)


def stream_texts(
    model: Any,
    params: dict,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSettings,
    constraints: Sequence[Constraint] = (),
    proposer: speculation.Proposer | None = None,
) -> Iterator[list[str]]:
    """Yields the next piece of text for each prompt of token ids. constraints: one for each prompt, or none.
    proposer: guesses tokens, for speculative decoding.

    Text that more tokens could change is not yielded yet: the beginning of a stop string, half a character.
    Raises: UserError as `nanoflax.sample` does.
    """
    ends = tokenizers.stop_ids(tokenizer)
    before: list[Any] = [()] * len(prompts) if model.config.reads_source else prompts
    decoders = [tokenizers.StreamingDecoder(tokenizer, ids, settings.stop) for ids in before]
    ended = [False] * len(prompts)
    for new in _tokens(model, params, tokenizer, prompts, settings, constraints, proposer):
        texts = [""] * len(prompts)
        for i, tokens in enumerate(new):
            if not ended[i]:
                kept = list(itertools.takewhile(lambda token: token not in ends, tokens))
                texts[i] = decoders[i].add(kept)
                ended[i] = decoders[i].stopped or len(kept) < len(tokens)
        yield texts
        if all(ended):
            break
    yield [decoder.finish() for decoder in decoders]


def _tokens(
    model: Any,
    params: dict,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSettings,
    constraints: Sequence[Constraint],
    proposer: speculation.Proposer | None,
) -> Iterator[list[list[int]]]:
    """Yields lists of new token ids for each prompt: several times when sampling, once for beam search."""
    s, limit, rng = settings, settings.limit(model.config, prompts), jax.random.PRNGKey(settings.seed)
    ids: dict[str, Any] = dict(eos_id=tokenizers.stop_ids(tokenizer), vocab_size=tokenizer.vocab_size)
    if s.beams:
        best: Any = generate.beam_search(
            model, params, prompts, s.beams, limit, s.length_penalty, repetition_penalty=s.repetition_penalty, **ids
        )
        return iter([best])
    filters = {name: getattr(s, name) for name in ("temperature", *FILTERS, "repetition_penalty")}
    if proposer:
        passes = speculation.stream(model, params, prompts, proposer, limit, rng=rng, **filters, **ids)
        return ([found.tokens if i == found.row else [] for i in range(len(prompts))] for found in passes)
    if not constraints:
        return generate.stream(model, params, prompts, limit, rng=rng, **filters, **ids)
    tokens, lengths, ends = tokenizers.request_of(model.config, prompts, limit, **ids)
    made = generate.make_filters(**filters, defaults=model.config.generation)
    return _constrained(model, params, (tokens, lengths, limit), made, rng, ends, constraints)


def _constrained(model, params, prompts, filters, rng, ends, constraints):
    """`generate.stream` with a constraint for each row: its mask is computed before each token."""
    masks = np.zeros((len(constraints), -(-model.config.vocab_size // 32)), np.uint32)
    ended = [False] * len(constraints)

    def next_filters():
        for mask, constraint, end in zip(masks, constraints, ended, strict=True):
            if not end:
                allowed = constraint.allowed()
                mask[: len(allowed)] = allowed
        return filters._replace(allowed=masks.copy())

    tokens, lengths, limit = prompts
    pieces = generate.sample_in_chunks(model, params, tokens, lengths, limit, next_filters, rng, *ends, chunk=1)
    for _, found in pieces:
        new = [[] if end else row for row, end in zip(np.asarray(found).tolist(), ended, strict=True)]
        for i, row in enumerate(new):
            for token in row:
                if token in ends[0]:
                    ended[i] = True
                else:
                    constraints[i].accept(token)
                    ended[i] = constraints[i].finished
        yield new
        if all(ended):
            return
