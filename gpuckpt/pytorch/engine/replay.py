"""What stands in the graph for a frame's saved tensors, and the run that fills it: see frame.py."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from gpuckpt.errors import BudgetExceeded, RecomputeMismatch
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import untraced
from gpuckpt.pytorch.engine.early_stop import RunsOtherwise
from gpuckpt.pytorch.engine.hooks import redirected_hold
from gpuckpt.pytorch.engine.residency import is_resident
from gpuckpt.pytorch.engine.saved_storage import SavedStorage, modified
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.engine.verify import Verify, compare, seen, version_of

__all__ = ["EarlyStop", "FrameReplay", "Recomputed", "Replayed", "Slot"]


class EarlyStop(BaseException):
    """All that was waited for has been recomputed. A BaseException, so that user code does not catch it by mistake."""


class Recoverable(Protocol):
    """What fills a slot: a tensor that is held, here or on the host."""

    @property
    def holding(self) -> Any: ...

    def load(self) -> torch.Tensor: ...


class Replayed(Protocol):
    """The frame, as this module knows it."""

    evictable: bool
    partial: bool
    cut: int
    slots: list[weakref.ref[Slot]]
    _lock: threading.RLock
    _wanted: Slot | None
    _budget: Budget | None
    _verify: Verify | None

    def recompute(self, wanted: Slot) -> None: ...

    def bring(self, wanted: Slot) -> None: ...

    def forget(self) -> None: ...


class Slot:
    """Stands in the graph for saved tensor number `index` of a frame; filled by a recompute."""

    __slots__ = ("__weakref__", "frame", "held", "index", "resident", "seen")

    def __init__(self, frame: Replayed, index: int) -> None:
        self.frame = frame
        self.index = index
        self.held: Recoverable | None = None

    def describe(self, tensor: torch.Tensor) -> None:
        """Note what a replay has to reproduce, and of a parameter the version of its storage."""
        self.seen = seen(tensor, self.frame._verify)
        self.resident = version_of(tensor) if is_resident(tensor) else None

    def evict(self, how: str) -> int:
        """Drop what a recompute can bring again; see `gpuckpt.memory.eviction.Evictable`."""
        lock = self.frame._lock
        if how != "recompute" or not lock.acquire(blocking=False):
            return 0
        try:
            held = self.held
            if held is None or not isinstance(held.holding, SavedStorage) or self is self.frame._wanted:
                return 0
            holding = weakref.ref(held.holding)
            nbytes = held.holding.nbytes
            self.held = held = None
            return nbytes if holding() is None else 0
        finally:
            lock.release()


class FrameReplay:
    """One more run of a frame's work: what autograd saves arrives in the order of forward and fills the slots that wait.

    `ended`: all that was waited for has arrived. `EarlyStop` says so as well, but TorchScript makes another error of it.
    """

    __slots__ = (
        "__weakref__",
        "_budget",
        "_frame",
        "_hold",
        "_last",
        "_made",
        "_partial",
        "_slots",
        "_wanted",
        "check",
        "count",
        "ended",
    )

    def __init__(self, frame: Replayed, wanted: Slot, to_the_end: bool) -> None:
        budget = frame._budget
        self._frame = frame
        self._wanted = wanted
        late = wanted.index >= frame.cut
        self._slots = {
            index: slot
            for index, ref in enumerate(frame.slots)
            if (index >= frame.cut) == late and (slot := ref()) is not None
        }
        self._partial = frame.partial
        self.check: Callable[[Sequence[torch.Tensor]], None] | None = None
        last = max(index for index, slot in self._slots.items() if slot.held is None)
        self._last = len(frame.slots) if to_the_end else last  # one that does not come
        self._made: list[weakref.ref[Recomputed]] = []
        self._hold = index_of(budget).hold
        evicts = budget is not None and frame.evictable and "recompute" in budget.over_cap
        self._budget = budget if evicts else None  # to offer slots to
        self.count = 0
        self.ended = False

    @untraced
    def pack(self, tensor: torch.Tensor) -> Recomputed:
        if self.ended:  # the work has caught what was to end it
            raise EarlyStop
        index = self.count
        self.count += 1
        slot = self._slots.get(index)
        waited_for = slot is not None
        if slot is None:
            slot = Slot(self._frame, index)  # no longer needed by backward, but perhaps by a derivative inside the work
            if self._partial:
                return Recomputed(slot)  # with nothing in it
        else:
            if self.check is not None:
                self.check([tensor])
            compare(slot.index, slot.seen, seen(tensor, self._frame._verify), tensor)
            if slot.resident is not None:
                version = version_of(tensor)
                # A leaf that the work makes itself is another storage each time, and its version says nothing.
                if version is not None and version[0] == slot.resident[0] and version[1] != slot.resident[1]:
                    raise modified(tensor)
        if slot.held is None:
            try:
                slot.held = (redirected_hold() or self._hold)(tensor)
            except BudgetExceeded:
                if self._budget is None or self._wanted.held is None or self._last == len(self._frame.slots):
                    raise
                self.ended = True
                raise EarlyStop from None  # the rest when it is wanted
            if self._budget is not None and waited_for:
                self._budget.offer(slot)
        if index == self._last:
            self.ended = True
            raise EarlyStop
        made = Recomputed(slot)
        self._made.append(weakref.ref(made))
        return made

    def close(self) -> None:
        """The replay is over. Its graph served derivatives inside the work; what user code keeps of it keeps no bytes."""
        for ref in self._made:
            made = ref()
            if made is not None:
                made.slot = None
        self._made.clear()
        self._slots.clear()
        # Autograd keeps the hooks with what they returned, and with `pack` this object.
        self._frame = self._wanted = self._budget = self._hold = None  # type: ignore[assignment]

    def arrive(self, tensors: Sequence[torch.Tensor]) -> None:
        """`tensors` will be saved next, before anything else: take them now if nothing after them is waited for."""
        if self.count + len(tensors) > self._last:
            for tensor in tensors:
                self.pack(tensor)
            raise AssertionError("the last tensor ends a replay")

    def waits_for(self) -> Collection[int] | None:
        if not self._partial or self._last == len(self._frame.slots):
            return None
        return [index for index, slot in self._slots.items() if slot.held is None]

    def drop(self) -> None:
        """Let go of all that has arrived."""
        for slot in self._slots.values():
            slot.held = None


class Recomputed:
    """Stands in the graph of a replay for a tensor that the replay saved, for as long as the replay runs.

    Work that differentiates inside (forces, gradient penalties) goes backward through that graph then. A lock would not do
    here: beyond 60 nested backwards autograd goes on in another thread, while the first one holds the frame's lock.
    """

    __slots__ = ("__weakref__", "slot")

    def __init__(self, slot: Slot) -> None:
        self.slot: Slot | None = slot

    @untraced
    def load(self) -> torch.Tensor:
        slot = self.slot
        if slot is None:
            raise RecomputeMismatch(
                "backward reached a tensor that checkpointed work made when it was run again and that outlived the recompute "
                "(kept in an attribute, a list or a hook); keep what the first forward makes, or detach() it"
            )
        held = slot.held
        if held is None and slot.frame.partial:
            raise RunsOtherwise  # a derivative inside of the work, where there was none when it was measured
        if held is None:  # given up to a full budget in the meantime
            with slot.frame._lock:
                slot.frame.recompute(slot)
                held = slot.held
        assert held is not None
        return held.load()
