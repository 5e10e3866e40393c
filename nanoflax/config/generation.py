"""How a published model generates text: the settings of its generation_config.json."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from nanoflax import untrusted
from nanoflax.config.fields import field
from nanoflax.errors import UserError

MOST_TOKENS = 2**31  # ids and numbers of tokens are int32
LARGE = 1e38  # near the largest float32
COLDEST = 1e-20  # logits over a lower temperature may exceed float32; sampling takes it as 0
# How `open` packs a model. "file": as in a .gguf file, for the matrices; programs offer these before they import JAX.
QUANTIZE = ("", "int8", "int4", "file")
CACHE_DTYPES = ("", "int8")
# What sampling alone reads, and what is read only if no length is given.
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
OF_LENGTH = ("max_length", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The settings of Transformers' generation_config.json, by the names and with the meaning that they have there.

    `nanoflax.sample` and `beam_search` follow the rules on tokens and take unset arguments from here; programs also
    take do_sample, num_beams, the lengths and stop_strings. `unsupported` are settings that nanoflax does not compute,
    and values that are wrong: they are kept, and refused when a text is generated with them.
    """

    eos_token_id: tuple[int, ...] = field((), "Ids that end a text.")
    bad_words_ids: tuple[tuple[int, ...], ...] = field((), "Sequences of ids that are never generated.")
    suppress_tokens: tuple[int, ...] = field((), "Ids that are never generated.")
    begin_suppress_tokens: tuple[int, ...] = field((), "Ids that are not generated first.")
    forced_bos_token_id: int | None = field(None, "Id of the token after a first one alone.", at_least=0)
    forced_eos_token_id: tuple[int, ...] = field((), "Ids of the last token, at the largest length.")
    decoder_start_token_id: int | None = field(None, "Id before the target; none: model.start_id.", at_least=0)
    min_length: int = field(0, "No end before a text, with its prompt, has this length.", unit="tokens", at_least=0)
    min_new_tokens: int | None = field(
        None, "No end before this many new tokens; none: min_length decides.", unit="tokens", at_least=0
    )
    max_length: int | None = field(None, "Largest length of a text with its prompt.", unit="tokens", at_least=1)
    max_new_tokens: int | None = field(None, "Largest number of new tokens.", unit="tokens", at_least=1)
    no_repeat_ngram_size: int = field(0, "n: no n tokens come twice; 0: no such rule.", unit="tokens", at_least=0)
    repetition_penalty: float | None = field(None, "Above 1: earlier tokens become less probable.", above=0)
    sequence_bias: tuple[tuple[tuple[int, ...] | float, ...], ...] = field(
        (), "((ids, number), ...): added to the logit of the last id, where the others stand before it."
    )
    encoder_repetition_penalty: float | None = field(None, "Above 1: tokens of the prompt become likelier.", above=0)
    encoder_no_repeat_ngram_size: int = field(
        0, "n: no n tokens of the prompt come in the text; 0: no such rule.", unit="tokens", at_least=0
    )
    exponential_decay_length_penalty: tuple[float, ...] = field(
        (), "(n, factor): after n new tokens the end becomes likelier, by a power of the factor."
    )
    remove_invalid_values: bool = field(False, "Replace NaN and infinite logits.")
    do_sample: bool | None = field(None, "Sample, or choose the most probable.")
    temperature: float | None = field(None, "Temperature of sampling.", at_least=0)
    top_k: int | None = field(None, "Sample from the K most probable tokens; 0: all.", at_least=0)
    top_p: float | None = field(None, "Sample from the fewest tokens with this total probability.", within="(0, 1]")
    min_p: float | None = field(None, "Sample from tokens with this share of the highest probability.", within="[0, 1]")
    top_h: float | None = field(
        None, "Sample from the most probable tokens with this share of the entropy; 0: all.", within="[0, 1]"
    )
    typical_p: float | None = field(
        None, "Sample from the most typical tokens with this total probability.", within="(0, 1]"
    )
    epsilon_cutoff: float | None = field(None, "Sample from tokens with this probability.", within="[0, 1)")
    eta_cutoff: float | None = field(None, "As epsilon_cutoff, lower where many tokens are probable.", within="[0, 1)")
    num_beams: int | None = field(None, "Beams of a beam search; 1: none.", at_least=1)
    length_penalty: float | None = field(None, "Of beam search; above 0 favours longer texts.")
    early_stopping: bool | str | None = field(None, "When a beam search ends: true, false or never.")
    renormalize_logits: bool = field(False, "Beam search normalises probabilities after the rules on tokens.")
    stop_strings: tuple[str, ...] = field((), "Texts that end a text.")
    unsupported: str = field("", "JSON of settings that nanoflax does not compute, so generation is refused.")

    def not_computed(self) -> dict[str, Any]:
        """{name: value} of `unsupported`."""
        return untrusted.json_object((self.unsupported or "{}").encode(), "model.generation.unsupported")

    def refuse(self, names: Collection[str] | None = None) -> None:
        """Raises: UserError for settings in `unsupported` of these names, by default what every text needs."""
        narrow = (*OF_SAMPLING, *OF_LENGTH)
        found = self.not_computed() if self.unsupported else {}
        bad = [f"{x}={value!r:.80}" for x, value in found.items() if (x not in narrow if names is None else x in names)]
        if bad:
            raise UserError(
                f"model.generation has {', '.join(bad)}, from generation_config.json, which nanoflax does not compute; "
                "remove it there, or from the model's configuration, or give another value"
            )

    def problems(self) -> list[str]:
        found = []
        ids = {"bad_words_ids": [i for word in self.bad_words_ids for i in word]}
        for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
            ids[name] = getattr(self, name)
        for name, values in ids.items():
            if any(not 0 <= i < MOST_TOKENS for i in values):
                right = "token ids, which are at least 0 and below 2^31"
                found.append(f"model.generation.{name}={getattr(self, name)!r} must be {right}")
        if () in self.bad_words_ids:
            found.append("model.generation.bad_words_ids has an empty sequence")
        if not all(map(_is_bias, self.sequence_bias)):
            right = "pairs of token ids and a finite number, such as [[[5, 7], -2.0]]"
            found.append(f"model.generation.sequence_bias must be a list of {right}")
        decay = self.exponential_decay_length_penalty
        if decay and (len(decay) != 2 or decay[0] % 1 or not 0 <= decay[0] < MOST_TOKENS or not 0 < decay[1] < LARGE):
            right = "a number of tokens and a positive factor"
            found.append(f"model.generation.exponential_decay_length_penalty={decay!r} must be {right}")
        if self.early_stopping not in (None, True, False, "never"):
            found.append(f"model.generation.early_stopping={self.early_stopping!r} must be true, false or never")
        return found


def _is_bias(pair):
    ids, number = pair if len(pair) == 2 else ((), math.nan)
    right = isinstance(ids, tuple) and ids and min(ids) >= 0 and max(ids) < MOST_TOKENS
    return bool(right and isinstance(number, int | float) and -LARGE < number < LARGE)
