"""The plain oracle of `cross_entropy`: torch's own loss with the extras written from their formulas. Shares no code with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy_ref"]


def cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Loss of each row (M,), in the logits' dtype; differentiable by autograd. fp64 logits (M, V) give the truth."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    extra = z_loss * torch.logsumexp(logits, dim=-1).square()
    return loss + torch.where(target == ignore_index, torch.zeros_like(extra), extra)
