"""Norms that keep running statistics: a recompute leaves these where they are, with no copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["freeze", "is_norm"]

# Not those of InstanceNorm, whose kernel saves what the running statistics are.
_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_norm(module: nn.Module) -> bool:
    """Whether a module keeps running statistics the way that torch's norms do: a subclass may write them as it likes."""
    return isinstance(module, _NormBase) and type(module).forward in _NORMS


def freeze(modules: Iterable[nn.Module]) -> list[tuple[_NormBase, float | None, torch.Tensor | None]]:
    """Keep running statistics where they are; what `leave` puts back."""
    frozen: list[tuple[_NormBase, float | None, torch.Tensor | None]] = []
    for module in modules:
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            count = module.num_batches_tracked
            frozen.append((module, module.momentum, count))
            module.momentum = 0.0
            module.num_batches_tracked = None if count is None else count.clone()
    return frozen
