"""NorMuon: orthogonalised momentum with one adaptive scale per neuron, for PyTorch."""

from normuon.groups import describe_groups, param_groups
from normuon.matrix_view import MatrixView
from normuon.optimizer import NorMuon

__all__ = ["MatrixView", "NorMuon", "describe_groups", "param_groups"]
__version__ = "0.1.0.dev0"
