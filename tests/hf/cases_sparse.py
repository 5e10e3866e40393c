"""Cases of tests/hf/cases.py: mixture of experts."""

CASES: dict[str, tuple[str, dict]] = {}
GREEDY: list[str] = []
