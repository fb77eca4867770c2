"""The fused operations as functions of torch tensors."""

from gpuckpt.pytorch.gated import gated_mlp
from gpuckpt.pytorch.linear import linear
from gpuckpt.pytorch.mlp import mlp

__all__ = ["gated_mlp", "linear", "mlp"]
