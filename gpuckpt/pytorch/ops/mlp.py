"""`mlp`: y = act(x W1^T + b1) W2^T + b2, saving x and the weights and nothing else.

Neither z = x W1^T + b1 nor h = act(z) is kept; backward recomputes both from x. That is 7 GEMMs in a training step against
6 for the plain form, which keeps two hidden-size tensors, and 8 for a plain checkpoint around it (7 where torch's early stop
spares the last one; h, z and their gradients then exist at full size in backward all the same).

Shapes: x (M, K), w1 (H, K), b1 (H,), w2 (N, H), b2 (N,), y and dy (M, N), h and dz (M, H); C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpuckpt.backend import load_kernels, multiply_by_triton
from gpuckpt.pytorch.ops._activations import check_activation, differentiate, finish, keep_
from gpuckpt.pytorch.ops._chunking import choose_chunk_rows, chunks, first_rows, limits, take
from gpuckpt.pytorch.ops._operands import (
    as_if_cast,
    cast,
    cast_bytes,
    check_bias,
    check_second_weight,
    check_weight,
    like_rows_of,
    wants_copy,
)
from gpuckpt.pytorch.ops._register import FusedOp
from gpuckpt.pytorch.ops._rows import affine_into, forward_into
from gpuckpt.pytorch.ops._weight_grads import (
    BiasGrad,
    Scratch,
    WeightGrad,
    bias_scratch,
    sum_rows,
    weight_scratch,
)
from gpuckpt.pytorch.ops.norm import Norm

__all__ = ["mlp", "mlp_scratch_bytes"]

_ALL = (True,) * 5


def mlp_scratch_bytes(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    chunk: int,
    *,
    copied: bool = False,
    needs: Sequence[bool] = _ALL,
    mains: Sequence[Tensor | None] = (None, None),
) -> int:
    """Bytes that backward holds in addition to the gradients it returns, with `chunk` rows at a time; forward holds less.

    h and dz of one chunk (one of them suffices where the other is not wanted), weights and b1 cast to x's dtype where theirs
    differs, dy of one chunk where it is `copied` for the kernel as `wants_copy` says, and the sums of dW and db. Of the
    tensors only shape, dtype and device matter. needs: the gradients of x, w1, b1,
    w2 and b2 that are wanted. Exact in float32 by torch; else a bound, which counts 16-bit gradients as well as the
    float32 sums that they are made from.

    >>> x, w1, w2 = torch.empty(64, 8), torch.empty(32, 8), torch.empty(8, 32)
    >>> mlp_scratch_bytes(x, w1, None, w2, None, 64) == 2 * 64 * 32 * 4
    True
    """
    several = chunk < x.shape[0]
    total = cast_bytes(x.dtype, w1, b1, w2, b2)
    total += _hidden_buffers(x, needs) * chunk * w1.shape[0] * x.dtype.itemsize
    total += chunk * w2.shape[0] * x.dtype.itemsize if copied else 0
    parts = [
        weight_scratch(weight, x.dtype, chunk, several, main)
        for weight, needed, main in ((w1, needs[1], mains[0]), (w2, needs[3], mains[1]))
        if needed
    ]
    if needs[2] and b1 is not None:
        held, passing = bias_scratch(b1, x.dtype, chunk, several)
        parts.append(Scratch(held, passing + _partials_bytes(x, w1, w2, chunk)))
    if needs[4] and b2 is not None:
        parts.append(bias_scratch(b2, x.dtype, chunk, several))
    return total + sum(part.held for part in parts) + max((part.passing for part in parts), default=0)


def _hidden_buffers(x: Tensor, needs: Sequence[bool]) -> int:
    """Of h and dz, how many a backward needs memory for. By torch z is recomputed in the place of h."""
    if multiply_by_triton(x):
        return any(needs[:3]) + needs[3]
    return 2 if any(needs[:3]) else int(needs[3])


def _partials_bytes(x: Tensor, w1: Tensor, w2: Tensor, chunk: int) -> int:
    if not multiply_by_triton(x):
        return 0
    load_kernels(x)
    from gpuckpt.kernels import mlp as kernel

    return 4 * math.prod(kernel.db_partials_shape(x[:chunk], as_if_cast(w1, x), as_if_cast(w2, x)))


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    chunk_rows: int | None,
    scratch_bytes: int | None,
) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    rows = x.shape[0]
    # Backward holds more than forward does: the chunk that suits it suits both.
    chunk = choose_chunk_rows(rows, lambda c: mlp_scratch_bytes(x, w1, b1, w2, b2, c), chunk_rows, scratch_bytes)
    w1, b1, w2, b2 = cast(w1, x), cast(b1, x), cast(w2, x), cast(b2, x)
    y = x.new_empty(rows, w2.shape[0])
    h = x.new_empty(min(chunk, rows), w1.shape[0])
    for part in chunks(rows, chunk):
        affine_into(take(y, part), forward_into(first_rows(h, part), take(x, part), w1, b1, activation), w2, b2)
    return y


def hidden_into(
    h: Tensor | None,
    dz: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    dy: Tensor,
    w2: Tensor,
    activation: str,
    needs_h: bool,
    needs_bias: bool,
) -> Tensor | None:
    """h and dz of one chunk; returns the sum of dz over rows, (H,), where it is wanted.

    On Triton one kernel recomputes z and multiplies it by dh = dy W2, which it either computes too ("dual") or finds in dz
    ("plain"): `gpuckpt.kernels.mlp` chooses. By torch h is where z is recomputed, and must be given.
    """
    if multiply_by_triton(x):
        load_kernels(x)
        from gpuckpt.kernels import mlp as kernel

        partials = None
        if needs_bias:
            partials = torch.empty(kernel.db_partials_shape(x, w1, w2), dtype=torch.float32, device=x.device)
        kernel.mlp_recompute_bwd(x, w1, b1, dy, w2, h, dz, partials, activation=activation)
        return None if partials is None else partials.sum(0)
    assert h is not None
    kept = keep_(activation, affine_into(h, x, w1, b1))
    differentiate(activation, torch.mm(dy, w2, out=dz), kept, dz)
    if needs_h:
        finish(activation, kept, h)
    return sum_rows(dz) if needs_bias else None


def gradients(
    dy: Tensor,
    x: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    chunk_rows: int | None,
    scratch_bytes: int | None,
    needs: list[bool],
    mains: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """(dx, dw1, db1, dw2, db2). x may be None where only db2 is wanted."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    db2 = BiasGrad(b2) if needs_b2 and b2 is not None else None
    if x is None:
        if db2 is not None:
            db2.add(sum_rows(dy))
        return [None, None, None, None, None if db2 is None else db2.result()]

    rows, copied = x.shape[0], any(needs[:3]) and wants_copy(dy)
    chunk = choose_chunk_rows(
        rows,
        lambda c: mlp_scratch_bytes(x, w1, b1, w2, b2, c, copied=copied, needs=needs, mains=mains),
        chunk_rows,
        scratch_bytes,
    )
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    dw1 = WeightGrad(w1, chunk < rows, mains[0]) if needs_w1 else None
    dw2 = WeightGrad(w2, chunk < rows, mains[1]) if needs_w2 else None
    db1 = BiasGrad(b1) if needs_b1 and b1 is not None else None
    used1, bias, used2 = cast(w1, x), cast(b1, x), cast(w2, x)
    buffers = [x.new_empty(min(chunk, rows), w1.shape[0]) for _ in range(_hidden_buffers(x, needs))]
    for part in chunks(rows, chunk):
        dy_part, x_part = take(dy, part).contiguous() if copied else take(dy, part), take(x, part)
        if db2 is not None:
            db2.add(sum_rows(dy_part))
        held = iter(first_rows(buffer, part) for buffer in buffers)
        dz = next(held) if any(needs[:3]) else None
        h = next(held, None)
        if dz is None:
            assert h is not None
            forward_into(h, x_part, used1, bias, activation)
        else:
            total = hidden_into(h, dz, x_part, used1, bias, dy_part, used2, activation, needs_w2, db1 is not None)
            if db1 is not None:
                assert total is not None
                db1.add(total)
            del total  # or it would still be held while dX and dW are made
        if dw2 is not None:
            assert h is not None
            dw2.add(dy_part, h)
        if dz is not None:
            if dx is not None:
                torch.mm(dz, used1, out=take(dx, part))
            if dw1 is not None:
                dw1.add(dz, x_part)
    return [dx, *(None if grad is None else grad.result() for grad in (dw1, db1, dw2, db2))]


OP = FusedOp(
    "mlp",
    forward,
    gradients,
    operands=("x", "w1", "b1", "w2", "b2"),
    keeps_input=lambda needs, saved, options: any(needs[:4]),
)


def mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
    norm: Norm | None = None,
    chunk_rows: int | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """act(x w1^T + b1) w2^T + b2, keeping only x for backward.

    Args:
        x: (..., K), floating point.
        w1, w2: (H, K) and (N, H). A weight that carries `main_grad` gets its gradient added there in place, and autograd
            sees none.
        b1, b2: (H,) and (N,), or None.
        activation: identity, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        norm: a `Norm` of x to compute with instead of x. What is kept for backward is x itself, and backward normalises it again:
            one more transient of x's size.
        chunk_rows: rows for which h (and in backward dz) is held at a time; by default all.
        scratch_bytes: the most that backward may hold in addition to the gradients (`mlp_scratch_bytes`), instead of
            `chunk_rows`. Inside `with budget:` the default is the budget's `max_bytes`, but never fewer than 128 rows at a time.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation.
        BudgetExceeded: `scratch_bytes` does not hold the scratch of one row.
        NotImplementedError: a second derivative, forward mode, or torch.func's grad, vjp, jvp and jacrev.
        RuntimeError: a `main_grad` under torch.compile.

    >>> x, w1, w2 = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3), torch.ones(4, 5)
    >>> mlp(x, w1, w2, activation="relu").sum().backward()
    >>> x.grad[0].tolist()
    [20.0, 20.0, 20.0]
    """
    check_activation(activation)
    check_weight(x, w1, None, "w1")
    check_second_weight(w2, b2, w1.shape[0], "w2")
    check_bias(b1, w1, "w1")
    y = OP(x, w1, b1, w2, b2, activation, *limits(chunk_rows, scratch_bytes), norm=norm)
    return like_rows_of(y, x)
