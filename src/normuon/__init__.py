"""NorMuon: orthogonalised momentum with one adaptive scale per neuron, for PyTorch."""

from normuon.groups import describe_groups, param_groups
from normuon.matrix_view import MatrixView
from normuon.optimizer import NorMuon
from normuon.planning import plan_for

__all__ = ["MatrixView", "NorMuon", "describe_groups", "param_groups", "plan_for"]
__version__ = "0.1.0.dev0"
