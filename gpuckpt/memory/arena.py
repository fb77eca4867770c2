"""A planned step's slab, reserved in one piece: every array of the plan has its place in it before the first step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from gpuckpt.errors import InvalidPlan
from gpuckpt.memory.arrays import library_of
from gpuckpt.memory.forms import form_of

if TYPE_CHECKING:
    from gpuckpt.memory.budget import CheckpointBudget
    from gpuckpt.memory.layout import Slab

__all__ = ["Arena"]


class Arena:
    """One block of a budget's pool, cut up by a `Slab`. Made by `CheckpointBudget.reserve`; the block goes back when the arena
    and every view into it are gone. A step may run in it any number of times, one place after another as planned."""

    def __init__(self, budget: CheckpointBudget, slab: Slab, what: str) -> None:
        self.slab = slab
        self._on_host = budget.device == "cpu"
        self._block = budget.take(slab.size_bytes, what)
        # Places in use: the id, and where its bytes end.
        self._busy: dict[Hashable, tuple[int, int]] = {}

    def save(self, name: Hashable, array: Any) -> Any:
        """Copy `array` to the place that the plan gave `name`. Returns a zero-copy view, like `Saved.load()`; the place is free
        again when the view, and all made from it, are gone.

        Raises `InvalidPlan` where the array is larger than planned, or the plan had something else gone by now that is not.
        """
        form = form_of(array, library_of(array))
        if name not in self.slab.offsets:
            raise InvalidPlan(f"the layout has no place for {name!r}; lay out the sequence that the step runs")
        if form.nbytes > self.slab.sizes[name]:
            raise InvalidPlan(f"{name!r} has {form.nbytes} bytes and its place {self.slab.sizes[name]}; lay out again")
        start = self.slab.offsets[name]
        end = start + form.nbytes
        for other, (low, high) in list(self._busy.items()):
            if low < end and start < high:
                raise InvalidPlan(
                    f"{name!r} is to lie where {other!r} still is; the step departs from the planned order"
                )
        part = (_HostPart if self._on_host else _CudaPart)(self, name, start, form.nbytes)
        form.write(array, part)
        return form.view(part)


class _HostPart:
    """A range of the arena's block in host memory."""

    foreign_readers = False

    def __init__(self, arena: Arena, name: Hashable, offset: int, nbytes: int) -> None:
        self._arena = arena
        self._name = name
        self.address: int = arena._block.address + offset
        self.nbytes = nbytes
        arena._busy[name] = (offset, offset + nbytes)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self._arena._busy.pop(self._name, None)


class _CudaPart:
    """A range of the arena's block on a CUDA device."""

    def __init__(self, arena: Arena, name: Hashable, offset: int, nbytes: int) -> None:
        self._arena = arena
        self._name = name
        self._consumers: dict[Any, Any] = {}
        self.address: int = arena._block.address + offset
        self.nbytes = nbytes
        self.stream = arena._block.stream
        arena._busy[name] = (offset, offset + nbytes)

    def pointer(self) -> Any:
        """A CuPy `MemoryPointer` to the range's first byte."""
        return self._arena._block.pointer_at(self.address, self.nbytes, self)

    def written(self) -> None:
        """Say that the slab's stream has been given the work that fills the range."""
        self._arena._block.written()

    def used_on(self, stream: Any) -> None:
        """Say that work on `stream` reads the range."""
        self._arena._block.used_on(stream)
        self._consumers[stream.ptr] = stream

    def __del__(self) -> None:
        # The range is written next by work on the slab's own stream: that work waits for the readers on other streams.
        for stream in self._consumers.values():
            if stream.ptr != self.stream.ptr:
                self._arena._block.order_after(stream)
        self._arena._busy.pop(self._name, None)
