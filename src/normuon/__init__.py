"""NorMuon: orthogonalised momentum with one adaptive scale per neuron, for PyTorch."""

from normuon.convert import convert_state
from normuon.learning_rate import suggest_lr
from normuon.models.groups import describe_groups, param_groups
from normuon.models.view import MatrixView
from normuon.optimizer import NorMuon
from normuon.planning import plan_for

__all__ = [
    "MatrixView",
    "NorMuon",
    "convert_state",
    "describe_groups",
    "param_groups",
    "plan_for",
    "suggest_lr",
]
__version__ = "0.1.0"
