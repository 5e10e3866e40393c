"""Benchmarks of models: lm-eval's tasks through an adapter, and the perplexity of texts longer than the context."""

from nanoflax.evals.harness import as_lm, run_tasks, table
from nanoflax.evals.likelihood import Score, score_pairs
from nanoflax.evals.strided import strided_perplexity, windows

__all__ = ["Score", "as_lm", "run_tasks", "score_pairs", "strided_perplexity", "table", "windows"]
