"""`linear_cross_entropy`: the loss of a large-vocabulary head, without ever holding the logits of all rows.

    logits = x W^T + b,   loss = cross entropy of the logits          (the formula is in `gpuckpt.kernels.cross_entropy`)

Forward and backward walk over the rows in chunks. A chunk's logits live in one scratch matrix; backward computes them again,
turns them into their gradient in place, and multiplies that into dX and dW. Saved for backward: x, the targets and the
parameters themselves. GEMMs of a training step: 4 (forward, logits again, dX, dW), against 3 for the plain form.

Where there is room to keep dX and dW instead (`_keeps_gradients`), they are formed in forward, for a gradient of 1, and
multiplied by the loss's gradient in backward, as Liger does it (arXiv:2410.10989): 3 GEMMs. Backward of a loss follows its
forward, so that nothing is held for longer than backward would have held it. The bits are the same where that gradient is
1; a factor that is no power of two rounds 16-bit gradients once more.

Transient bytes, with C rows a chunk, i bytes an element of x and w of the weight (`transient_bytes` states it exactly):
forward C V i; backward C V i for the chunk, 4 V K while dW is summed over several 16-bit chunks, and the gradients themselves.

Where Cut Cross-Entropy (arXiv:2411.09009) never writes logits at all, this writes one chunk at a time and leaves the GEMMs to
cuBLAS. Not here: class weights, probabilities as targets, a vocabulary split over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpuckpt.checks import shown
from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch._torch_internals import keep_graph, top_saved_tensors_hooks
from gpuckpt.pytorch.engine.hooks import room_for_saves
from gpuckpt.pytorch.ops._chunking import limits
from gpuckpt.pytorch.ops._loss_chunks import (
    LEAST_LOGIT_ROWS,
    LossOptions,
    backward_chunks,
    choose_rows,
    chunk_rows_for,
    forward_chunks,
    gradients_in_forward,
    loss_dtype,
    transient_bytes,
)
from gpuckpt.pytorch.ops._operands import (
    autocast_input,
    check_weight,
    is_plain_call,
    rows_of,
    without_autocast,
    without_derivative,
)
from gpuckpt.pytorch.ops._register import FusedOp
from gpuckpt.pytorch.ops._weight_grads import main_grad_of
from gpuckpt.pytorch.ops.norm import Norm, normalise

__all__ = ["REDUCTIONS", "chunk_rows_for", "linear_cross_entropy", "transient_bytes"]

REDUCTIONS = ("mean", "sum", "none")


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    chunk_rows: int | None,
    scratch_bytes: int | None,
) -> Tensor:
    """x (M, K), weight (V, K), bias (V,), target (M,) -> the loss, () or (M,) for "none", float32 (float64 for float64 x)."""
    what = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return forward_chunks(x, weight, bias, target, what, reduction, choose_rows(x, weight, chunk_rows, scratch_bytes))


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    chunk_rows: int | None,
    scratch_bytes: int | None,
    needs: list[bool],
    mains: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """(dx, dW, db) for dy, the gradient of the loss."""
    what = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    rows = choose_rows(x, weight, chunk_rows, scratch_bytes)
    return backward_chunks(dy, x, weight, bias, target, what, reduction, rows, needs, *mains)


def _fake(x, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap, reduction, *limits) -> Tensor:
    return x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=loss_dtype(x))


class _KeptGradients(torch.autograd.Function):
    """The loss with its gradients formed in forward; reduction "mean" or "sum"."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        what: LossOptions,
        reduction: str,
        chunk_rows: int,
    ) -> Tensor:
        with without_autocast(x.device.type):
            needs = ctx.needs_input_grad[:3]
            loss, grads = gradients_in_forward(x, weight, bias, target, what, reduction, chunk_rows, needs)
        ctx.save_for_backward(*grads)
        ctx.in_place = top_saved_tensors_hooks(True) is None
        return loss

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # What is handed out in place is gone for a second backward, and a budget's is not ours to change.
        in_place = ctx.in_place and not keep_graph()
        found = ctx.saved_tensors
        with torch.no_grad():
            # By a tensor of one dimension: one of none would be rounded to the gradient's dtype first.
            factor = dy.reshape(1)
            grads = [
                g if g is None else torch.mul(g, factor, out=g if in_place else torch.empty_like(g)) for g in found
            ]
        if torch.is_grad_enabled():
            grads = [g if g is None else without_derivative(g, "linear_cross_entropy") for g in grads]
        return (*grads, None, None, None, None)


def _keeps_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str) -> bool:
    """Whether the gradients are formed in forward: in a plain call whose loss is one number, where they may be saved
    (`room_for_saves`). Not in float16, in which gradients that no GradScaler has scaled yet are rounded to zero, nor where dW
    goes to a `main_grad`."""
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    if reduction == "none" or not wanted or not torch.is_grad_enabled() or x.dtype == torch.float16:
        return False
    if not is_plain_call((x, weight, bias, target)) or main_grad_of(weight) is not None:
        return False
    return sum(t.numel() * t.element_size() for t in wanted) <= room_for_saves()


OP = FusedOp("linear_cross_entropy", forward, gradients, operands=("x", "weight", "bias"), fake=_fake)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    norm: Norm | None = None,
    chunk_rows: int | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of x W^T + b against `target`, with one chunk of logits at any time.

    Kept for backward is x alone, and the logits are computed again: 4 GEMMs a step. Outside of all hooks on saved tensors, and
    inside `with budget:` (hold="account") where they fit in what is free, the gradients of x and of the parameters are kept
    instead: 3 GEMMs. Not for reduction="none", in float16, with a `main_grad`, in checkpointed work or under torch.compile.

    Args:
        x: (..., K), floating point: the last hidden states.
        weight: (V, K), the head; a frozen one costs no dW. Where it carries `main_grad`, its gradient is added there in
            place and autograd sees none.
        target: (...), int64 classes from 0 to V - 1, or `ignore_index`.
        bias: (V,) or None.
        ignore_index, label_smoothing: as in `torch.nn.functional.cross_entropy`.
        z_loss: weight of the squared log-sum-exp, averaged like the loss.
        softcap: c of c tanh(logits / c), or None.
        reduction: "mean" over the rows that are not ignored (NaN if there are none, as in torch), "sum" or "none".
        norm: a `Norm` of x to compute with instead of x (a model's last norm). What is kept for backward is x itself.
        chunk_rows: rows of logits to hold at a time; by default `chunk_rows_for` chooses.
        scratch_bytes: the most bytes of logits to hold, instead of `chunk_rows`. Inside `with budget:` the default is the
            budget's `max_bytes`, but never fewer than 16 rows at a time.

    Returns:
        () or target's shape for "none"; float32, whatever x is (float64 for float64 x).

    Raises:
        DimMismatch: a dimension does not fit.
        BudgetExceeded: `scratch_bytes` holds not even one row of logits.
        ValueError: an unknown reduction, an option out of range, a target out of range (on a CPU; on a GPU its loss is NaN).
        TypeError: targets that are not int64.
        NotImplementedError: a second derivative, forward mode, or torch.func's grad, vjp, jvp and jacrev.
        RuntimeError: a `main_grad` under torch.compile.

    >>> x, head = torch.zeros(4, 3, requires_grad=True), torch.ones(10, 3)
    >>> loss = linear_cross_entropy(x, head, torch.tensor([1, 2, 3, -100]))
    >>> f"{loss.item():.4f}"  # log(10)
    '2.3026'
    """
    check_weight(x, weight, bias)
    if target.shape != x.shape[:-1]:
        raise DimMismatch(x[..., 0].numel(), target.numel(), f"target of shape {tuple(target.shape)}: number of rows")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64; got {target.dtype}: call target.long()")
    if weight.shape[0] == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} has no classes")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={shown(reduction)}: expected one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: expected 0 to 1")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap={softcap}: expected a positive number, or None for no cap")
    target_rows, most = target.reshape(-1), limits(chunk_rows, scratch_bytes, LEAST_LOGIT_ROWS)
    what = LossOptions(ignore_index, float(label_smoothing), float(z_loss), softcap)
    if _keeps_gradients(autocast_input(x), weight, bias, target_rows, reduction):
        rows, *_ = normalise(rows_of(autocast_input(x)), norm)
        chunk = choose_rows(rows, weight, *most)
        kept: Tensor = _KeptGradients.apply(rows, weight, bias, target_rows, what, reduction, chunk)
        return kept
    options = ignore_index, what.label_smoothing, what.z_loss, softcap, reduction
    loss = OP(x, weight, bias, target_rows, *options, *most, norm=norm)
    return loss.reshape(target.shape) if reduction == "none" else loss
