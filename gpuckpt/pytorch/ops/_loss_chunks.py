"""The chunks behind `linear_cross_entropy`: how many rows at a time, what that costs, and the loop itself.

Each chunk's logits go through one scratch matrix: the Triton kernel or plain torch turns them into losses, or into their own
gradient in place. Shapes: M rows, K width, V classes, C rows of a chunk; x (M, K), weight (V, K), bias (V,), target (M,).
No autograd here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpuckpt.backend import load_kernels, use_triton
from gpuckpt.errors import BudgetExceeded
from gpuckpt.pytorch.ops._chunking import chunks, take
from gpuckpt.pytorch.ops._operands import cast
from gpuckpt.pytorch.ops._weight_grads import CUDA_BLOCK, BiasGrad, WeightGrad, sum_rows

__all__ = [
    "LEAST_LOGIT_ROWS",
    "LossOptions",
    "backward_chunks",
    "choose_rows",
    "chunk_rows_for",
    "forward_chunks",
    "gradients_in_forward",
    "loss_dtype",
    "transient_bytes",
]

LEAST_LOGIT_ROWS = 16
"""Where a budget sets the limit no chunk is smaller. A row of logits is far larger than one of a hidden layer, so that whole
tiles of 128 rows would not fit the small budgets; with 16 rows a GEMM still uses the tensor cores and reads the weight once."""
_MIN_CHUNK_ROWS = 2048
"""A chunk rewrites the float32 sum of dW, 16 bytes an element, and multiplies 6 C flops into it: on an H100 (3.35 TB/s, cuBLAS at
0.75 of 989 TF) that is 0.29 of the GEMMs' time with 2048 rows, and 4.6 times it with 128."""


@dataclass(frozen=True)
class LossOptions:
    """What the formula needs besides the logits."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        return vars(self)


def chunk_rows_for(rows: int, width: int, vocab: int, itemsize: int, scratch_bytes: int | None = None) -> int:
    """Rows of logits to hold at a time.

    With `scratch_bytes`: as many as fit in it. Without: a power of two that makes the chunk about as large as x itself, and no
    fewer than 2048, so that the sums of dW cost less than the GEMMs.

    Raises `BudgetExceeded` where not even one row fits.
    """
    if scratch_bytes is not None:
        fitting = scratch_bytes // (vocab * itemsize)
        if fitting < 1:
            raise BudgetExceeded(vocab * itemsize, scratch_bytes, "one row of logits is the least: raise scratch_bytes")
        return max(1, min(fitting, rows))
    balanced = -(-rows * width // vocab)
    return max(1, min(rows, max(_MIN_CHUNK_ROWS, 1 << (balanced - 1).bit_length())))


def transient_bytes(
    rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    chunk_rows: int,
    *,
    weight_dtype: torch.dtype | None = None,
    needs_weight: bool = True,
) -> int:
    """Bytes of scratch that backward holds besides the gradients it returns, on the Triton path: the logits of one chunk, the
    weight in x's dtype where its own differs, and the float32 sum of dW and one block to add to it where there are several
    16-bit chunks. Forward holds no more."""
    logits_bytes = min(chunk_rows, rows) * vocab * dtype.itemsize
    cast_bytes = vocab * width * dtype.itemsize if weight_dtype not in (None, dtype) else 0
    sum_bytes = 0
    if needs_weight and chunk_rows < rows and dtype.itemsize < 4:
        own = weight_dtype or dtype
        sum_bytes = 4 * width * ((0 if own == torch.float32 else vocab) + min(CUDA_BLOCK, vocab))
    return logits_bytes + cast_bytes + sum_bytes


def forward_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, what: LossOptions, reduction: str, chunk_rows: int
) -> Tensor:
    """The operation itself: one chunk of logits after the other."""
    _check_targets(target, weight.shape[0], what.ignore_index)
    weight, bias = cast(weight, x), cast(bias, x)
    losses = torch.empty(x.shape[0], dtype=loss_dtype(x), device=x.device)
    scratch = _scratch(x, weight, chunk_rows)
    for rows in chunks(x.shape[0], chunk_rows):
        _chunk_loss(_logits(take(x, rows), weight, bias, scratch), take(target, rows), take(losses, rows), what)
    return reduced(losses, target, what.ignore_index, reduction)


def gradients_in_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    what: LossOptions,
    reduction: str,
    chunk_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss ("mean" or "sum") and its gradients (dx, dW, db) for a gradient of 1, from one computation of the logits."""
    _check_targets(target, weight.shape[0], what.ignore_index)
    losses = torch.empty(x.shape[0], dtype=loss_dtype(x), device=x.device)
    one = torch.ones((), dtype=losses.dtype, device=x.device)
    grads = backward_chunks(one, x, weight, bias, target, what, reduction, chunk_rows, needs, losses=losses)
    return reduced(losses, target, what.ignore_index, reduction), grads


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What is returned for the losses of all rows (M,)."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def backward_chunks(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    what: LossOptions,
    reduction: str,
    chunk_rows: int,
    needs: Sequence[bool],
    main: Tensor | None = None,
    losses: Tensor | None = None,
) -> list[Tensor | None]:
    """The operation's gradients: logits again, their gradient in place, then dX and dW of the chunk.

    (dx, dW, db), None where not needed, and for dW where it was added to `main`. losses (M,): the loss of each row, where forward
    has not been run.
    """
    needs_x, needs_weight, needs_bias = needs
    if reduction == "mean":
        dloss = dloss / (target != what.ignore_index).sum()
    if reduction != "none":
        dloss = dloss.expand(x.shape[0])
    used, used_bias = cast(weight, x), cast(bias, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    dw = WeightGrad(weight, chunk_rows < x.shape[0], main) if needs_weight else None
    db = BiasGrad(bias) if needs_bias and bias is not None else None
    scratch = _scratch(x, used, chunk_rows)
    for rows in chunks(x.shape[0], chunk_rows):
        dlogits = _logits(take(x, rows), used, used_bias, scratch)
        if losses is not None:
            _chunk_loss(dlogits, take(target, rows), take(losses, rows), what)
        _chunk_grad(dlogits, take(target, rows), take(dloss, rows), what)
        if dx is not None:
            torch.mm(dlogits, used, out=take(dx, rows))
        if dw is not None:
            dw.add(dlogits, take(x, rows))
        if db is not None:
            db.add(sum_rows(dlogits))
    return [dx, None if dw is None else dw.result(), None if db is None else db.result()]


def choose_rows(x: Tensor, weight: Tensor, least_rows: int | None, scratch_bytes: int | None) -> int:
    """The rows of a chunk by what `limits` returned. Inside the operation, where sizes are numbers also when torch.compile
    traces symbols."""
    row_bytes = weight.shape[0] * x.dtype.itemsize
    sizes = (x.shape[0], x.shape[1], weight.shape[0], x.dtype.itemsize)
    if scratch_bytes is None:
        return least_rows or chunk_rows_for(*sizes)
    if least_rows is None:
        return chunk_rows_for(*sizes, scratch_bytes)
    return min(chunk_rows_for(*sizes), max(least_rows, scratch_bytes // row_bytes))


def loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scratch(x: Tensor, weight: Tensor, chunk_rows: int) -> Tensor:
    return x.new_empty(min(chunk_rows, x.shape[0]), weight.shape[0])


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """x W^T + b of a chunk (C, K), in the first C rows of `scratch`."""
    out = scratch[: x.shape[0]]
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    # On a device this would wait for it; the kernel gives NaN for such a row instead.
    if not target.is_cuda and target.numel():
        wrong = (target != ignore_index) & ((target < 0) | (target >= vocab))
        if bool(wrong.any()):
            found = int(target[wrong][0])
            raise ValueError(
                f"target {found} is not a class: expected 0 to {vocab - 1}, or ignore_index={ignore_index}"
            )


def _chunk_loss(logits: Tensor, target: Tensor, losses: Tensor, what: LossOptions) -> None:
    """Writes the loss of each row of logits (C, V) into losses (C,)."""
    if use_triton(logits):
        load_kernels(logits)
        from gpuckpt.kernels.cross_entropy import cross_entropy_fwd

        cross_entropy_fwd(logits, target, losses, **what.options())
        return
    z = _capped(logits, what.softcap, losses.dtype)
    log_p = torch.log_softmax(z, dim=-1)
    ignored = target == what.ignore_index
    loss = (what.label_smoothing - 1) * log_p.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    if what.label_smoothing:
        loss -= what.label_smoothing * log_p.mean(dim=-1)
    if what.z_loss:
        loss += what.z_loss * torch.logsumexp(z, dim=-1).square()
    losses.copy_(loss.masked_fill_(ignored, 0))


def _chunk_grad(logits: Tensor, target: Tensor, dloss: Tensor, what: LossOptions) -> None:
    """Overwrites logits (C, V) with their gradient."""
    if use_triton(logits):
        load_kernels(logits)
        from gpuckpt.kernels.cross_entropy import cross_entropy_bwd

        cross_entropy_bwd(logits, target, dloss, **what.options())
        return
    z = _capped(logits, what.softcap, dloss.dtype)
    ignored = target == what.ignore_index
    d = torch.softmax(z, dim=-1)
    if what.z_loss:
        d *= 1 + 2 * what.z_loss * torch.logsumexp(z, dim=-1, keepdim=True)
    d.scatter_add_(
        1, target.masked_fill(ignored, 0)[:, None], d.new_full((1, 1), what.label_smoothing - 1).expand_as(d[:, :1])
    )
    if what.label_smoothing:
        d -= what.label_smoothing / z.shape[1]
    if what.softcap is not None:
        d *= 1 - (z / what.softcap).square()
    d *= dloss[:, None]
    logits.copy_(d.masked_fill_(ignored[:, None], 0))


def _capped(logits: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype)
    return z if softcap is None else softcap * torch.tanh(z / softcap)
