"""Which examples of a pool to keep: a strategy gives each a score, the largest are kept.

A strategy is a function of `Candidates`. It asks for what it needs, and only that is computed:
`uniform` costs nothing, `loss` one forward pass, `influence` the look-ahead and two passes.
`baselines` has what else the field scores by, and `STRATEGIES` the names of all.
"""

from selectflow.strategies.baselines import SIGNED, STRATEGIES, Boltzmann, TargetPath
from selectflow.strategies.candidates import Candidates, Selection, Strategy, checked_scores
from selectflow.strategies.irreducible import ReducibleLoss
from selectflow.strategies.scorer import Scorer
from selectflow.strategies.training import Memory, Training
from selectflow.strategies.weighting import Weights

__all__ = [
    "SIGNED",
    "STRATEGIES",
    "Boltzmann",
    "Candidates",
    "Memory",
    "ReducibleLoss",
    "Scorer",
    "Selection",
    "Strategy",
    "TargetPath",
    "Training",
    "Weights",
    "checked_scores",
]
