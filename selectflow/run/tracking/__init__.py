"""What runs report: metrics, W&B and a progress line; and W&B runs read back."""

from selectflow.run.tracking.comparison import Chart, Report, log_report
from selectflow.run.tracking.progress import Progress
from selectflow.run.tracking.remote import RemoteRun, TrackingError, download_run
from selectflow.run.tracking.tracker import Mode, Tracker

__all__ = [
    "Chart",
    "Mode",
    "Progress",
    "RemoteRun",
    "Report",
    "Tracker",
    "TrackingError",
    "download_run",
    "log_report",
]
