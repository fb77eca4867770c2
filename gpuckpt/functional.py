"""The fused operations as functions of torch tensors, or of NumPy, CuPy or JAX arrays.

    from gpuckpt.functional import mlp

Each keeps its input for backward and recomputes the rest. Arrays of other libraries are taken without a copy, and no gradient
is recorded for them: `vjp` is the way to get one.
"""

from gpuckpt.pytorch.ops import gated_mlp as _gated_mlp
from gpuckpt.pytorch.ops import linear as _linear
from gpuckpt.pytorch.ops import linear_cross_entropy as _linear_cross_entropy
from gpuckpt.pytorch.ops import mlp as _mlp
from gpuckpt.pytorch.ops.foreign_arrays import accepts_arrays, vjp
from gpuckpt.pytorch.ops.gated_mlp import gated_mlp_scratch_bytes
from gpuckpt.pytorch.ops.linear import linear_scratch_bytes
from gpuckpt.pytorch.ops.mlp import mlp_scratch_bytes
from gpuckpt.pytorch.ops.norm import Norm

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
gated_mlp = accepts_arrays(_gated_mlp.gated_mlp)
linear_cross_entropy = accepts_arrays(_linear_cross_entropy.linear_cross_entropy)
