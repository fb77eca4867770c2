"""`linear`: y = act(x W^T + b) + residual, saving x and the weights and nothing else.

Backward recomputes z = x W^T + b: on Triton inside the kernel that multiplies by act'(z), elsewhere with torch. dX = dz W
and dW = dz^T x are plain GEMMs and stay with torch (cuBLAS on CUDA).

GEMMs of a training step: 4 with an activation (forward, z again, dX, dW), 3 without (there is no z to recompute).
Under autocast the operation runs in autocast's dtype, fixed in forward; parameters are saved as they are, uncast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.activations import act_backward, act_forward, check_activation
from gpuckpt.pytorch.backend import load_kernels, use_triton

__all__ = ["linear"]


@torch.library.custom_op("gpuckpt::linear_fwd", mutates_args=())
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """x (M, K), weight (N, K), bias (N,), residual (M, N) -> y (M, N) in x's dtype."""
    weight, bias = cast(weight, x), cast(bias, x)
    if use_triton(x):
        load_kernels(x)
        from gpuckpt.kernels import linear as kernel

        y = x.new_empty(x.shape[0], weight.shape[0])
        kernel.linear_fwd(x, weight, bias, y, activation=activation, residual=residual)
        return y
    y = act_forward(activation, F.linear(x, weight, bias))
    return y if residual is None else y + residual


@linear_fwd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("gpuckpt::linear_bwd", mutates_args=())
def linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, needs: list[bool]
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` asks for, in that order; each in its input's dtype.

    x may be None where neither dW nor z is wanted.
    """
    needs_x, needs_weight, needs_bias = needs
    cast_weight = cast(weight, dy)
    dz, db = recompute_dz(dy, x, cast_weight, cast(bias, dy), activation, needs_bias)
    grads = []
    if needs_x:
        grads.append(dz @ cast_weight)
    if needs_weight:
        assert x is not None
        grads.append((dz.t() @ x).to(weight.dtype))
    if needs_bias:
        assert bias is not None
        assert db is not None
        grads.append(db.to(bias.dtype))
    return grads


@linear_bwd.register_fake
def _(
    dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, needs: list[bool]
) -> list[Tensor]:
    shapes = ((dy.shape[0], weight.shape[1]), weight.shape, weight.shape[:1])
    dtypes = (dy.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return [dy.new_empty(s, dtype=d) for s, d, need in zip(shapes, dtypes, needs, strict=True) if need]


def recompute_dz(
    dy: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dz = dy * act'(x W^T + b), and its sum over rows in float32 where it is needed."""
    if activation == "identity":
        return dy, dy.sum(0, dtype=torch.float32) if needs_bias else None
    assert x is not None
    if use_triton(x):
        load_kernels(x)
        from gpuckpt.kernels import linear as kernel

        dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
        shape = kernel.db_partials_shape(x, weight)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device) if needs_bias else None
        kernel.linear_recompute_bwd(x, weight, bias, dy, dz, partials, activation=activation)
        return dz, None if partials is None else partials.sum(0)
    dz = act_backward(activation, dy, F.linear(x, weight, bias))
    return dz, dz.sum(0, dtype=torch.float32) if needs_bias else None


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, activation = inputs
    # A frozen plain linear needs its weight alone; the rows of x are wanted for dW or to recompute z.
    needs_rows = ctx.needs_input_grad[1] or activation != "identity"
    ctx.save_for_backward(x if needs_rows else None, weight, bias)
    ctx.activation = activation
    ctx.has_residual = residual is not None


def _backward(ctx, dy: Tensor):
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = iter(linear_bwd(dy, x, weight, bias, ctx.activation, needs) if any(needs) else ())
    dx, dw, db = (next(grads) if need else None for need in needs)
    return dx, dw, db, dy if ctx.has_residual and ctx.needs_input_grad[3] else None, None


linear_fwd.register_autograd(_backward, setup_context=_setup)


def cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on. The cast is autograd's own, so x's gradient keeps x's dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) + residual, keeping only x for backward.

    Args:
        x: (..., K), floating point.
        weight: (N, K).
        bias: (N,) or None.
        activation: identity, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        residual: (..., N), added after the activation, or None.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit x.
        ValueError: an unknown activation.
    """
    check_activation(activation)
    check_weight(x, weight, bias)
    x = autocast_input(x)
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise DimMismatch(
                rows.shape[0] * weight.shape[0],
                residual.numel(),
                f"residual of shape {tuple(residual.shape)}: number of elements",
            )
        residual = residual.to(x.dtype).reshape(-1, weight.shape[0])
    y = linear_fwd(rows, weight, bias, residual, activation)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
    """Raise unless x (..., K), weight (N, K) and bias (N,) fit together."""
    if weight.dim() != 2:
        raise DimMismatch(2, weight.dim(), f"number of dimensions of {name}")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating-point tensor of shape (..., {weight.shape[1]}), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise DimMismatch(weight.shape[1], x.shape[-1], f"last dimension of the input of {name}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DimMismatch(weight.shape[0], bias.numel(), f"length of the bias of {name}")
