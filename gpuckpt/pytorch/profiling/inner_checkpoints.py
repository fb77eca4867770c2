"""Checkpoints that measured code makes itself: what they recompute is held in its backward, beyond what forward saved.

Code that makes none is not run for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import InvalidChain
from gpuckpt.memory import Budget
from gpuckpt.pytorch.engine.frame import Frame
from gpuckpt.pytorch.engine.hooks import enter
from gpuckpt.pytorch.engine.storage_index import index_of

__all__ = ["InnerCheckpoints", "refuse_checkpoints"]

_ENDLESS = 1 << 62


def refuse_checkpoints(model: nn.Module, _: Any) -> NoReturn:
    """What is called where `model` calls torch's checkpoint: raises `InvalidChain`."""
    raise InvalidChain(
        f"{type(model).__name__} calls torch.utils.checkpoint in its forward; what that recomputes lies where no budget sees "
        "it. Turn it off (Hugging Face: model.gradient_checkpointing_disable()): fit chooses what to recompute"
    )


class InnerCheckpoints:
    """Sees whether code makes checkpoints, and measures in a budget without end what they hold."""

    def __init__(self, unit_bytes: int) -> None:
        self.budget = Budget(_ENDLESS, device="cpu")
        self.budget.unit_bytes = unit_bytes
        self._index = index_of(self.budget)
        self._before = Frame.made
        self._shared: dict[int, StorageWeakRef] = {}
        self._stays: list[Any] = []

    def watch(self) -> None:
        """Look at the code that follows."""
        self._before = Frame.made
        self._stays.clear()

    def any(self) -> bool:
        """Whether the code since `watch()` made a checkpoint."""
        return Frame.made > self._before

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Stages were given or returned `tensors`: they may hold them, until code that comes later has gone backward."""
        for tensor in tensors:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._shared[storage._cdata] = StorageWeakRef(storage)

    def hold(self, tensor: torch.Tensor) -> Any:
        """Count a saved tensor, for as long as what is returned lives; one that is shared until the next `watch()`."""
        held = self._index.hold(tensor)
        if tensor.layout is torch.strided:
            ref = self._shared.get(tensor.untyped_storage()._cdata)
            if ref is not None and not ref.expired():
                self._stays.append(held)
        return held

    def again_bytes(self, backward: Callable[[], Any]) -> int:
        """Bytes that `backward` holds at the most beyond what is held when it begins."""
        before_bytes = self.budget.used_bytes
        self.budget.reset_peak()
        backward()
        return self.budget.peak_bytes - before_bytes

    def entered(self) -> enter:
        """The context in which to run code whose saved tensors are to be counted."""
        return enter(self.budget, self.hold)
