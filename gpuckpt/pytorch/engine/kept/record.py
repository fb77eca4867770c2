"""`Record`: what one piece of work made in forward and keeps for its recompute, in the order in which it was made.

Every frame has one. While the work runs in forward, the records of all frames around it are open and take what is kept; while
it is run again, the one record of the frame that does so is read, and frames within that work record what is read.

What is kept is saved as a frame's inputs are: into what surrounds the frame. A budget holds it; of a frame within a frame it is
one more saved tensor of the outer one, which its recompute brings back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from gpuckpt.pytorch._torch_internals import top_saved_tensors_hooks
from gpuckpt.pytorch.engine.hooks import redirect_saves
from gpuckpt.pytorch.engine.saved_storage import HeldTensor, MovableStorage
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.engine.subclasses import detached

__all__ = ["KeptTensor", "Record"]


class KeptTensor:
    """A tensor that a record keeps, in what the hooks around its frame made of it."""

    __slots__ = ("_saved", "_unpack")

    def __init__(self, saved: Any, unpack: Callable[[Any], torch.Tensor]) -> None:
        self._saved = saved
        self._unpack = unpack

    def load(self) -> torch.Tensor:
        """The tensor as it was. Raises `SavedTensorModified` where it was changed in place since, `BudgetExceeded` where it
        was spilled and there is no room for it."""
        return detached(self._unpack(self._saved))


class Record:
    """What a piece of work keeps; `begin` is called where its frame saves its inputs, under the same hooks."""

    __slots__ = ("__weakref__", "_away", "_pack", "_unpack", "choices", "draws", "fates", "flow", "operations", "part")

    def __init__(self) -> None:
        self._pack: Callable[[torch.Tensor], Any] = index_of(None).hold
        self._unpack: Callable[[Any], torch.Tensor] = HeldTensor.load
        self._away: tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None = None
        self.choices: list[Any] = []
        self.fates: list[Any] = []  # of what checkpoints within reach (`Fence.fates`)
        self.operations: list[Any] = []
        # Under an option, by number among all operations: those that are kept, and what random ones drew.
        self.part: dict[int, Any] = {}
        self.draws: dict[int, Any] = {}
        self.flow: Any = None  # None where the work is to be run again as a whole

    def begin(self, *, away: bool = False) -> Record:
        """Keep tensors in what the active hooks make of them. `away`: all but choices, which stay where they were kept before."""
        if away:
            self._away = top_saved_tensors_hooks(True)
        else:
            self._pack, self._unpack = top_saved_tensors_hooks(True) or (self._pack, self._unpack)
        return self

    def keep(self, tensor: torch.Tensor, *, exact: bool = False) -> KeptTensor:
        """Keep `tensor`. `exact`: it is a choice, and a budget that compresses leaves it as it is. Raises `BudgetExceeded`."""
        pack, unpack = (self._pack, self._unpack) if exact or self._away is None else self._away
        with redirect_saves(None) if exact and self._away is not None else nullcontext():
            saved = pack(tensor)
        if exact and isinstance(saved, HeldTensor) and isinstance(saved.holding, MovableStorage):
            saved.holding.exact = True
        return KeptTensor(saved, unpack)

    def tensors(self) -> list[torch.Tensor]:
        """What is kept."""
        return [kept.load() for choice in self.choices for kept in choice.tensors]
