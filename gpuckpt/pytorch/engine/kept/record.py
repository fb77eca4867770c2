"""`Record`: what one piece of work made in forward and keeps for its recompute, in the order in which it was made.

Every frame has one. While the work runs in forward, the records of all frames around it are open and take what is kept; while
it is run again, the one record of the frame that does so is read, and frames within that work record what is read.

What is kept is saved as a frame's inputs are: into what surrounds the frame. A budget holds it; of a frame within a frame it is
one more saved tensor of the outer one, which its recompute brings back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuckpt.errors import RecomputeMismatch
from gpuckpt.pytorch._torch_internals import top_saved_tensors_hooks
from gpuckpt.pytorch.engine.saved_storage import HeldTensor, MovableStorage
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.engine.subclasses import detached

__all__ = [
    "KeptTensor",
    "Record",
    "by_hand",
    "in_checkpoint",
    "is_recomputing",
    "open_records",
    "paused",
    "reader",
    "reading",
    "recording",
]

_current = (
    threading.local()
)  # `open`: weak references to records that this thread writes; `reader`: one to what it reads


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

    __slots__ = ("__weakref__", "_pack", "_unpack", "choices")

    def __init__(self) -> None:
        self._pack: Callable[[torch.Tensor], Any] = index_of(None).hold
        self._unpack: Callable[[Any], torch.Tensor] = HeldTensor.load
        self.choices: list[Any] = []

    def begin(self) -> Record:
        """Keep tensors in what the active hooks make of them."""
        self._pack, self._unpack = top_saved_tensors_hooks(True) or (self._pack, self._unpack)
        return self

    def keep(self, tensor: torch.Tensor, *, exact: bool = False) -> KeptTensor:
        """Keep `tensor`. `exact`: a budget that compresses leaves it as it is. Raises `BudgetExceeded`."""
        saved = self._pack(tensor)
        if exact and isinstance(saved, HeldTensor) and isinstance(saved.holding, MovableStorage):
            saved.holding.exact = True
        return KeptTensor(saved, self._unpack)

    def tensors(self) -> list[torch.Tensor]:
        """What is kept."""
        return [kept.load() for choice in self.choices for kept in choice.tensors]


class recording:
    """Within the context, work of this thread writes `records`, besides those that it writes already. The thread refers to them
    weakly: Ctrl-C can end `__exit__` before its first line."""

    __slots__ = ("_before", "_records")

    def __init__(self, *records: Record) -> None:
        self._records = records

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ())
        _current.open = self._before + tuple(map(weakref.ref, self._records))

    def __exit__(self, *error: object) -> None:
        _current.open = self._before


class reading:
    """Within the context, work of this thread is run again, and reads `record` from its beginning."""

    __slots__ = ("__weakref__", "_before", "_next", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self._next = 0

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ()), getattr(_current, "reader", None)
        _current.open, _current.reader = (), weakref.ref(self)

    def __exit__(self, *error: object) -> None:
        _current.open, _current.reader = self._before

    def next_choice(self) -> Any:
        """The next of the record's choices. Raises `RecomputeMismatch` where forward made no more."""
        choices = self.record.choices
        if self._next == len(choices):
            raise RecomputeMismatch(
                f"checkpointed work called once() {len(choices)} times in forward and more often when it was run again; it must "
                "do the same both times"
            )
        self._next += 1
        return choices[self._next - 1]


class paused:
    """Within the context, this thread neither writes records nor reads one: what runs is no part of the recorded work."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ()), getattr(_current, "reader", None)
        _current.open, _current.reader = (), None

    def __exit__(self, *error: object) -> None:
        _current.open, _current.reader = self._before


class by_hand:
    """Within the context, code of this thread runs in a call of `checkpoint`, with gradients or without."""

    __slots__ = ()

    def __enter__(self) -> None:
        _current.depth = getattr(_current, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        _current.depth -= 1


def in_checkpoint() -> bool:
    """Whether the calling code is part of a call of `checkpoint`: what is saved there is that call's affair, and no plan's."""
    return getattr(_current, "depth", 0) > 0


def open_records() -> Sequence[Record]:
    """The records that this thread writes, outermost first."""
    return [record for ref in getattr(_current, "open", ()) if (record := ref()) is not None]


def reader() -> reading | None:
    """What this thread reads; None where it runs nothing again."""
    ref = getattr(_current, "reader", None)
    return None if ref is None else ref()


def is_recomputing() -> bool:
    """Whether the calling code is being run again in backward, by `checkpoint` or under a plan; False in forward and plain runs.

    >>> import gpuckpt
    >>> seen = []
    >>> def work(x):
    ...     seen.append(is_recomputing())
    ...     return x.sin()
    >>> gpuckpt.checkpoint(work, torch.ones(3, requires_grad=True)).sum().backward()
    >>> seen
    [False, True]
    """
    return reader() is not None
