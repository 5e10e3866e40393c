"""Cases of tests/hf/cases.py: models with recurrent layers."""

CASES: dict[str, tuple[str, dict]] = {}
GREEDY: list[str] = []
