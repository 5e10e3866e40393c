"""Problems: their records, and one split for problems and the supervised examples of the same source."""

import json

import pytest

from nanoflax import tasks
from nanoflax.config import GRPO
from nanoflax.errors import UserError

MESSAGES = [{"role": "user", "content": "2+3"}]


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_records_and_what_is_left_out(tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "Q: 1+1 = ", "answer": 2, "level": "easy", "tests": ["a", "b"]},
        {"prompt": MESSAGES, "answer": "5"},
        {"prompt": "  ", "answer": "1"},
        {"prompt": ["x"], "answer": "1"},
        {"prompt": 3, "answer": "1"},
        {"prompt": "a", "answer": {"x": 1}},
        {"prompt": [*MESSAGES, {"role": "assistant", "content": "5"}], "answer": "5"},
        {"prompt": "write f", "answer": ["assert f(1)", "assert f(2)"]},
        {"prompt": "no answer"},
    )
    found = tasks.load(tasks.TaskSource(f"jsonl:{file}", validation=f"problems:{file}"), tasks.Problem)
    first, second, third, fourth = found.train
    assert (first.prompt, first.answer, first.extra) == ("Q: 1+1 = ", "2", {"level": "easy", "tests": ["a", "b"]})
    assert second.prompt == tuple(MESSAGES) and second.extra == {}
    assert third.answer == "assert f(1)\nassert f(2)" and fourth.answer == ""
    text = "\n".join(found.report.lines())
    assert "an empty prompt, left out" in text and "ends with a reply, left out" in text
    assert "neither a text nor messages" in text and "neither a text nor a number" in text


def test_tables_and_renamed_fields(tmp_path):
    (tmp_path / "p.csv").write_text("question,result\n1+1=,2\n1+2=,3\n")
    source = tasks.TaskSource(f"csv:{tmp_path}/p.csv", fields="prompt=question,answer=result")
    found = tasks.load(source, tasks.Problem)
    assert sorted(p.answer for p in found.train + found.validation) == ["2", "3"]
    with pytest.raises(UserError, match="prompt=question"):
        tasks.load(f"jsonl:{write(tmp_path / 'q.jsonl', {'question': 'x', 'answer': 'y'})}", tasks.Problem)


@pytest.mark.parametrize("messages", [False, True])
def test_supervised_examples_have_the_same_split(tmp_path, messages):
    prompt = lambda i: [{"role": "user", "content": f"{i}+1 = "}] if messages else f"{i}+1 = "
    file = write(tmp_path / "p.jsonl", *({"prompt": prompt(i), "answer": i + 1} for i in range(200)))
    source = tasks.TaskSource(f"problems:{file}", validation_fraction=0.2)
    held = {str(p.prompt) for p in tasks.load(source, tasks.Problem).validation}
    assert 20 < len(held) < 60
    chats = tasks.load(source, tasks.Chat)
    assert chats.validation[0].messages[1]["role"] == "assistant"
    inputs = {str(c.messages[:1]) if messages else c.messages[0]["content"] for c in chats.validation}
    strip = lambda texts: {text.strip() for text in texts}
    if not messages:
        assert strip(inputs) == strip(held)
        texts = tasks.load(source, tasks.Text).validation
        assert {t.text.rpartition("= ")[0] + "= " for t in texts} == held
        pairs = tasks.load(source, tasks.Pair).validation
        assert {p.source for p in pairs} == strip(held)
    else:
        assert inputs == held


def test_few_examples_have_the_same_split_too(tmp_path):
    file = write(tmp_path / "p.jsonl", *({"prompt": f"{i}?", "answer": "x"} for i in range(3)))
    problems, texts = (tasks.load(f"problems:{file}", kind) for kind in (tasks.Problem, tasks.Text))
    assert [p.prompt + "x" for p in problems.validation] == [t.text for t in texts.validation] == ["2?x"]


def test_arithmetic_is_right_and_held_out():
    found = tasks.load("arithmetic:2", tasks.Problem)
    assert len(found.train) + len(found.validation) == 20_000 and len(found.validation) > 800
    assert all(eval(p.prompt[:-1]) == int(p.answer) for p in found.train[:500])
    texts = tasks.load("arithmetic:2", tasks.Text)
    assert [t.text for t in texts.validation] == [p.prompt + p.answer for p in found.validation]
    assert not {p.prompt for p in found.train} & {p.prompt for p in found.validation}
    with pytest.raises(UserError, match="1 to 6"):
        tasks.load("arithmetic:x", tasks.Problem)


def test_pairs_are_problems_and_chats():
    problem = tasks.load("dates:en-fr", tasks.Problem).validation[0]
    chat = tasks.load("dates:en-fr", tasks.Chat).validation[0]
    pair = tasks.load("dates:en-fr", tasks.Pair).validation[0]
    assert (problem.prompt, problem.answer) == (pair.source, pair.target)
    assert [m["content"] for m in chat.messages] == [pair.source, pair.target]


def test_a_failed_reward_counts_in_no_mean():
    """A reward of 0 would be the best of these."""
    predictions = [{"reward": -2.0, "best_reward": -1.0}, {"reward": None, "best_reward": None}]
    numbers, report = tasks.TASKS["grpo"].score(predictions, [], GRPO(attempts=2))
    assert numbers == {"reward": -2.0, "pass_at_k": -1.0} and report["rewards_failed"] == 1
