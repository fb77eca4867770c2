"""A pool of host memory with a hard limit: live and cached bytes together never exceed it.

Blocks are cached whole and handed out again for the same size, as the steps of a training run ask for the same sizes over
and over. A block is never split, so the pool cannot fragment: whatever fits in the limit arithmetically is granted, after
cached blocks have been given back to the system. Addresses are aligned to 64 bytes (what XLA's CPU buffers ask for); the
padding of at most 63 bytes a block, like malloc's own header, is not counted.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuckpt.checks import shown
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory.fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuckpt.memory.ledger import Charge

__all__ = ["HostBlock", "HostPool"]

_ALIGNMENT = 64

Buffer = np.ndarray[Any, np.dtype[np.uint8]]


class _BufferRef(weakref.ref["HostBlock"]):
    """The buffer of one block. The pool keeps it; its callback puts it among the returned ones when the block dies, without
    running a line of Python in which a lock or an interrupt could get in between."""

    __slots__ = ("buffer", "held_bytes")

    buffer: Buffer
    held_bytes: int


class HostBlock:
    """Bytes of a `HostPool`. NumPy views made by `np.asarray(block)` keep the block alive; with the last of them gone, the
    bytes return to the pool and then the block's charge to its ledger."""

    __slots__ = ("__weakref__", "_buffer", "address", "charge", "nbytes")
    foreign_readers = False

    def __init__(self, pool: HostPool, buffer: Buffer) -> None:
        self._buffer = buffer  # a block outlives its pool where a budget is dropped before backward has run
        self.nbytes = buffer.nbytes
        self.address: int = buffer.__array_interface__["data"][0]
        self.charge: Charge | None = None
        place = _BufferRef(self, pool._when_dead)
        place.buffer, place.held_bytes = buffer, 0
        pool._places.add(place)
        pool._live_bytes += self.nbytes
        place.held_bytes = self.nbytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}


class HostPool:
    """Host memory up to `limit_bytes`.

    `allocate(nbytes)` makes a fresh uint8 buffer of that size: `np.empty` by default, page-locked memory for a pool that
    feeds a CUDA device (`pinned_buffer`).
    """

    unit_bytes = 1
    waiting = False  # no block of host memory waits for a reader

    def __init__(self, limit_bytes: int, *, allocate: Callable[[int], Buffer] | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._allocate = aligned_buffer if allocate is None else allocate
        self._live_bytes = 0
        self._cached_bytes = 0
        # Sizes in the order of their last use: the front is given back to the system first.
        self._cache: OrderedDict[int, list[Buffer]] = OrderedDict()
        self._addresses: dict[int, int] = {}
        self._lock = threading.RLock()
        self._places: set[_BufferRef] = set()
        # Places of dead blocks. Everyone who takes the lock empties it first.
        self._returned: deque[_BufferRef] = deque()
        self._when_dead = self._returned.append
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    @property
    def live_bytes(self) -> int:
        """Bytes in blocks that are held."""
        with self._lock:
            self._collect_returned()
            return self._live_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes in free blocks kept for the next request of their size."""
        with self._lock:
            self._collect_returned()
            return self._cached_bytes

    def take(self, nbytes: int, *, outside_bytes: int = 0) -> HostBlock:
        """A block of exactly `nbytes`, its contents undefined. Raises `BudgetExceeded` where the limit forbids it.

        `outside_bytes`: what is held outside of the pool under the same limit.
        """
        with self._lock:
            self._collect_returned()
            available = self.limit_bytes - self._live_bytes - outside_bytes
            if nbytes > available:
                raise BudgetExceeded(
                    nbytes,
                    available,
                    f"{self._live_bytes + outside_bytes} of {self.limit_bytes} bytes are in use; "
                    "free what is held, or raise the limit",
                )
            buffers = self._cache.get(nbytes)
            if buffers:
                # Counted first: an interrupt comes after the call, and then the buffer is gone as counted.
                self._cached_bytes -= nbytes
                buffer = buffers.pop()
                with suppress(KeyError):
                    self._cache.move_to_end(nbytes)
            else:
                self._shrink(available - nbytes)
                buffer = self._allocate(nbytes)
                if getattr(buffer, "nbytes", None) != nbytes or not hasattr(buffer, "__array_interface__"):
                    raise TypeError(
                        f"allocator returned {shown(buffer)} for {nbytes} bytes; expected a NumPy array or another object with "
                        "__array_interface__, and nbytes of just that many"
                    )
            block = HostBlock(self, buffer)
            if nbytes:
                self._addresses[block.address] = nbytes
            return block

    def owns(self, address: int) -> bool:
        """Whether a live block begins at `address`."""
        return address in self._addresses

    def collect(self, *, wait: bool = False) -> None:
        """Put dead blocks into the cache. Host memory has no streams, so there is nothing to wait for."""
        with self._lock:
            self._collect_returned()

    def trim(self, keep_bytes: int = 0) -> None:
        """Give cached blocks back to the system until at most `keep_bytes` remain cached."""
        with self._lock:
            self._collect_returned()
            self._shrink(max(keep_bytes, 0))

    def _shrink(self, keep_bytes: int) -> None:
        while self._cached_bytes > keep_bytes and self._cache:
            size, buffers = next(iter(self._cache.items()))
            if buffers:
                self._cached_bytes -= size
                buffers.pop()
            if not buffers:
                self._cache.pop(size, None)

    def _collect_returned(self) -> None:
        # As in the ledger: counted before it leaves the queue, in steps between which nothing can get in.
        returned = self._returned
        while returned:
            try:
                place = returned[0]
                self._addresses.pop(place.buffer.__array_interface__["data"][0], None)
                buffers = self._cache.setdefault(place.buffer.nbytes, [])
                nbytes = place.held_bytes
                place.held_bytes = 0
                self._live_bytes -= nbytes
                if nbytes:
                    self._cached_bytes += nbytes
                    buffers.append(place.buffer)
                self._places.discard(place)
                if returned[0] is place:
                    returned.popleft()
            except IndexError:
                return


def aligned_buffer(nbytes: int) -> Buffer:
    """Fresh host memory of `nbytes`, aligned to 64 bytes."""
    raw = np.empty(nbytes + _ALIGNMENT - 1, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]
