"""Online data selection for PyTorch by look-ahead AdamW-influence."""

from selectflow.horizons import HorizonSchedule
from selectflow.selection import Selection
from selectflow.selector import Selector
from selectflow.strategies import Candidates, Strategy

__version__ = "0.1.0"

__all__ = [
    "Candidates",
    "HorizonSchedule",
    "Selection",
    "Selector",
    "Strategy",
    "__version__",
]
