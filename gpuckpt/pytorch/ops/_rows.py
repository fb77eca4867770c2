"""The parts of the fused layers that run on either back end, for the rows of one chunk: they write where they are told to.

Shapes: C rows of a chunk; x (C, K), weight (N, K), bias (N,), residual, dy, dz and every `out` (C, N).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpuckpt.backend import load_kernels, multiply_by_triton, use_triton
from gpuckpt.pytorch.ops._activations import activate_, differentiate, keep_
from gpuckpt.pytorch.ops._dropout import Mask
from gpuckpt.pytorch.ops._operands import as_if_cast
from gpuckpt.pytorch.ops._weight_grads import sum_rows

__all__ = ["affine_into", "dz_into", "forward_into", "partials_bytes"]


def forward_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    mask: Mask | None = None,
    first_row: int = 0,
) -> Tensor:
    """dropout(act(x W^T + b)) + residual into out (C, N), all of one dtype. Row 0 is row `first_row` of the mask."""
    if _by_triton(x, mask):
        load_kernels(x)
        from gpuckpt.kernels import linear as kernel

        kernel.linear_fwd(x, weight, bias, out, activation=activation, residual=residual, **_drop(mask, first_row))
        return out
    activate_(activation, affine_into(out, x, weight, bias))
    if mask is not None:
        mask.apply_(out, first_row)
    return out if residual is None else out.add_(residual)


def dz_into(
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    needs_bias: bool,
    mask: Mask | None = None,
    first_row: int = 0,
) -> Tensor | None:
    """dz = dropout(dy) * act'(x W^T + b) into out (C, N); returns its sum over rows, (N,), where that is wanted."""
    if _by_triton(x, mask):
        load_kernels(x)
        from gpuckpt.kernels import linear as kernel

        partials = None
        if needs_bias:
            partials = torch.empty(
                kernel.db_partials_shape(x, weight, None, **_drop(mask, first_row)),
                dtype=torch.float32,
                device=x.device,
            )
        kernel.linear_recompute_bwd(x, weight, bias, dy, out, partials, activation=activation, **_drop(mask, first_row))
        return None if partials is None else partials.sum(0)
    if activation == "identity":
        out.copy_(dy)
    else:
        differentiate(activation, dy, keep_(activation, affine_into(out, x, weight, bias)), out)
    if mask is not None:
        mask.apply_(out, first_row)
    return sum_rows(out) if needs_bias else None


def affine_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b into out (C, N), by torch."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _by_triton(x: Tensor, mask: Mask | None) -> bool:
    # The mask by plain code is made on the CPU, which a GPU would wait for.
    return multiply_by_triton(x) if mask is None else use_triton(x)


def _drop(mask: Mask | None, first_row: int) -> dict[str, Any]:
    return {} if mask is None else {"dropout": mask.kernel(first_row)}


def partials_bytes(x: Tensor, weight: Tensor, chunk: int, mask: Mask | None) -> int:
    """What the kernel of `dz_into` needs for the sum over rows; nothing where torch adds them up."""
    if not _by_triton(x, mask):
        return 0
    load_kernels(x)
    from gpuckpt.kernels import linear as kernel

    return 4 * math.prod(kernel.db_partials_shape(x[:chunk], as_if_cast(weight, x), None, **_drop(mask, 0)))
