"""Malformed files for every reader of untrusted bytes."""

import random

from tests.campaign import Outcome


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    """To come."""
    del budget_seconds, rng
    return [Outcome("to come", 1, [])]
