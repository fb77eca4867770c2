"""The fused operations as functions of torch tensors."""

from gpuckpt.pytorch.cross_entropy import linear_cross_entropy
from gpuckpt.pytorch.gated import gated_mlp, gated_mlp_scratch_bytes
from gpuckpt.pytorch.linear import linear, linear_scratch_bytes
from gpuckpt.pytorch.mlp import mlp, mlp_scratch_bytes

__all__ = [
    "gated_mlp",
    "gated_mlp_scratch_bytes",
    "linear",
    "linear_cross_entropy",
    "linear_scratch_bytes",
    "mlp",
    "mlp_scratch_bytes",
]
