"""The fused operations as functions of torch tensors."""

from gpuckpt.pytorch.linear import linear
from gpuckpt.pytorch.mlp import mlp

__all__ = ["linear", "mlp"]
