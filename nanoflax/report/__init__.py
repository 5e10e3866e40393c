"""Output for people: progress bars, the metrics log, plots, and readable numbers."""

from nanoflax.report.metrics_log import MetricsLog, json_numbers, read_metrics, write_atomically
from nanoflax.report.plots import parameter_table, plot_alignment, plot_losses, plot_sweep
from nanoflax.report.progress import NoDisplay, ProgressBar, TrainingProgress
from nanoflax.report.text import format_count, format_duration, format_metrics, printable

__all__ = [
    "MetricsLog", "NoDisplay", "ProgressBar", "TrainingProgress", "format_count", "format_duration", "format_metrics",
    "json_numbers", "parameter_table", "plot_alignment", "plot_losses", "plot_sweep", "printable", "read_metrics",
    "write_atomically"]  # fmt: skip
