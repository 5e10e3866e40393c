"""Cases of tests/hf/cases.py: more dense decoders."""

CASES: dict[str, tuple[str, dict]] = {}
GREEDY: list[str] = []
