"""Text generation from prompts: settings, stop strings, and text in pieces while it is generated."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from nanoflax import generate, tokenizers
from nanoflax.errors import UserError

DEFAULT_NEW_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of text generation.

    max_new_tokens: None means 100, or fewer if the model's context is too short.
    temperature: 0 is greedy. top_k, top_p, min_p: the filters of `nanoflax.sample`; the values 0, 1 and 0
    switch them off. repetition_penalty: 1 switches it off. stop: a text ends before any of these strings.
    beams: above 0, beam search with this width, without temperature, filters and repetition penalty.
    length_penalty: for beam search; above 0 favours longer texts. seed: for sampling.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    beams: int = 0
    length_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, given: dict[str, Any], defaults: dict[str, Any] | None = None) -> "GenerationSettings":
        """The settings in `given`, the others from `defaults`. A given temperature asks for sampling, so it
        cancels beams from the defaults.

        Raises: UserError for an unknown name.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := given.keys() - set(names):
            raise UserError(f"{', '.join(sorted(unknown))}: not a setting of generation, which are {', '.join(names)}")
        defaults = dict(defaults or {})
        if "temperature" in given:
            defaults.pop("beams", None)
        settings = cls(**(defaults | given))
        return dataclasses.replace(settings, stop=[settings.stop] if isinstance(settings.stop, str) else settings.stop)


def stream_texts(
    model: Any, params: dict, tokenizer: Any, prompts: list[list[int]], settings: GenerationSettings
) -> Iterator[list[str]]:
    """Yields the next piece of text for each prompt of token ids.

    Text that more tokens could change is not yielded yet: the beginning of a stop string, half a character.
    Raises: UserError as `nanoflax.sample` does.
    """
    ends = tokenizers.stop_ids(tokenizer)
    before: list[Any] = [()] * len(prompts) if model.config.reads_source else prompts
    decoders = [tokenizers.StreamingDecoder(tokenizer, ids, settings.stop) for ids in before]
    ended = [False] * len(prompts)
    for new in _tokens(model, params, tokenizer, prompts, settings):
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
    model: Any, params: dict, tokenizer: Any, prompts: list[list[int]], settings: GenerationSettings
) -> Iterator[list[list[int]]]:
    """Yields lists of new token ids for each prompt: several times when sampling, once for beam search."""
    s, limit = settings, settings.max_new_tokens or _default_limit(model.config, prompts)
    ids = dict(eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    if s.beams:
        best: Any = generate.beam_search(model, params, prompts, s.beams, limit, s.length_penalty, **ids)
        return iter([best])
    return generate.stream(
        model,
        params,
        prompts,
        limit,
        temperature=s.temperature,
        top_k=s.top_k or None,
        top_p=None if s.top_p == 1 else s.top_p,
        min_p=s.min_p or None,
        repetition_penalty=None if s.repetition_penalty == 1 else s.repetition_penalty,
        rng=jax.random.PRNGKey(s.seed),
        **ids,
    )


def _default_limit(config: Any, prompts: list[list[int]]) -> int:
    used = 0 if config.reads_source else max(map(len, prompts))
    return max(1, min(DEFAULT_NEW_TOKENS, config.context - used))
