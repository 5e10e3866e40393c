"""Cases of tests/hf/cases.py: latent attention."""

CASES: dict[str, tuple[str, dict]] = {}
GREEDY: list[str] = []
