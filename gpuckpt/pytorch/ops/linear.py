"""`linear`: y = dropout(act(x W^T + b)) + residual, saving x and the weights and nothing else.

Backward recomputes z = x W^T + b: on Triton inside the kernel that multiplies by act'(z), elsewhere with torch. dX = dz W
and dW = dz^T x are plain GEMMs and stay with torch (cuBLAS on CUDA).

GEMMs of a training step: 4 with an activation (forward, z again, dX, dW), 3 without (there is no z to recompute).
Under autocast the operation runs in autocast's dtype, fixed in forward; parameters are saved as they are, uncast.

Shapes: x (M, K), weight (N, K), bias (N,), residual, y, dy, dz (M, N); C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.early_stop import about_to_save
from gpuckpt.pytorch.ops._activations import check_activation
from gpuckpt.pytorch.ops._chunking import choose_chunk_rows, chunks, limits
from gpuckpt.pytorch.ops._dropout import Mask, check_dropout, draw_seed
from gpuckpt.pytorch.ops._operands import (
    autocast_input,
    cast,
    cast_bytes,
    check_weight,
    no_double_backward,
    refuse_grad_transforms,
    rows_of,
    without_autocast,
)
from gpuckpt.pytorch.ops._rows import dz_into, forward_into, partials_bytes
from gpuckpt.pytorch.ops._weight_grads import (
    BiasGrad,
    Scratch,
    WeightGrad,
    bias_scratch,
    main_grad_of,
    sum_rows,
    weight_scratch,
)
from gpuckpt.pytorch.ops.norm import Norm, again, normalise

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
    """What backward holds beside the gradients it returns, with `chunk` rows at a time.

    dz of one chunk (nothing where the layer is `plain`, with neither activation nor dropout), the weight and bias cast to x's
    dtype where theirs differs, and the sums of dW and db. Of x (M, K), weight (N, K), bias and main only shape, dtype and
    device matter. needs: the gradients of x, weight and bias that are wanted. Exact in float32 by torch; else a bound, which
    counts 16-bit gradients beside the float32 sums that they are made from.
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


@torch.library.custom_op("gpuckpt::linear_fwd", mutates_args=())
def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    main: Tensor | None,
    activation: str,
    dropout: float,
    chunk_rows: int | None,
    scratch_bytes: int | None,
    raw: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_kind: str = "rms",
    norm_eps: float = 1.0,
) -> Tensor:
    """x (M, K) -> y (M, N) in x's dtype. What else backward needs (main, limits, the norm that made x of
    raw) passes through here."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    with without_autocast(x.device.type):
        return forward_into(y, x, cast(weight, x), cast(bias, x), activation, residual, Mask.of(dropout, seed))


@linear_fwd.register_fake
def _(x, weight, bias, residual, seed, main, activation, dropout, chunk_rows, scratch_bytes, *recipe) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("gpuckpt::linear_bwd", mutates_args=())
def linear_bwd(
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
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` asks for, in that order; each in its input's dtype."""
    grads = gradients(dy, x, weight, bias, seed, activation, dropout, chunk_rows, scratch_bytes, needs, None)
    return [grad for grad in grads if grad is not None]


@linear_bwd.register_fake
def _(dy, x, weight, bias, seed, activation, dropout, chunk_rows, scratch_bytes, needs) -> list[Tensor]:
    shapes = ((dy.shape[0], weight.shape[1]), weight.shape, weight.shape[:1])
    dtypes = (dy.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    return [dy.new_empty(s, dtype=d) for s, d, need in zip(shapes, dtypes, needs, strict=True) if need]


no_double_backward(linear_bwd, "linear")


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
    main: Tensor | None,
) -> list[Tensor | None]:
    """(dx, dW, db), None where not needed, and for dW where it was added to `main`. x may be None where neither dW nor z
    is wanted."""
    needs_x, needs_weight, needs_bias = needs
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
    with without_autocast(dy.device.type):
        for part in chunks(rows, chunk):
            if scratch is None:
                dz = dy[part]
                total = None if db is None else sum_rows(dz)
            else:
                assert x is not None
                dz = scratch[: part.stop - part.start]
                total = dz_into(
                    dz, dy[part], x[part], used_weight, used_bias, activation, db is not None, mask, part.start
                )
            if db is not None:
                assert total is not None
                db.add(total)
            del total  # what follows would be made beside it
            if dx is not None:
                torch.mm(dz, used_weight, out=dx[part])
            if dw is not None:
                assert x is not None
                dw.add(dz, x[part])
    return [dx, None if dw is None else dw.result(), None if db is None else db.result()]


def _saved(inputs, needs) -> tuple[Tensor | None, ...]:
    x, weight, bias, _, seed, _, activation = inputs[:7]
    # A frozen plain linear needs its weight alone; the rows of x are wanted for dW or to recompute z.
    recomputes = any(needs[:3]) and (activation != "identity" or seed is not None)
    kept = (x, None, None, None) if inputs[10] is None else (None, *inputs[10:13])
    return (weight, bias, seed, *(kept if recomputes or needs[1] else (None,) * 4))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*_saved(inputs, ctx.needs_input_grad))
    ctx.main, *ctx.options = inputs[5:10]
    ctx.norm = inputs[13:]


def _backward(ctx, dy: Tensor):
    weight, bias, seed, x, *raw = ctx.saved_tensors
    x = again(x, (*raw, *ctx.norm))
    needs = list(ctx.needs_input_grad[:3])
    if ctx.main is not None and needs[1]:
        activation, dropout, chunk_rows, scratch_bytes = ctx.options
        grads = gradients(dy, x, weight, bias, seed, activation, dropout, chunk_rows, scratch_bytes, needs, ctx.main)
        return (*grads, dy if ctx.needs_input_grad[3] else None, *(None,) * 11)
    found = iter(linear_bwd(dy, x, weight, bias, seed, *ctx.options, needs) if any(needs) else ())
    return (*(next(found) if need else None for need in needs), dy if ctx.needs_input_grad[3] else None, *(None,) * 11)


linear_fwd.register_autograd(_backward, setup_context=_setup)


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
        scratch_bytes: the most that backward may hold beside the gradients (`linear_scratch_bytes`), instead of `chunk_rows`.
            Inside `with budget:` the default is the budget's `max_bytes`, but never fewer than 128 rows at a time.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation, a dropout that is no probability.
        BudgetExceeded: in backward, where `scratch_bytes` does not hold the scratch of one row.
    """
    check_activation(activation)
    check_dropout(dropout)
    check_weight(x, weight, bias)
    refuse_grad_transforms("linear", x, weight, bias, residual)
    least_rows, most_bytes = limits(chunk_rows, scratch_bytes)
    x = autocast_input(x)
    rows, *recipe = normalise(rows_of(x), norm)
    if residual is not None:
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise DimMismatch(
                rows.shape[0] * weight.shape[0],
                residual.numel(),
                f"residual of shape {tuple(residual.shape)}: number of elements",
            )
        residual = rows_of(residual.to(x.dtype))
    inputs = (
        rows,
        weight,
        bias,
        residual,
        draw_seed(dropout),
        main_grad_of(weight),
        activation,
        float(dropout),
        least_rows,
        most_bytes,
        *recipe,
    )
    about_to_save(_saved, inputs)
    y = linear_fwd(*inputs)
    return y.reshape(*x.shape[:-1], weight.shape[0])
