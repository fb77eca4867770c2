"""`mlp`: y = act(x W1^T + b1) W2^T + b2, saving x and the weights and nothing else.

Neither z = x W1^T + b1 nor h = act(z) is kept; backward recomputes both from x. That is 7 GEMMs in a training step against
6 for the plain form, which keeps two hidden-size tensors, and 8 for a plain checkpoint around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.activations import act_backward, act_forward, check_activation
from gpuckpt.pytorch.backend import load_kernels, use_triton
from gpuckpt.pytorch.linear import autocast_input, cast, check_weight, linear_fwd, recompute_dz

__all__ = ["mlp"]


@torch.library.custom_op("gpuckpt::mlp_fwd", mutates_args=())
def mlp_fwd(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    """x (M, K), w1 (H, K), b1 (H,), w2 (N, H), b2 (N,) -> (M, N) in x's dtype."""
    h = linear_fwd(x, w1, b1, None, activation)
    return F.linear(h, cast(w2, x), cast(b2, x))


@mlp_fwd.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[0])


@torch.library.custom_op("gpuckpt::mlp_bwd", mutates_args=())
def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, w1, b1, w2, b2 that `needs` asks for, in that order; each in its input's dtype."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    grads: list[Tensor] = []
    first, bias, second = cast(w1, x), cast(b1, x), cast(w2, x)
    h = None
    dz, db1 = None, None
    if needs_x or needs_w1 or needs_b1:
        dh = dy @ second
        if use_triton(x):
            load_kernels(x)
            dz, db1 = recompute_dz(dh, x, first, bias, activation, needs_b1)
        else:
            z = F.linear(x, first, bias)
            dz = act_backward(activation, dh, z)
            db1 = dz.sum(0, dtype=torch.float32) if needs_b1 else None
            h = act_forward(activation, z) if needs_w2 else None
    if needs_w2 and h is None:
        h = linear_fwd(x, w1, b1, None, activation)
    if needs_x:
        grads.append(dz @ first)
    if needs_w1:
        grads.append((dz.t() @ x).to(w1.dtype))
    if needs_b1:
        grads.append(db1.to(b1.dtype))
    if needs_w2:
        grads.append((dy.t() @ h).to(w2.dtype))
    if needs_b2:
        grads.append(dy.sum(0, dtype=torch.float32).to(b2.dtype))
    return grads


@mlp_bwd.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x, w1, b1, w2, b2)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need and t is not None]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.activation = inputs[5]


def _backward(ctx, dy: Tensor):
    x, w1, b1, w2, b2 = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = iter(mlp_bwd(dy, x, w1, b1, w2, b2, ctx.activation, needs) if any(needs) else ())
    return (*(next(grads) if need else None for need in needs), None)


mlp_fwd.register_autograd(_backward, setup_context=_setup)


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None = None, *, activation: str = "gelu"
) -> Tensor:
    """act(x w1^T + b1) w2^T + b2, keeping only x for backward.

    Args:
        x: (..., K), floating point.
        w1, b1: (H, K) and (H,) or None.
        w2, b2: (N, H) and (N,) or None.
        activation: identity, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation.
    """
    check_activation(activation)
    check_weight(x, w1, b1, "w1")
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0]:
        raise DimMismatch(w1.shape[0], w2.shape[-1], "last dimension of w2 (the hidden size)")
    if b2 is not None and b2.shape != w2.shape[:1]:
        raise DimMismatch(w2.shape[0], b2.numel(), "length of b2")
    x = autocast_input(x)
    y = mlp_fwd(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, activation)
    return y.reshape(*x.shape[:-1], w2.shape[0])
