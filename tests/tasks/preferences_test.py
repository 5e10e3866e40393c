"""Preferences: the layouts of their records, their ids and masks beside trl's, and what is left out."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from nanoflax import tasks, tokenizers
from nanoflax.data import DataReport
from nanoflax.errors import UserError
from nanoflax.tasks import Preference
from tests.tokenizers.chat_test import TEMPLATES, conversations, make, without_marks


class Records(list):
    """What trl's preparation needs of a dataset, without its files."""

    def map(self, function, fn_kwargs=None, **_):
        return Records(record | function(dict(record), **fn_kwargs or {}) for record in self)


def trl_rows(tokenizer, records):
    """trl's (prompt_ids, chosen_ids, rejected_ids) of each record."""
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    found = DPOTrainer._prepare_dataset(trainer, Records(records), tokenizer, args, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in found]


def read(tmp_path, records, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = DataReport()
    source = tasks.TaskSource(f"preferences:{path}", whitespace="", unicode="", **options)
    return tasks.read(source, Preference, report=report), report


def ours(rows, i, side):
    """(ids, weights) of an answer with its prompt."""
    row = rows.rows[i]
    return [int(row["first"]), *row[side].tolist()], [0, *row[f"{side}_weights"].astype(int).tolist()]


@pytest.mark.parametrize(
    "name, kind", [(name, "unigram" if i % 3 == 0 else "bytes") for i, name in enumerate(TEMPLATES)]
)
def test_ids_and_masks_of_chats_are_trls(tmp_path, name, kind):
    special, template = TEMPLATES[name]
    mine, theirs = make(tmp_path, special, without_marks(template), kind)
    records, draw = [], random.Random(name)
    for messages in conversations(name, 6, special):
        *prompt, reply = messages
        other = {"role": "assistant", "content": draw.choice(["no", "maybe not", "x y"])}
        explicit = {"prompt": prompt, "chosen": [reply], "rejected": [other]}
        records.append(explicit)
    compared = 0
    for form in ("explicit", "implicit"):
        given = records
        if form == "implicit":
            given = [{side: r["prompt"] + r[side] for side in tasks.SIDES} for r in records]
        examples, report = read(tmp_path, given)
        rows = tasks.encode(examples, mine, 512, report=report)
        for i, (prompt, *answers) in enumerate(trl_rows(theirs, given)):
            for side, answer in zip(tasks.SIDES, answers, strict=True):
                ids, weights = ours(rows, i, side)
                n = len(ids)
                assert ids == (prompt + answer)[:n]
                mask = [0] * len(prompt) + [1] * (n - len(prompt))
                # trl trains a part of the prompt if one of the two answers merges with it, if the template has no
                # generation prompt, or if the ids of the prompt alone are others (newlines at its end).
                if prompt == tokenizers.chat_prompt(mine, records[i]["prompt"]):
                    assert weights == mask, tokenizers.show_mask(mine, ids, weights)
                    compared += 1
                assert all(a <= b for a, b in zip(weights, mask, strict=True))
                rest = theirs.decode((prompt + answer)[n:], skip_special_tokens=True)
                assert rest.strip() in ("", "assistant")  # the beginning of a next reply, in one template
    newlines = kind == "bytes" and name in ("headers", "always a generation prompt")
    assert compared > 12 or newlines or name == "no generation prompt"


TEXTS = ["The sky is", " blue", "2+2=", "4", " four", "yes", "é日本!", "a\n\nb", "user"]


def texts(seed, number):
    """Random pairs; no answer is the beginning of the other, for which trl takes its last character as different."""
    draw = random.Random(seed)
    join = lambda: "".join(draw.choices(TEXTS, k=draw.randint(1, 3)))
    while number:
        prompt, chosen, rejected = join(), join(), join()
        if not (chosen.startswith(rejected) or rejected.startswith(chosen)):
            number -= 1
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_ids_and_masks_of_texts_are_trls(tmp_path, kind):
    mine, theirs = make(tmp_path, ["</s>"], None, kind)
    explicit = list(texts(kind, 60))
    implicit = [{side: r["prompt"] + r[side] for side in tasks.SIDES} for r in explicit]
    for given in (explicit, implicit):
        examples, report = read(tmp_path, given)
        rows = tasks.encode(examples, mine, 512, report=report)
        assert len(rows) == len(given) and not report.counts
        different = 0
        for i, (prompt, *answers) in enumerate(trl_rows(theirs, given)):
            alone = tokenizers.prompt_ids(mine, explicit[i]["prompt"])
            if given is explicit and prompt != alone:  # trl drops what merges, and trains on a prompt that nobody gives
                different += 1
                for side in tasks.SIDES:
                    ids, weights = ours(rows, i, side)
                    assert ids[: len(alone)] == alone and weights.index(1) == len(alone)
                    assert mine.decode(ids).rstrip() == (explicit[i]["prompt"] + explicit[i][side]).rstrip()
                continue
            for side, answer in zip(tasks.SIDES, answers, strict=True):
                assert ours(rows, i, side) == (prompt + answer, [0] * len(prompt) + [1] * len(answer))
        assert different < 20


# Layouts.

QUESTION = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in "yn")
CHAT = Preference((QUESTION,), (YES,), (NO,))
TOOLS = [{"type": "function", "function": {"name": "add"}}]
LAYOUTS = {
    "texts": ({"prompt": "q ", "chosen": "y", "rejected": "n"}, Preference("q ", "y", "n")),
    "texts with their prompt": (
        {"chosen": "q: yes", "rejected": "q: no"}, Preference("q:", " yes", " no", found_prompt=True)),
    "chats": ({"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]}, CHAT),
    "chats with their prompt": ({"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}, CHAT),
    "a text as the prompt": ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, CHAT),
    "a text as the prompt, which is in the chats": (
        {"prompt": "q", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}, CHAT),
    "a prompt that is in the chats too": (
        {"prompt": [QUESTION], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}, CHAT),
    "texts as answers": ({"prompt": [QUESTION], "chosen": "y", "rejected": "n"}, CHAT),
    "tools as text": (
        {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO], "tools": json.dumps(TOOLS)},
        Preference((QUESTION,), (YES,), (NO,), tools=(*TOOLS,))),
    "a margin": ({"prompt": "q", "chosen": "y", "rejected": "n", "margin": 2}, Preference("q", "y", "n", margin=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_trl_is_read(tmp_path, layout):
    record, expected = LAYOUTS[layout]
    (found,), report = read(tmp_path, [record])
    assert found == expected and not report.counts
    renamed = {("question" if name == "prompt" else name): value for name, value in record.items()}
    if "prompt" in record:
        assert read(tmp_path, [renamed], fields="prompt=question")[0] == [expected]


def test_what_cannot_be_used_is_counted(tmp_path):
    good = LAYOUTS["chats"][0]
    problems = {
        "pairs with equal answers": [{"prompt": "q", "chosen": "y", "rejected": "y"}, good | {"rejected": [YES]},
                                     {"chosen": "q", "rejected": "q"}],
        "pairs with an empty answer": [{"prompt": "q", "chosen": "y", "rejected": " "}],
        "pairs that are not texts or lists of messages": [
            {"prompt": "q", "chosen": "y"}, {"prompt": "q", "chosen": "y", "rejected": [NO]},
            {"prompt": 3, "chosen": "y", "rejected": "n"}, {"prompt": "q", "chosen": None, "rejected": None}],
        "pairs of chats with an empty prompt": [
            good | {"prompt": ""}, good | {"prompt": []}, {"chosen": [YES], "rejected": [NO]}],
        "pairs without a reply of the role 'assistant'": [good | {"chosen": [QUESTION | {"content": "r"}]}],
        "examples without messages of role and content": [good | {"rejected": [{"role": "assistant"}]},
                                                          good | {"prompt": ["q"]}],
        "examples with an empty message": [good | {"chosen": [YES | {"content": ""}]}],
        "examples whose tools are not a list of objects": [good | {"tools": "add"}],
        "pairs whose margin is not a number": [good | {"margin": bad} for bad in ("much", 10**100, [], True)],
    }  # fmt: skip
    records = [good, *(record for bad in problems.values() for record in bad)]
    found, report = read(tmp_path, records)
    assert found == [CHAT]
    counts = {problem.removesuffix(", left out"): count for problem, count in report.counts.items()}
    assert len(counts) == len(problems)
    for problem, bad in problems.items():
        assert sum(n for name, n in counts.items() if name.startswith(problem)) == len(bad), problem
    with pytest.raises(UserError, match="no usable evaluation example with prompt and chosen and rejected: .*equal"):
        read(tmp_path, problems["pairs with equal answers"])
    with pytest.raises(UserError, match="no object has chosen; their fields are prompt, preferred.*chosen=preferred"):
        read(tmp_path, [{"prompt": "q", "preferred": "y", "rejected": "n"}])


def encode(examples, length=64, **options):
    report = DataReport()
    try:
        return tasks.encode(examples, tokenizers.ByteTokenizer(), length, report=report, **options), report.counts
    except UserError as error:
        return str(error), report.counts


def test_long_and_empty_pairs_are_counted(tmp_path):
    long = Preference("q" * 6, "ab", "cd" * 8)
    rows, counts = encode([long], 12)  # the first id, 6, and at most 5 of an answer
    assert [*counts] == ["pairs longer than 12 tokens, their answers cut"]
    assert [len(rows.rows[0][side]) for side in tasks.SIDES] == [6 + 3, 11]  # the cut one has no end
    assert rows.rows[0]["rejected_weights"].sum() == 5
    for pair in (Preference("q" * 20, "a", "b"), Preference("q", "a" * 20 + "b", "a" * 20 + "c")):
        found, counts = encode([pair], 12)
        assert "no example is left" in found and "pairs whose answers are equal or empty in the first 12" in found
    assert "pairs longer than 12 tokens, refused: 1" in encode([long], 12, truncate=False)[0]
    found, _ = encode([long], 12, scored=True)
    assert "pairs longer than 12 tokens, left out: 1" in found
    for pair in (Preference(" ", "a", "b"), Preference("", "a", "b", found_prompt=True)):
        assert "pairs left out: their prompt is empty" in encode([pair])[0]
        assert len(encode([pair], scored=True)[0]) == 1  # a reward model reads whole texts
    assert "task.chat=false reads texts" in encode([CHAT], chat=False)[0]
    rows, _ = encode([Preference("q\n", " y", "n")], chat=True)
    assert tasks.show_row(rows, tokenizers.ByteTokenizer()).splitlines()[-1] == "⟦n<eos>⟧"
    (alone,), (chat,) = rows.rows, encode([CHAT])[0].rows
    assert all(np.array_equal(alone[name], chat[name]) for name in chat)


def test_a_written_end_is_no_second_end(tmp_path):
    mine, _ = make(tmp_path, ["</s>"], None, "bytes")
    report = DataReport()
    rows = tasks.encode([Preference("q ", "yes</s>", "no")], mine, 32, report=report)
    assert [row.tolist().count(mine.eos_id) for row in (rows.rows[0]["chosen"], rows.rows[0]["rejected"])] == [1, 1]
    assert [*report.counts] == ["answers that end with the text '</s>', read as the end"]


def test_cleaning_keeps_the_spaces_between_prompt_and_answer(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": " Q: a \nA: ", "chosen": " y ", "rejected": "\nn"}))
    (found,) = tasks.read(f"jsonl:{path}", Preference)
    assert (found.prompt, found.chosen, found.rejected) == ("Q: a\nA: ", " y", "\nn")


def test_pairs_of_a_prompt_are_in_one_split(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"q{i % 20}", "chosen": f"y{i}", "rejected": "n"} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = tasks.load(tasks.TaskSource(f"preferences:{path}", validation_fraction=0.3), Preference)
    train, validation = ({example.prompt for example in part} for part in (data.train, data.validation))
    assert train and validation and not train & validation and len(data.train) + len(data.validation) == 60


def test_batches_pad_both_sides_alike():
    rows, _ = encode([Preference("q", "yes", "n"), Preference("qqq", "y" * 20, "no")])
    batch = rows.batch([1, 0, 2])
    assert {name: x.shape for name, x in batch.items()} == {
        "weights": (3,), "first": (3,), "chosen": (3, 32), "chosen_weights": (3, 32), "rejected": (3, 32),
        "rejected_weights": (3, 32)}  # fmt: skip
    assert batch["weights"].tolist() == [1, 1, 0] and batch["chosen_weights"].sum(1).tolist() == [21, 4, 0]
    assert rows.n_tokens(0) == 5 + 3
    scored, _ = encode([Preference("q", "yes", "n", margin=3.0)], scored=True)
    batch = scored.batch([0, 1])
    assert batch["chosen_mask"].sum(1).tolist() == [5, 0] and batch["margin"].tolist() == [3, 0]


def test_wrong_dates_are_wrong():
    dates = tasks.load("wrong_dates:en-fr", Preference)
    right = {(pair.source, pair.target) for pair in tasks.load("dates:en-fr", tasks.Pair).train}
    texts = {(e.prompt[0]["content"], e.chosen[0]["content"]) for e in dates.train}
    assert texts == right and len(dates.validation) > 1000
    assert not any((e.prompt[0]["content"], e.rejected[0]["content"]) in right for e in dates.train)
