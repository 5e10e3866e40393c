"""Which tokens may come next so that a text matches a rule.

llguidance computes them. Compared on a JSON schema with the 49,152 tokens of SmolLM2 (one core): llguidance compiles it
in 1 ms, needs 13 to 24 us for a token, has no dependency and 7.7 MB; xgrammar needs 320 ms and 12 us, and torch and
transformers; outlines-core needs 210 ms and 410 us, and knows neither grammars nor recursive schemas.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from nanoflax import report, tokenizers
from nanoflax.constraints.schema import followed
from nanoflax.errors import UserError

# A small model may write spaces for ever, so between two parts of JSON there is a space, or one line break with spaces.
# Without \uXXXX, in which a key would escape the schema of its property.
JSON_OPTIONS = {"whitespace_pattern": " |\\n {0,32}", "json_allowed_escapes": 'nrbtf\\"'}
# Every token whose bytes fit is allowed, also where only one text is possible.
OPTIONS = '\n%llguidance {"no_forcing": true}'
MAX_CHARACTERS = 100_000  # of a schema, an expression, the choices or a grammar


class Constraint:
    """The state of one text that must match a rule: the tokens so far, and which may come next.

    Attributes: finished, whether only the end of the text may come next; matches, whether the text may end here.
    """

    def __init__(
        self,
        tokenizer: Any,
        json_schema: dict[str, Any] | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
        begins: bool = False,
    ) -> None:
        """Exactly one rule.

        Args:
          json_schema: such as {"type": "object", "properties": {...}}.
          regex: an expression for the complete text, in Rust's syntax (no look-around, no references; digits are 0-9).
          choices: the text is one of them.
          grammar: in llguidance's form of Lark; its first rule is `start`.
          begins: nothing stands before the text, as for an encoder-decoder; SentencePiece drops its first space.
        Raises: UserError for a bad rule, and for a tokenizer that changes texts when it decodes them.
        """
        rules = dict(json_schema=json_schema, regex=regex, choices=choices, grammar=grammar)
        given = {name: rule for name, rule in rules.items() if rule is not None}
        if len(given) != 1:
            raise UserError(f"give one of json_schema, regex, choices and grammar, not {' and '.join(given) or 'none'}")
        [(name, rule)] = given.items()
        self._matcher = _compiled(tokenizer, name, _in_lark(name, rule), begins and _drops_space(tokenizer)).deep_copy()
        self._name, self._vocab_size = name, tokenizer.vocab_size
        if not self.allowed().any():
            raise UserError(f"{name}: no token of this tokenizer begins a text that matches")

    def allowed(self) -> UInt32[np.ndarray, " W"]:
        """One bit for each token, W = ceil(tokenizer.vocab_size / 32): bit i % 32 of word i // 32 permits token i.

        Raises: UserError if the rule needs too much work (by limits of llguidance), or if no token continues the text.
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: -(-self._vocab_size // 32)]
        self._check()
        if not found.any():
            raise UserError(f"{self._name}: no token of this tokenizer continues the text so that it can match")
        return found

    def accept(self, token: int) -> None:
        """Append a token to the text. Raises: ValueError if the token is not allowed."""
        if not 0 <= token < self._vocab_size or not self._matcher.validate_tokens([token]):
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def matches(self) -> bool:
        return self._matcher.is_accepting()

    def _check(self):
        if self._matcher.is_error():
            raise UserError(f"{self._name} cannot be followed: {_short(self._matcher.get_error())}")


def json_rule(schema: dict[str, Any]) -> str:
    """JSON of a schema as a part of a grammar. Raises: UserError for a schema that is no JSON or cannot be followed."""
    if not isinstance(schema, dict):
        raise UserError(f"json_schema must be an object, such as {{'type': 'object'}}, not {schema!r:.40}")
    try:
        return "%json " + report.to_json(followed(schema) | {"x-guidance": JSON_OPTIONS})
    except UserError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"json_schema is not JSON: {error}") from error


def _in_lark(name: str, rule: Any) -> str:
    """The rule as a grammar. Raises: UserError for a value of a wrong type."""
    if name == "json_schema":
        text = "start: " + json_rule(rule)
    elif name == "choices":
        wrong = isinstance(rule, str) or not rule or [x for x in rule if not isinstance(x, str) or not x]
        if wrong:
            raise UserError(f"choices={rule!r:.80} must be a list of texts that are not empty")
        text = "start: " + " | ".join(report.to_json(tokenizers.well_formed(x)) for x in rule)
    elif not isinstance(rule, str) or not rule:
        raise UserError(f"{name}={rule!r:.40} must be a text that is not empty")
    elif name == "regex":
        if (len(rule) - len(rule.rstrip("\\"))) % 2:
            raise UserError("regex ends with a backslash that has nothing after it")
        text = f"start: /{_engine().regex_to_lark(rule, use_ascii='d')}/"
    else:
        text = rule
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{name} has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    return text + OPTIONS


@functools.lru_cache(maxsize=64)
def _compiled(tokenizer: Any, name: str, lark: str, after_space: bool) -> Any:
    """The matcher of a grammar before the first token. Raises: UserError."""
    parts = [{"name": "text", "lark_grammar": lark}]
    if after_space:
        parts.insert(0, {"lark_grammar": 'start: " " @text' + OPTIONS})
    engine = _engine()
    matcher = engine.LLMatcher(
        _vocabulary(tokenizer),
        report.to_json({"grammars": parts}),
        log_level=0,
        limits=engine.LLParserLimits(verbose_errors=False),
    )
    if matcher.is_error():
        raise UserError(f"{name} is wrong or not supported: {_short(matcher.get_error())}")
    return matcher


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> Any:
    """The tokens' bytes, in the engine's form. Raises: UserError."""
    engine = _engine()
    if getattr(tokenizer, "cleans_up", False):
        raise UserError("this tokenizer removes spaces before punctuation when it decodes, so no rule can hold")
    values, ends = tokenizers.token_bytes(tokenizer), tokenizers.stop_ids(tokenizer)

    class Vocabulary:
        tokens = [b"<special>" if x is None else x for x in values]
        special_token_ids = [i for i, x in enumerate(values) if x is None]
        eos_token_id, bos_token_id = ends[0], None

        def __call__(self, text):
            return tokenizer.encode(text)

    return engine.LLTokenizer(engine.TokenizerWrapper(Vocabulary()), n_vocab=len(values), eos_token=list(ends))


def _drops_space(tokenizer: Any) -> bool:
    """Whether decoding drops the first space of a text."""
    values = tokenizers.token_bytes(tokenizer)
    with_space = next((i for i, x in enumerate(values) if x and x[:1] == b" " and x.strip().isalpha()), None)
    return with_space is not None and not tokenizer.decode([with_space]).startswith(" ")


def _engine():
    try:
        import llguidance
    except ImportError as error:
        raise UserError("constraints need llguidance: pip install nanoflax[serve]") from error
    return llguidance


def _short(message: str) -> str:
    """A message of the engine in one line, without the grammar that it quotes."""
    message = re.split(r"\n\s*\d+ \|", message)[0]
    message = message.replace("NoExtensionBias", "a rule refers to itself before it reads anything")
    message = re.sub(r"^at 1\(\d+\): |failed to compile JSON schema: |\n\s*\^+(?=\n)|<non-verbose/>", "", message)
    return " ".join(message.split())[:300]
