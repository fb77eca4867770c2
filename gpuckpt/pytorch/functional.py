"""The fused operations as functions of torch tensors, or of NumPy, CuPy or JAX arrays (see `interop`)."""

from gpuckpt.pytorch import cross_entropy as _cross_entropy
from gpuckpt.pytorch import gated as _gated
from gpuckpt.pytorch import linear as _linear
from gpuckpt.pytorch import mlp as _mlp
from gpuckpt.pytorch.gated import gated_mlp_scratch_bytes
from gpuckpt.pytorch.interop import accepts_arrays, vjp
from gpuckpt.pytorch.linear import linear_scratch_bytes
from gpuckpt.pytorch.mlp import mlp_scratch_bytes
from gpuckpt.pytorch.norm import Norm

__all__ = [
    "Norm",
    "gated_mlp",
    "gated_mlp_scratch_bytes",
    "linear",
    "linear_cross_entropy",
    "linear_scratch_bytes",
    "mlp",
    "mlp_scratch_bytes",
    "vjp",
]

linear = accepts_arrays(_linear.linear)
mlp = accepts_arrays(_mlp.mlp)
gated_mlp = accepts_arrays(_gated.gated_mlp)
linear_cross_entropy = accepts_arrays(_cross_entropy.linear_cross_entropy)
