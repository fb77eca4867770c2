"""Watches every address that a kernel touches in Triton's interpreter, and builds tensors that sit between poisoned guards.

`watch` stands between the interpreter and its four memory primitives (load, store, compare-and-swap, read-modify-write), which
all forms of access end in: pointers, block pointers and descriptors. A lane that is not masked off has to hit an element of a
tensor that was passed to the kernel, not merely its storage: the gap between two rows of a view is out of bounds. The check comes
before the access, so a fault is reported and not suffered. Beyond bounds it finds what one program after another cannot show:
elements that two programs write, or that one writes and another reads.

`Arena` is the second, independent witness: it compares all bytes around and between the elements with what they were.

Why not a tool that exists: tilelens 3.1.1 (the successor of triton-viz) runs beside triton 3.7.1, but lets the mask of one turn
of a K loop meet the pointer of the next, and so reports sound kernels; it also refuses Philox and some scalar operations.

Made for tensors of a few thousand elements. Not seen: what torch's own operators do, shared memory, races on a real device
other than those above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

__all__ = ["Arena", "Fault", "Watch", "watch"]

_NOBODY, _MANY = -1, -2


class Fault(AssertionError):
    """A kernel touched what it must not, or left out what it must write."""


def addresses(t: Tensor) -> np.ndarray:
    """The address of each element, int64, sorted and without repetition."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int64) * stride
    return np.unique(t.data_ptr() + offsets.reshape(-1) * t.element_size())


class Watch:
    """What the launches inside one `watch` did. launches: names of the kernels; lanes: unmasked lanes that were checked."""

    def __init__(self, written: tuple[Tensor, ...]) -> None:
        self.launches: list[str] = []
        self.lanes = 0
        self._written = np.unique(np.concatenate([addresses(t) for t in written] or [np.empty(0, np.int64)]))
        self._reached = np.zeros(len(self._written), bool)
        self._primitives = interpreter._interpreter

    def begin(self, kernel: str, tensors: list[Tensor]) -> None:
        """Forget the last launch; from now on the elements of `tensors` are what may be touched."""
        self.launches.append(kernel)
        found = [addresses(t) for t in tensors]
        sizes = [np.full(len(a), t.element_size()) for a, t in zip(found, tensors, strict=True)]
        self._elements, first = np.unique(np.concatenate([*found, np.empty(0, np.int64)]), return_index=True)
        self._sizes = np.concatenate([*sizes, np.empty(0, np.int64)])[first]
        self._may_write = np.isin(self._elements, self._written)
        self._writer = np.full(len(self._elements), _NOBODY)
        self._reader = np.full(len(self._elements), _NOBODY)

    def end(self) -> None:
        """Judge what only the whole launch shows."""
        foreign = (self._writer != _NOBODY) & (self._reader != _NOBODY) & (self._reader != self._writer)
        if foreign.any():
            raise Fault(f"{self.launches[-1]}: {foreign.sum()} elements are written by one program and read by another")
        self._reached |= np.isin(self._written, self._elements[self._writer != _NOBODY])

    def finish(self) -> None:
        """Every element that was to be written has been."""
        if not self._reached.all():
            raise Fault(
                f"{(~self._reached).sum()} of {len(self._reached)} elements were never written by {self.launches}"
            )

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> Any:
        self._read(pointers, mask, np.dtype(dtype).itemsize)
        return self._primitives.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        found = self._find(pointers, mask, value.dtype.itemsize, "stores to")
        if not self._may_write[found].all():
            raise Fault(f"{self._where()} writes an input")
        if len(np.unique(found)) != len(found) or (self._writer[found] != _NOBODY).any():
            raise Fault(f"{self._where()} writes an element for the second time")
        self._writer[found] = self._program()
        return self._primitives.store(pointers, value, mask)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any) -> Any:
        self._find(pointers, np.ones_like(pointers, bool), value.dtype.itemsize, "compares and swaps")
        return self._primitives.atomic_cas(pointers, expected, value, order)

    def atomic_rmw(self, operation: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        self._find(pointers, mask, value.dtype.itemsize, "modifies")
        return self._primitives.atomic_rmw(operation, pointers, value, mask, order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._primitives, name)

    def _read(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        found = self._find(pointers, mask, size, "loads from")
        here, before = self._program(), self._reader[found]
        self._reader[found] = np.where((before == _NOBODY) | (before == here), here, _MANY)

    def _find(self, pointers: np.ndarray, mask: np.ndarray, size: int, does: str) -> np.ndarray:
        """Which element each unmasked lane hits. Raises `Fault` for one that hits none, or another type's."""
        live = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64).reshape(-1)
        self.lanes += len(live)
        if len(live) == 0:
            return np.empty(0, np.int64)
        place = np.searchsorted(self._elements, live)
        place = np.minimum(place, len(self._elements) - 1) if len(self._elements) else place
        hit = self._elements[place] == live if len(self._elements) else np.zeros(len(live), bool)
        if not hit.all():
            raise Fault(f"{self._where()} {does} {(~hit).sum()} of {len(live)} addresses out of bounds")
        if not (self._sizes[place] == size).all():
            raise Fault(f"{self._where()} {does} elements of another size than {size} B")
        return place

    def _program(self) -> int:
        i, j, k = interpreter.interpreter_builder.grid_idx
        _, many, most = interpreter.interpreter_builder.grid_dim
        return int((i * many + j) * most + k)

    def _where(self) -> str:
        return f"{self.launches[-1]}: program {self._program()}"


@contextmanager
def watch(*written: Tensor) -> Iterator[Watch]:
    """Watch all launches inside; `written` are the tensors to be written, each element exactly once a launch.

    Raises `Fault` at the first access that breaks a rule, and at the end where an element of `written` was left out.
    """
    seen = Watch(written)
    execute = interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bases = [getattr(a, "base", a) for a in (*args, *kwargs.values())]
        seen.begin(executor.fn.__name__, [t for t in bases if isinstance(t, Tensor)])
        try:
            execute(executor, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for each kernel function on the way
                cause = cause.__cause__
            if isinstance(cause, Fault):
                raise cause from None
            raise
        seen.end()

    with (
        mock.patch.object(interpreter, "_interpreter", seen),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield seen
    seen.finish()


class Arena:
    """Makes tensors with poison around and between their elements, and tells whether it is still there.

    Poison is the byte 0xFF: NaN in every float type, -1 in every signed integer.
    """

    GUARD_BYTES = 256

    def __init__(self) -> None:
        self._made: list[tuple[str, Tensor, Tensor, Tensor | None]] = []

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...], *, skew: int = 0
    ) -> Tensor:
        """A poisoned tensor of these strides (in elements), `skew` elements past a 64-byte boundary."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
        start = self.GUARD_BYTES // dtype.itemsize + skew
        buffer = torch.full((2 * start + extent,), 0, dtype=dtype)
        buffer.view(torch.uint8).fill_(0xFF)
        t = buffer.as_strided(shape, strides, start)
        self._made.append((name, buffer, t, None))
        return t

    def keep(self, *inputs: Tensor) -> None:
        """From now on these tensors' own elements must not change either."""
        for number, (name, buffer, t, _) in enumerate(self._made):
            if any(t is i for i in inputs):
                self._made[number] = (name, buffer, t, t.clone())

    def check(self) -> None:
        """Raises `Fault` where poison or an input has changed."""
        for name, buffer, t, before in self._made:
            if before is not None and not torch.equal(_bytes(t), _bytes(before)):
                raise Fault(f"input {name} was changed")
            outside = torch.ones(buffer.numel(), dtype=torch.bool)
            outside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
            around = _bytes(buffer[outside])
            if not bool((around == 0xFF).all()):
                raise Fault(f"memory around {name} was written")


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype).copy_(t).view(-1).view(torch.uint8)
