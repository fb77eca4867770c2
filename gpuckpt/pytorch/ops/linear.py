"""`linear`: y = dropout(act(x W^T + b)) + residual, saving x and the weights and nothing else.

Backward recomputes z = x W^T + b: on Triton inside the kernel that multiplies by act'(z), elsewhere with torch. dX = dz W
and dW = dz^T x are plain GEMMs and stay with torch (cuBLAS on CUDA).

GEMMs of a training step: 4 with an activation (forward, z again, dX, dW), 3 without (there is no z to recompute).
Under autocast the operation runs in autocast's dtype, fixed in forward; parameters are saved as they are, uncast.

Shapes: x (M, K), weight (N, K), bias (N,), residual, y, dy, dz (M, N); C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.ops._activations import check_activation
from gpuckpt.pytorch.ops._chunking import choose_chunk_rows, chunks, first_rows, limits, take
from gpuckpt.pytorch.ops._dropout import Mask, check_dropout, draw_seed
from gpuckpt.pytorch.ops._operands import (
    autocast_input,
    cast,
    cast_bytes,
    check_weight,
    like_rows_of,
    rows_of,
)
from gpuckpt.pytorch.ops._register import FusedOp
from gpuckpt.pytorch.ops._rows import dz_into, forward_into, partials_bytes
from gpuckpt.pytorch.ops._weight_grads import (
    BiasGrad,
    Scratch,
    WeightGrad,
    bias_scratch,
    sum_rows,
    weight_scratch,
)
from gpuckpt.pytorch.ops.norm import Norm

__all__ = ["linear", "linear_scratch_bytes"]


def linear_scratch_bytes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: int,
    *,
    plain: bool = False,
    mask: Mask | None = None,
    needs: Sequence[bool] = (True, True, True),
    main: Tensor | None = None,
) -> int:
    """Bytes that backward holds in addition to the gradients it returns, with `chunk` rows at a time.

    dz of one chunk (nothing where the layer is `plain`, with neither activation nor dropout), the weight and bias cast to x's
    dtype where theirs differs, and the sums of dW and db. Of x (M, K), weight (N, K), bias and main only shape, dtype and
    device matter. needs: the gradients of x, weight and bias that are wanted. Exact in float32 by torch; else a bound, which
    counts 16-bit gradients as well as the float32 sums that they are made from.

    >>> x, weight = torch.empty(64, 8), torch.empty(16, 8)
    >>> linear_scratch_bytes(x, weight, None, 64), linear_scratch_bytes(x, weight, None, 64, plain=True)
    (4096, 0)
    """
    several = chunk < x.shape[0]
    total = cast_bytes(x.dtype, weight, bias)
    if not plain:
        total += chunk * weight.shape[0] * x.dtype.itemsize
    parts = [weight_scratch(weight, x.dtype, chunk, several, main)] if needs[1] else []
    if needs[2] and bias is not None:
        held, passing = bias_scratch(bias, x.dtype, chunk, several)
        parts.append(Scratch(held, passing + (0 if plain else partials_bytes(x, weight, chunk, mask))))
    return total + sum(part.held for part in parts) + max((part.passing for part in parts), default=0)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout: float,
    chunk_rows: int | None,
    scratch_bytes: int | None,
) -> Tensor:
    """x (M, K) -> y (M, N) in x's dtype. The limits are for backward."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    return forward_into(y, x, cast(weight, x), cast(bias, x), activation, residual, Mask.of(dropout, seed))


def gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout: float,
    chunk_rows: int | None,
    scratch_bytes: int | None,
    needs: list[bool],
    mains: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """(dx, dW, db). x may be None where neither dW nor z is wanted."""
    needs_x, needs_weight, needs_bias = needs
    (main,) = mains
    mask = Mask.of(dropout, seed)
    plain = activation == "identity" and mask is None
    rows = dy.shape[0]
    like = dy if x is None else x
    chunk = choose_chunk_rows(
        rows,
        lambda c: linear_scratch_bytes(like, weight, bias, c, plain=plain, mask=mask, needs=needs, main=main),
        None if plain else chunk_rows,
        None if plain else scratch_bytes,
    )
    several = chunk < rows
    used_weight, used_bias = cast(weight, dy), None if plain else cast(bias, dy)
    dx = dy.new_empty(rows, weight.shape[1]) if needs_x else None
    dw = WeightGrad(weight, several, main) if needs_weight else None
    db = BiasGrad(bias) if needs_bias and bias is not None else None
    scratch = None if plain else dy.new_empty(chunk, weight.shape[0])
    for part in chunks(rows, chunk):
        if scratch is None:
            dz = take(dy, part)
            total = None if db is None else sum_rows(dz)
        else:
            assert x is not None
            dz = first_rows(scratch, part)
            total = dz_into(
                dz, take(dy, part), take(x, part), used_weight, used_bias, activation, db is not None, mask, part.start
            )
        if db is not None:
            assert total is not None
            db.add(total)
        del total  # or it would still be held while dX and dW are made
        if dx is not None:
            torch.mm(dz, used_weight, out=take(dx, part))
        if dw is not None:
            assert x is not None
            dw.add(dz, take(x, part))
    return [dx, None if dw is None else dw.result(), None if db is None else db.result()]


def _keeps_input(needs: Sequence[bool], saved: Sequence[Any], options: Sequence[Any]) -> bool:
    # A frozen plain linear needs its weight alone; the rows of x are wanted for dW or to recompute z.
    recomputes = options[0] != "identity" or saved[2] is not None
    return needs[1] or (recomputes and any(needs[:3]))


OP = FusedOp("linear", forward, gradients, operands=("x", "weight", "bias"), keeps_input=_keeps_input)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
    dropout: float = 0.0,
    norm: Norm | None = None,
    chunk_rows: int | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """dropout(act(x W^T + b)) + residual, keeping only x for backward.

    Args:
        x: (..., K), floating point.
        weight: (N, K). Where it carries `main_grad`, its gradient is added there in place and autograd sees none.
        bias: (N,) or None.
        activation: identity, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        residual: (..., N), added last, or None.
        dropout: probability of dropping an element. Backward computes the mask again from a seed that is drawn from torch's
            CPU generator; besides x it keeps these 8 bytes.
        norm: a `Norm` of x to compute with instead of x. What is kept for backward is x itself, and backward normalises it again:
            one more transient of x's size.
        chunk_rows: rows for which backward holds dz at a time; by default all.
        scratch_bytes: the most that backward may hold in addition to the gradients (`linear_scratch_bytes`), instead of
            `chunk_rows`. Inside `with budget:` the default is the budget's `max_bytes`, but never fewer than 128 rows at a time.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation, a dropout outside 0 to 1.
        BudgetExceeded: in backward, where `scratch_bytes` does not hold the scratch of one row.
        NotImplementedError: a second derivative, forward mode, or torch.func's grad, vjp, jvp and jacrev.
        RuntimeError: a `main_grad` under torch.compile.

    >>> x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    >>> linear(x, weight, activation="relu").sum().backward()
    >>> x.grad.tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    check_activation(activation)
    check_dropout(dropout)
    check_weight(x, weight, bias)
    if residual is not None:
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise DimMismatch(
                x.shape[:-1].numel() * weight.shape[0],
                residual.numel(),
                f"residual of shape {tuple(residual.shape)}: number of elements",
            )
        residual = rows_of(residual.to(autocast_input(x).dtype))
    options = activation, float(dropout), *limits(chunk_rows, scratch_bytes)
    y = OP(x, weight, bias, residual, draw_seed(dropout), *options, norm=norm)
    return like_rows_of(y, x)
