"""Online data selection for PyTorch by look-ahead AdamW-influence."""

from selectflow.selector import Selection, Selector
from selectflow.strategies import Candidates, Strategy

__version__ = "0.1.0"

__all__ = ["Candidates", "Selection", "Selector", "Strategy", "__version__"]
