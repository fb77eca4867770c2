"""Holding arrays between forward and backward: by reference, or inside a budget.

Every class of this room keeps arrays through a `Keeper`, so that a budget and a tracker see each of them.
Without a budget an array is kept by reference and not copied: do not write into an input between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gpuckpt.checks import shown
from gpuckpt.errors import NotCheckpointed
from gpuckpt.memory import Budget, MemoryUsageTracker
from gpuckpt.segments.arrays import Array, nbytes

__all__ = ["Keeper", "Kept", "release_all"]


class _Handle(Protocol):
    def load(self) -> Any: ...

    def free(self) -> None: ...


class _Reference:
    """The handle of an array that no budget holds."""

    __slots__ = ("_array",)

    def __init__(self, array: Array) -> None:
        self._array = array

    def load(self) -> Array:
        return self._array

    def free(self) -> None:
        self._array = None


class Kept:
    """One array that is held until `free()`. `nbytes`: what is charged for it; 0 once freed."""

    __slots__ = ("_handle", "_on_free", "nbytes")

    def __init__(self, handle: _Handle, held_bytes: int, on_free: Callable[[int], None] | None) -> None:
        self._handle: _Handle | None = handle
        self._on_free = on_free
        self.nbytes = held_bytes

    def load(self) -> Array:
        """The array. Raises `NotCheckpointed` once freed."""
        if self._handle is None:
            raise NotCheckpointed("this activation was freed already; run forward again")
        return self._handle.load()

    def free(self) -> None:
        """Let go of the array and of what is charged for it. The second time does nothing."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        held_bytes, self.nbytes = self.nbytes, 0
        handle.free()
        if self._on_free is not None:
            self._on_free(held_bytes)


class Keeper:
    """Where a class keeps its arrays. budget: their cap, or None. tracker: counts every array kept and freed; or None.

    Raises `TypeError` for anything else.
    """

    def __init__(self, budget: Budget | None = None, tracker: MemoryUsageTracker | None = None) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget is {shown(budget)}; expected a Budget, such as Budget('2GiB'), or None")
        if tracker is not None and not isinstance(tracker, MemoryUsageTracker):
            raise TypeError(f"tracker is {shown(tracker)}; expected a MemoryUsageTracker, or None")
        self.budget = budget
        self.tracker = tracker
        # id(layer) -> (layer, its recorded gradient bytes): a layer that occurs twice has one set of gradients.
        self._gradients: dict[int, tuple[Any, int]] = {}

    def keep(self, array: Array) -> Kept:
        """Hold `array`. Raises `BudgetExceeded` where it does not fit, and then nothing has changed."""
        held_bytes = nbytes(array)
        handle: _Handle = _Reference(array) if self.budget is None else self.budget.save(array)
        if self.tracker is None:
            return Kept(handle, held_bytes, None)
        self.tracker.record_stored_activation(held_bytes)
        return Kept(handle, held_bytes, self.tracker.release_stored_activation)

    def recomputed(self, array: Array) -> None:
        """Tell the tracker that `array` was computed again."""
        if self.tracker is not None:
            self.tracker.record_recomputed(nbytes(array))

    def settle_gradients(self, layer: Any) -> None:
        """Bring the tracker's gradient bytes up to what `layer` holds: after a backward, an update, a change of them."""
        if self.tracker is None:
            return
        held_bytes = sum(nbytes(g) for g in getattr(layer, "gradients", ()))
        _, recorded_bytes = self._gradients.get(id(layer), (layer, 0))
        if held_bytes > recorded_bytes:
            self.tracker.record_gradient(held_bytes - recorded_bytes)
        elif held_bytes < recorded_bytes:
            self.tracker.release_gradient(recorded_bytes - held_bytes)
        self._gradients[id(layer)] = (layer, held_bytes)


def release_all(kept: Iterable[Kept]) -> None:
    """Free every one of them."""
    for one in kept:
        one.free()
