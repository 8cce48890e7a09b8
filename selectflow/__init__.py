"""Online data selection for PyTorch by look-ahead AdamW-influence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # there, the imports above say what the names are
    _MODULES = {
        "AutoHorizon": "control.ladder",
        "AutoRate": "control.rules",
        "Decision": "control.rules",
        "HorizonSchedule": "control.horizon",
        "Selector": "selector",
    }

    def __getattr__(name: str) -> Any:
        """A public name, imported on first use: the command line starts without torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'strategies')}")
        globals()[name] = getattr(module, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
