"""What runs report: metrics, W&B and a progress line; and W&B runs read back."""

from selectflow.tracking.comparison import Chart, Report, log_report
from selectflow.tracking.progress import Progress
from selectflow.tracking.remote import RemoteRun, TrackingError, download_run
from selectflow.tracking.tracker import Mode, Tracker

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
