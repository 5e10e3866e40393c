"""Multiple choice: ranks candidate texts by their likelihood after a prompt, and measures the accuracy."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from nanoflax import data, generate, tokenizers
from nanoflax.errors import UserError, listed


class Question(NamedTuple):
    place: str  # file:line, or the number of the question, for messages
    prompt: str
    candidates: list[str]
    answer: int | None  # index of the right candidate, if known


def read_questions(path: str) -> list[Question]:
    """The questions of a .jsonl file: see `questions_of`. Raises: UserError naming every bad line."""
    report = data.DataReport()
    with data.open_text(path) as file:
        records = list(data.json_lines(file, path, report))
    problems = [
        f"{place} is not JSON" if problem == data.MALFORMED else f"{place}: {problem}"
        for problem, places in report.places.items()
        for place in places
    ]
    if not records and not problems:
        raise UserError(f"--candidates={path} holds no question")
    return questions_of(records, problems)


def questions_of(records: Iterable[tuple[str, Any]], problems: Iterable[str] = ()) -> list[Question]:
    """Questions from (place, record) pairs. A record is a dict with `prompt`, `candidates` (texts) and,
    if known, `answer`: the right candidate or its index.

    Raises: UserError that names `problems` and the problems of the records.
    """
    questions, problems = [], list(problems)
    for place, record in records:
        if isinstance(record, Question):
            questions.append(record)
            continue
        q = record if isinstance(record, dict) else {}
        prompt, texts, answer = q.get("prompt"), q.get("candidates"), q.get("answer")
        texts = texts if isinstance(texts, list) and all(isinstance(text, str) and text for text in texts) else []
        if not isinstance(prompt, str) or not texts:
            problems.append(f"{place} must have a 'prompt' (text) and 'candidates' (a list of texts, none empty)")
            continue
        if isinstance(answer, str) and answer in texts:
            answer = texts.index(answer)
        if answer is not None and (type(answer) is not int or not 0 <= answer < len(texts)):
            problems.append(
                f"{place} has the answer {answer!r}, which is neither a candidate nor an index (0 to {len(texts) - 1})"
            )
            continue
        questions.append(
            Question(place, tokenizers.well_formed(prompt), [tokenizers.well_formed(text) for text in texts], answer)
        )
    if problems:
        raise UserError(listed(problems))
    if not questions:
        raise UserError("there is no question to rank")
    return questions


def rank_candidates(model: Any, params: dict, tokenizer: Any, questions: list[Question]) -> dict[str, Any]:
    """The metrics of all questions, and `rankings`: the candidates of each question, the most probable first.

    log_likelihood is in nats; per_token and per_byte are log_likelihood divided by the number of tokens and
    of UTF-8 bytes of the candidate. With answers: accuracy, the share of questions whose most probable
    candidate is right, and mean_reciprocal_rank of the right candidate; NAME_normalised ranks by per_byte.
    Raises: UserError that names every candidate that is too long for the model's context.
    """
    reads_source = model.config.reads_source
    pairs = [candidate_ids(tokenizer, q.prompt, text, reads_source) for q in questions for text in q.candidates]
    names = [f"{q.place} candidate {i}" for q in questions for i in range(len(q.candidates))]
    prompts, candidates = (list(ids) for ids in zip(*pairs, strict=True))
    totals = iter(generate.log_likelihoods(model, params, prompts, candidates, names=names))
    sizes = map(len, candidates)
    rankings = [_ranking(q, totals, sizes) for q in questions]
    result: dict[str, Any] = {"questions": len(questions), "candidates": len(pairs)}
    answered = [record for record in rankings if "rank" in record]
    result["answers"] = len(answered)
    for name, rank in (("", "rank"), ("_normalised", "rank_normalised")) if answered else ():
        ranks = [record[rank] for record in answered]
        result[f"accuracy{name}"] = sum(r == 1 for r in ranks) / len(ranks)
        result[f"mean_reciprocal_rank{name}"] = sum(1 / r for r in ranks) / len(ranks)
    return result | {"rankings": rankings}


def _ranking(question: Question, totals: Iterable[float], sizes: Iterable[int]) -> dict[str, Any]:
    rows = [
        {
            "text": text,
            "log_likelihood": float(total),
            "tokens": n,
            "per_token": float(total) / n,
            "per_byte": float(total) / len(text.encode()),
        }
        for text, total, n in zip(question.candidates, totals, sizes, strict=False)  # iterators over all questions
    ]
    record = {"prompt": question.prompt, "candidates": sorted(rows, key=lambda row: -row["log_likelihood"])}
    if question.answer is None:
        return record
    ranks = [generate.rank([row[score] for row in rows], question.answer) for score in ("log_likelihood", "per_byte")]
    return record | {"answer": question.candidates[question.answer], "rank": ranks[0], "rank_normalised": ranks[1]}


def candidate_ids(tokenizer: Any, prompt: str, text: str, reads_source: bool) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the candidate after it).

    For a decoder see `tokenizers.continuation_ids`. For a model that reads a source, the candidate gets the same
    special tokens as a target in training.
    """
    if not reads_source:
        return tokenizers.continuation_ids(tokenizer, prompt, text)
    ids = tokenizers.prompt_ids(tokenizer, prompt, reads_source)
    return ids, tokenizer.framing.target(tokenizer.encode_target(text))
