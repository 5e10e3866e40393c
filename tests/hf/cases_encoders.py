"""Cases of tests/hf/cases.py: more encoders and encoder-decoders."""

CASES: dict[str, tuple[str, dict]] = {}
GREEDY: list[str] = []
