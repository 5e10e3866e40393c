"""Output for people: progress bars, the metrics log, plots, and readable numbers."""

from nanoflax.report.data_plots import length_table, plot_data
from nanoflax.report.metrics_log import MetricsLog, read_metrics, write_atomically
from nanoflax.report.plots import parameter_table, plot_alignment, plot_losses, plot_rewards, plot_sweep
from nanoflax.report.progress import NoDisplay, ProgressBar, TrainingProgress
from nanoflax.report.strict_json import number_of, to_json
from nanoflax.report.text import format_bytes, format_count, format_duration, format_metrics, printable

__all__ = [
    "MetricsLog", "NoDisplay", "ProgressBar", "TrainingProgress", "format_bytes", "format_count", "format_duration",
    "format_metrics", "length_table", "number_of", "parameter_table", "plot_alignment", "plot_data", "plot_losses",
    "plot_rewards", "plot_sweep", "printable", "read_metrics", "to_json", "write_atomically"]  # fmt: skip
