"""Masks against a search over all tokens, texts against independent parsers, and probabilities against enumeration."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import regex
from scipy import stats

from nanoflax import parallel, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.constraints import Constraint
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.runs.generation import GenerationSettings, stream_texts
from nanoflax.tokenizers import ByteTokenizer, specs, token_bytes
from nanoflax.tokenizers.huggingface import from_files

TEXT = ["the cat and 12 dogs, or a tea at 3:45 é\nthen \u65e5\u672c ", "catalogues that repeat: cats, teas, dogs"] * 40
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", "日本"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 130}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def trained():
    train = tokenizers.train_sentencepiece
    return {"bytes": ByteTokenizer(), "bpe": train(TEXT, 320, "bpe"), "unigram": train(TEXT, 290, "unigram")}


def allowed_ids(constraint, vocab_size):
    assert len(constraint.allowed()) == -(-vocab_size // 32)
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return np.flatnonzero(bits).tolist()


def random_text(constraint, tokenizer, rng, limit=400):
    """The ids of a random text that matches: allowed tokens, short texts preferred; None if it does not end."""
    ids, ends = [], tokenizers.stop_ids(tokenizer)
    for _ in range(limit):
        token = int(rng.choice(allowed_ids(constraint, tokenizer.vocab_size)))
        if token in ends:
            return ids
        constraint.accept(token)
        ids.append(token)
        if constraint.finished:
            return ids
    return None


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_bytes_of_tokens_are_those_of_decoded_texts(trained, kind):
    tokenizer = trained[kind]
    values, rng = token_bytes(tokenizer), np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, tokenizer.vocab_size, 12).tolist()
        joined = b"".join(values[i] or b"" for i in ids)
        # Some decoders write one U+FFFD for each invalid byte, others one for several.
        want, found = (re.sub("\ufffd+", "\ufffd", x) for x in (tokenizer.decode(ids), joined.decode(errors="replace")))
        assert found == want
    text = 'A text {"é": [1, 2]} 日本語 😀 \t\n  end'
    assert b"".join(values[i] for i in tokenizer.encode(text)).decode() == text


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("pattern", ["(cat|dogs?)( and [0-9]{1,3})*", "[a-f]+|the .*", "the cat", "(a|at|t)(ea)?x?"])
def test_masks_are_those_of_a_search_over_all_tokens(trained, kind, pattern):
    """The `regex` package says whether a text can become a match; all tokens are tried, not only the usual ones."""
    tokenizer, rng = trained[kind], np.random.default_rng(1)
    values = token_bytes(tokenizer)
    printable = [i for i, x in enumerate(values) if x and x.isascii() and x.decode().isprintable()]
    for _ in range(4):
        constraint, text = Constraint(tokenizer, regex=pattern), ""
        for _ in range(8):
            found = allowed_ids(constraint, tokenizer.vocab_size)
            want = [i for i in printable if regex.fullmatch(pattern, text + values[i].decode(), partial=True)]
            assert [i for i in found if i in printable] == want
            assert (tokenizer.eos_id in found) == constraint.matches == bool(re.fullmatch(pattern, text))
            if not want:
                break
            token = int(rng.choice(want))
            constraint.accept(token)
            text += values[token].decode()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_every_random_text_parses(trained, kind):
    tokenizer, rng = trained[kind], np.random.default_rng(2)
    choices = ["cat", "catalogue", "日本", 'a "quoted"\nline \\', " ", "é", "😀\x00"]
    rules = {
        "json_schema": (SCHEMA, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        "regex": (r"\d{1,3}(\.\d+)?|(ab?é)+", lambda text: re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?|(ab?é)+", text)[0]),
        "choices": (choices, choices.index),
        "grammar": ('start: "(" start ")" | "x"', lambda text: re.fullmatch(r"\(*x\)*", text)[0]),
    }
    for name, (rule, check) in rules.items():
        texts = [random_text(Constraint(tokenizer, **{name: rule}), tokenizer, rng) for _ in range(40)]
        ended = [tokenizer.decode(ids) for ids in texts if ids is not None]
        assert len(ended) > 30
        for text in ended:
            check(text)
        assert len(set(ended)) > 2


def test_a_text_at_the_beginning_keeps_its_first_word():
    """A tokenizer that drops the first space: the text of `decode` matches."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "▁": 3, "▁cat": 4, "cat": 5, "s": 6, "▁s": 7}
    spec = {
        "added_tokens": [specs.added_token(x, i) for x, i in [*vocabulary.items()][:3]],
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[x, -1.0] for x in vocabulary]},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    }
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = from_files(files, "test")
    assert allowed_ids(Constraint(tokenizer, choices=["cat", "cats s"]), 8) == [5]
    constraint = Constraint(tokenizer, choices=["cat", "cats s"], begins=True)
    assert allowed_ids(constraint, 8) == [3, 4]
    for token in (4, 6, 7):
        constraint.accept(token)
    assert constraint.finished and tokenizer.decode([4, 6, 7]) == "cats s"


def test_probabilities_are_those_of_the_renormalised_model():
    """Frequencies of sampled texts against the product of renormalised probabilities, by enumeration."""
    model = build(ModelConfig(vocab_size=260, context=16, layers=1, dim=16, heads=2))
    params = parallel.init(model, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    tokenizer, prompt, choices = ByteTokenizer(), [257, 104], ["a", "ab", "ba", "bb"]
    texts = sorted(choices)

    @jax.jit
    def chances_after(tokens):
        return jax.nn.softmax(model.apply({"params": params}, tokens[None])[0][0].astype(jnp.float32))

    def probability(text):
        ids, p = [*text.encode(), 257], 1.0
        for n, token in enumerate(ids):
            rest = {(*x.encode(), 257)[n] for x in choices if x[:n] == text[:n]}
            before = prompt + ids[:n]
            chances = np.asarray(chances_after(jnp.array(before + [0] * (6 - len(before)))))[len(before) - 1]
            p *= chances[token] / chances[sorted(rest)].sum()
        return p

    want = np.array([probability(text) for text in texts], np.float64)
    assert abs(want.sum() - 1) < 1e-6 and want.min() > 0.02
    settings = GenerationSettings(max_new_tokens=4, temperature=1.0, top_k=0, choices=choices)
    rows = 2000
    constraints = settings.constraints(tokenizer, model.config, rows)
    pieces = stream_texts(model, params, tokenizer, [prompt] * rows, settings, constraints)
    found = collections.Counter(map("".join, zip(*pieces, strict=True)))
    assert set(found) == set(texts)
    assert stats.chisquare([found[text] for text in texts], want / want.sum() * rows).pvalue > 1e-4
    uniform = np.full(4, rows / 4)
    assert stats.chisquare([found[text] for text in texts], uniform).pvalue < 1e-6  # the test can fail


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "give one of json_schema, regex, choices and grammar"),
        ({"regex": "a", "choices": ["b"]}, "not regex and choices"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "a\\"}, "ends with a backslash"),
        ({"choices": ["a", ""]}, "must be a list of texts that are not empty"),
        ({"choices": "ab"}, "must be a list"),
        ({"json_schema": "{}"}, "must be an object"),
        ({"json_schema": {"type": "text"}}, "Invalid type: text"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "does not fetch"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": {"x": {1, 2}}}, "is not JSON"),
        ({"grammar": 'first: "a"'}, "no start rule"),
        ({"choices": ["x" * 200_000]}, "at most 100000"),
    ],
)
def test_bad_rules_are_refused_in_one_line(rule, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Constraint(ByteTokenizer(), **rule)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_expensive_rules_end_in_an_error():
    names = [f"p{i}" for i in range(2000)]
    items = [{"type": "object", "properties": dict.fromkeys(names[i : i + 20], {})} for i in range(0, 2000, 20)]
    constraint = Constraint(ByteTokenizer(), json_schema={"anyOf": items})
    with pytest.raises(UserError, match="json_schema cannot be followed"):
        for byte in b'{"p1": "x", "p2": 3}':
            constraint.allowed()
            constraint.accept(byte)


def test_a_token_that_is_not_allowed_is_refused():
    constraint = Constraint(ByteTokenizer(), regex="ab")
    for token in (98, 257, -1, 260):
        with pytest.raises(ValueError, match="not allowed"):
            constraint.accept(token)
    constraint.accept(97)
    constraint.accept(98)
    assert constraint.finished and allowed_ids(constraint, 260) == [257]
