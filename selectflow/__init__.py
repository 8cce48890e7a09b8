"""Online data selection for PyTorch by look-ahead AdamW-influence."""

from selectflow.control.horizon import HorizonSchedule
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rules import AutoRate, Decision
from selectflow.selector import Selector
from selectflow.strategies import Candidates, Scorer, Selection, Strategy

__version__ = "0.1.0"

__all__ = [
    "AutoHorizon",
    "AutoRate",
    "Candidates",
    "Decision",
    "HorizonSchedule",
    "Scorer",
    "Selection",
    "Selector",
    "Strategy",
    "__version__",
]
