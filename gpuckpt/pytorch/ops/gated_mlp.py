"""`gated_mlp`: y = md ((act(mg (x Wg^T + bg)) * (x Wu^T + bu)) Wd^T + bd), saving x and the weights and nothing else.

Shazeer, "GLU variants improve transformer" (2020): SwiGLU has act = silu, GEGLU gelu, ReGLU relu. The multipliers mg and md are
those of Falcon-H1. The two pre-activations and their product are recomputed from x in backward: 11 GEMMs in a training step,
against 9 for the plain form, which keeps hidden-size tensors, and 12 for a plain checkpoint around it (11 with early stop).

Shapes: x (M, K), wg and wu (H, K), bg and bu (H,), wd (N, H), bd (N,), y and dy (M, N); C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.ops._activations import gate_activation
from gpuckpt.pytorch.ops._chunking import choose_chunk_rows, chunks, first_rows, limits, take
from gpuckpt.pytorch.ops._gated_rows import (
    GatedForm,
    Pair,
    backward_buffers,
    forward_buffers,
    gradients_of,
    hidden_of,
    partials_bytes,
)
from gpuckpt.pytorch.ops._operands import (
    cast,
    cast_bytes,
    check_second_weight,
    check_weight,
    like_rows_of,
    wants_copy,
)
from gpuckpt.pytorch.ops._register import FusedOp
from gpuckpt.pytorch.ops._rows import affine_into
from gpuckpt.pytorch.ops._weight_grads import (
    BiasGrad,
    WeightGrad,
    bias_scratch,
    sum_rows,
    weight_scratch,
)
from gpuckpt.pytorch.ops.norm import Norm

__all__ = ["gated_mlp", "gated_mlp_scratch_bytes"]

_ALL = (True,) * 7
_NONE = (None,) * 3


def gated_mlp_scratch_bytes(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    chunk: int,
    *,
    scaled: bool = False,
    needs: Sequence[bool] = _ALL,
    mains: Sequence[Tensor | None] = _NONE,
) -> int:
    """Bytes that backward holds in addition to the gradients it returns, with `chunk` rows at a time; forward holds less.

    By torch three hidden-size buffers of one chunk (two where only dWd is wanted), by Triton dz_g, dz_u and h; dy of one chunk
    where it is `scaled` by a down_multiplier, or copied for the kernel as `wants_copy` says; weights and biases cast to x's dtype
    where theirs differs; the sums of dW and db. Of the tensors only shape, dtype and device matter. needs: the gradients of x,
    wg, bg, wu, bu, wd and bd that are wanted. Exact in float32 by torch; else a bound, which counts 16-bit gradients and the
    float32 sums that they are made from.

    >>> x, wg, wd = torch.empty(64, 8), torch.empty(32, 8), torch.empty(8, 32)
    >>> gated_mlp_scratch_bytes(x, wg, None, wg, None, wd, None, 64) == 3 * 64 * 32 * 4
    True
    """
    several = chunk < x.shape[0]
    total = cast_bytes(x.dtype, wg, bg, wu, bu, wd, bd)
    total += _buffers(x, needs) * chunk * wg.shape[0] * x.dtype.itemsize
    total += chunk * wd.shape[0] * x.dtype.itemsize if scaled else 0
    parts = [
        weight_scratch(weight, x.dtype, chunk, several, main)
        for weight, needed, main in zip((wg, wu, wd), needs[1::2], mains, strict=True)
        if needed
    ]
    for bias, needed in ((bg, needs[2]), (bu, needs[4]), (bd, needs[6])):
        if needed and bias is not None:
            parts.append(bias_scratch(bias, x.dtype, chunk, several))
    total += sum(part.held for part in parts) + max((part.passing for part in parts), default=0)
    return total + (needs[2] + needs[4]) * partials_bytes(x, wg, wu, wd, chunk)


def _buffers(x: Tensor, needs: Sequence[bool]) -> int:
    if any(needs[:5]):
        return backward_buffers(x, needs[5])
    return forward_buffers(x) if needs[5] else 0


def forward(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
    gate_multiplier: float,
    down_multiplier: float,
    chunk_rows: int | None,
    scratch_bytes: int | None,
) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    rows, scaled = x.shape[0], down_multiplier != 1.0
    form = GatedForm(activation, gate_multiplier, down_multiplier)
    # Backward holds more than forward does: the chunk that suits it suits both.
    chunk = choose_chunk_rows(
        rows,
        lambda c: gated_mlp_scratch_bytes(x, wg, bg, wu, bu, wd, bd, c, scaled=scaled),
        chunk_rows,
        scratch_bytes,
    )
    pair, wd, bd = Pair(cast(wg, x), cast(bg, x), cast(wu, x), cast(bu, x)), cast(wd, x), cast(bd, x)
    y = x.new_empty(rows, wd.shape[0])
    buffers = [x.new_empty(min(chunk, rows), wg.shape[0]) for _ in range(forward_buffers(x))]
    for part in chunks(rows, chunk):
        h = hidden_of([first_rows(buffer, part) for buffer in buffers], take(x, part), pair, form)
        out = affine_into(take(y, part), h, wd, bd)
        if scaled:
            out.mul_(down_multiplier)
    return y


def gradients(
    dy: Tensor,
    x: Tensor | None,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
    gate_multiplier: float,
    down_multiplier: float,
    chunk_rows: int | None,
    scratch_bytes: int | None,
    needs: list[bool],
    mains: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """(dx, dwg, dbg, dwu, dbu, dwd, dbd). x may be None where only dbd is wanted."""
    form = GatedForm(activation, gate_multiplier, down_multiplier)
    rows, scaled = dy.shape[0], form.down_multiplier != 1.0
    copied = any(needs[:5]) and wants_copy(dy)
    like = dy if x is None else x
    chunk = choose_chunk_rows(
        rows,
        lambda c: gated_mlp_scratch_bytes(
            like, wg, bg, wu, bu, wd, bd, c, scaled=scaled or copied, needs=needs, mains=mains
        ),
        chunk_rows,
        scratch_bytes,
    )
    several, hidden = chunk < rows, any(needs[:5])
    dx = None if x is None or not needs[0] else torch.empty_like(x, memory_format=torch.contiguous_format)
    dws = [
        WeightGrad(weight, several, main) if need else None
        for weight, need, main in zip((wg, wu, wd), needs[1::2], mains, strict=True)
    ]
    dbs = [
        BiasGrad(bias) if need and bias is not None else None
        for bias, need in zip((bg, bu, bd), needs[2::2], strict=True)
    ]
    pair, used_wd = Pair(cast(wg, dy), cast(bg, dy), cast(wu, dy), cast(bu, dy)), cast(wd, dy)
    buffers = [dy.new_empty(min(chunk, rows), wg.shape[0]) for _ in range(_buffers(dy, needs))]
    for part in chunks(rows, chunk):
        g = take(dy, part).clone(memory_format=torch.contiguous_format) if copied else take(dy, part)
        if scaled:
            g = g.mul_(form.down_multiplier) if copied else g * form.down_multiplier
        if dbs[2] is not None:
            dbs[2].add(sum_rows(g))
        if x is None:
            continue
        x_part = take(x, part)
        held = [first_rows(buffer, part) for buffer in buffers]
        if not hidden:
            assert dws[2] is not None
            dws[2].add(g, hidden_of(held, x_part, pair, form))
            continue
        dz_g, dz_u = gradients_of(held, g, x_part, pair, used_wd, form, dws[2], dbs[0], dbs[1])
        if dx is not None:
            torch.mm(dz_g, pair.wg, out=take(dx, part)).addmm_(dz_u, pair.wu)
        for dw, dz in ((dws[0], dz_g), (dws[1], dz_u)):
            if dw is not None:
                dw.add(dz, x_part)
    results = [None if grad is None else grad.result() for pair in zip(dws, dbs, strict=True) for grad in pair]
    return [dx, *results]


OP = FusedOp(
    "gated_mlp",
    forward,
    gradients,
    operands=("x", "wg", "bg", "wu", "bu", "wd", "bd"),
    keeps_input=lambda needs, saved, options: any(needs[:6]),
)


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    down_multiplier: float = 1.0,
    norm: Norm | None = None,
    chunk_rows: int | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """md ((act(mg (x gate^T + b)) * (x up^T + b)) down^T + b), keeping only x for backward.

    Args:
        x: (..., K), floating point.
        gate_weight, up_weight, down_weight: (H, K), (H, K) and (N, H). A weight that carries `main_grad` gets its gradient
            added there in place, and autograd sees none.
        gate_bias, up_bias, down_bias: (H,), (H,) and (N,), or None.
        activation: of the gate, any that `linear` takes; or the form's name: swiglu (silu), geglu (gelu), geglu_tanh (gelu_tanh),
            reglu (relu), glu (sigmoid), bilinear (identity).
        gate_multiplier, down_multiplier: mg and md, as in Falcon-H1.
        norm: as in `mlp`.
        chunk_rows, scratch_bytes: as in `mlp`; `gated_mlp_scratch_bytes` says what backward holds.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation.
        BudgetExceeded: `scratch_bytes` does not hold the scratch of one row.
        NotImplementedError: a second derivative, forward mode, or torch.func's grad, vjp, jvp and jacrev.
        RuntimeError: a `main_grad` under torch.compile.

    >>> x, gate, up, down = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3), torch.ones(5, 3), torch.ones(4, 5)
    >>> gated_mlp(x, gate, up, down, activation="reglu").tolist()
    [[45.0, 45.0, 45.0, 45.0], [45.0, 45.0, 45.0, 45.0]]
    """
    activation = gate_activation(activation)
    check_weight(x, gate_weight, gate_bias, "gate_weight")
    check_weight(x, up_weight, up_bias, "up_weight")
    if up_weight.shape[0] != gate_weight.shape[0]:
        raise DimMismatch(gate_weight.shape[0], up_weight.shape[0], "hidden size of up_weight")
    check_second_weight(down_weight, down_bias, gate_weight.shape[0], "down_weight")
    operands = gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    options = activation, float(gate_multiplier), float(down_multiplier), *limits(chunk_rows, scratch_bytes)
    y = OP(x, *operands, *options, norm=norm)
    return like_rows_of(y, x)
