"""What people see of a run: progress bars, the metrics log, plots, and readable numbers."""

from nanoflax.report.metrics_log import MetricsLog, read_metrics, strict, write_whole
from nanoflax.report.plots import parameter_table, plot_alignment, plot_losses, plot_sweep
from nanoflax.report.progress import Bar, Progress, Silent
from nanoflax.report.text import count, duration, numbers, printable

__all__ = [
    "Bar", "MetricsLog", "Progress", "Silent", "count", "duration", "numbers", "parameter_table",
    "plot_alignment", "plot_losses", "plot_sweep", "printable", "read_metrics", "strict", "write_whole"]  # fmt: skip
