"""CuPy's `MemoryPool` with a hard limit of its own, on one device, for one budget.

* Every allocation enters its device and stream by itself, because what CuPy calls current belongs to a thread and backward runs
  on other ones. The stream is the current one of the pool's `library`, whatever array is saved: CuPy keeps an arena for each
  stream, and what is cached in one cannot serve another.
* CuPy returns a freed chunk to the stream it was allocated on, in that stream's order. A block that another stream has
  read is therefore kept back until that stream's event has passed; until then its bytes are neither free nor reused.
  One that another stream writes is ordered both ways: that stream waits for the block's own, which then waits for the write.
* A CUDA graph cannot hold a block: it would go on using the memory after the block was given back. Taking one is refused then.
* CuPy's pool splits chunks best-fit, so that free bytes may lie in pieces. A refusal says so when that, and not
  arithmetic, was the reason; a planned step avoids it (`gpuckpt.memory.layout`).
* A limit of 0 means "no limit" to CuPy and is never passed on. `MemoryAsyncPool` has no hard limit and is never used.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuckpt.errors import BackendUnavailable, BudgetExceeded
from gpuckpt.memory.fork import renew_after_fork

if TYPE_CHECKING:
    from gpuckpt.memory.ledger import Charge

__all__ = ["CudaBlock", "CupyPool", "import_cupy", "pinned_buffer", "torch_stream"]


def import_cupy() -> Any:
    """The module `cupy`. Raises `BackendUnavailable` with what to install."""
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable("a CUDA budget needs CuPy: install gpuckpt[cuda12] or gpuckpt[cuda13]") from error
    return cupy


class CudaBlock:
    """Bytes of a `CupyPool`, at `address` on its device. Arrays over `pointer()` keep the block alive; with the last of them
    gone, and every other stream that used them past that point, the bytes return to the pool and then to the ledger."""

    __slots__ = ("__weakref__", "_consumers", "_memory", "_pool", "address", "charge", "nbytes", "ready", "stream")

    def __init__(self, pool: CupyPool, memory: Any, nbytes: int, stream: Any) -> None:
        self._pool = pool
        self._memory = memory  # CuPy's MemoryPointer: the one reference to the pooled chunk
        self._consumers: dict[Any, Any] = {}
        self.address = memory.ptr
        self.nbytes = nbytes
        self.stream = stream
        self.ready: Any = None  # event after the last write, for readers on other streams
        self.charge: Charge | None = None

    def pointer(self) -> Any:
        """A CuPy `MemoryPointer` to the block's first byte."""
        return self.pointer_at(self.address, self.nbytes, self)

    def pointer_at(self, address: int, nbytes: int, owner: Any) -> Any:
        """A `MemoryPointer` to `nbytes` at `address` in the block, which keeps `owner` alive."""
        cuda = self._pool.cupy.cuda
        return cuda.MemoryPointer(cuda.UnownedMemory(address, nbytes, owner, self._pool.device_id), 0)

    @property
    def foreign_readers(self) -> bool:
        """Whether other streams than the block's own have been told to read it."""
        return bool(self._consumers)

    def writing_on(self, stream: Any) -> None:
        """Say that work on `stream` is going to fill the block: it waits for what the block's own stream was given so far, such
        as the last reader of the same memory."""
        if stream_key(stream) != stream_key(self.stream):
            stream.wait_event(self._pool.event_on(self.stream))

    def written(self, stream: Any = None) -> None:
        """Say that `stream` (None: the block's own) has been given the work that fills it."""
        own = stream is None or stream_key(stream) == stream_key(self.stream)
        self.ready = self._pool.event_on(self.stream if own else stream)
        if not own:
            self.stream.wait_event(self.ready)

    def reading_on(self, stream: Any) -> bool:
        """Say that work on `stream`, which the caller will wait for, reads the block. Returns whether it is another stream."""
        other = stream_key(stream) != stream_key(self.stream)
        if other and self.ready is not None:
            stream.wait_event(self.ready)
        return other

    def used_on(self, stream: Any) -> None:
        """Say that work on `stream` reads the block: it waits for the write, and reuse of the block waits for it."""
        if self.reading_on(stream):
            self._consumers[stream_key(stream)] = stream

    def __del__(self) -> None:
        self._pool._retire(self)


def stream_key(stream: Any) -> tuple[int, int]:
    """Names the queue behind a stream: stream 2, "per thread", is a different one in each thread."""
    return (stream.ptr, threading.get_ident() if stream.ptr == 2 else 0)


class _RawStream:
    """A stream of torch's, by the protocol that CuPy takes streams of other libraries by. torch's own have it from 2.12 on."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


_torch_streams: dict[tuple[int, int], Any] = {}  # by device and address: torch takes its streams from a fixed set


def torch_stream(device: Any) -> Any:
    """torch's current stream of this thread on `device` (a torch device or a number), as CuPy knows it."""
    current = sys.modules["torch"].cuda.current_stream(device)
    key = current.device_index, current.cuda_stream
    stream = _torch_streams.get(key)
    if stream is None:
        cuda = import_cupy().cuda
        with cuda.Device(current.device_index):
            stream = _torch_streams[key] = cuda.Stream.from_external(_RawStream(current.cuda_stream))
    return stream


def library_at_hand() -> str:
    """The library whose streams a pool follows if nobody says so: torch where it works on CUDA already, else CuPy."""
    torch = sys.modules.get("torch")
    return "torch" if torch is not None and torch.cuda.is_initialized() else "cupy"


class CupyPool:
    """Device memory up to `limit_bytes`, live and cached together, in units of 512 bytes.

    `allocator(nbytes)` is what CuPy's pool draws from: its own cudaMalloc by default, or `torch_allocator()`, so that one
    allocator owns the device. `library`: "torch" or "cupy", on whose current stream blocks lie; None: see `library_at_hand`.
    `MemoryError` of CUDA becomes `BudgetExceeded`, its cause kept; other errors pass untouched.
    """

    unit_bytes = 512

    def __init__(self, limit_bytes: int, device_id: int, *, allocator: Any = None, library: str | None = None) -> None:
        self.cupy = import_cupy()
        self.library = library or library_at_hand()
        self.limit_bytes = limit_bytes
        self.device_id = device_id
        self._pool = self.cupy.cuda.MemoryPool() if allocator is None else self.cupy.cuda.MemoryPool(allocator)
        self._addresses: dict[int, int] = {}
        # Blocks whose last reader may still be running: (memory, charge, events). Finalizers append, `collect` empties.
        self._delayed: deque[tuple[Any, Charge | None, list[Any]]] = deque()
        self._lock = threading.RLock()
        renew_after_fork(self)
        # CuPy's pool keeps what it caches to the end of the process, even when the pool itself is gone.
        self._at_end = weakref.finalize(self, _give_back, self.cupy.cuda.Device(device_id), self._pool)
        self._at_end.atexit = False  # the driver takes everything back then

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    @property
    def live_bytes(self) -> int:
        """Bytes in chunks that somebody holds, blocks that wait for an event included."""
        with self.cupy.cuda.Device(self.device_id):
            return int(self._pool.used_bytes())

    @property
    def cached_bytes(self) -> int:
        """Bytes in free chunks that the pool keeps."""
        with self.cupy.cuda.Device(self.device_id):
            return int(self._pool.free_bytes())

    def current_stream(self) -> Any:
        """The stream that a block taken now by this thread lies on."""
        return torch_stream(self.device_id) if self.library == "torch" else self.cupy.cuda.get_current_stream()

    def event_on(self, stream: Any) -> Any:
        """An event that passes when what `stream` has been given so far is done."""
        with self.cupy.cuda.Device(self.device_id):
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(stream)
        return event

    def take(self, nbytes: int, *, outside_bytes: int = 0) -> CudaBlock:
        """A block of at least `nbytes`, contents undefined, on `current_stream()`. Raises `BudgetExceeded` where the limit
        forbids it, less `outside_bytes`, which are held outside of the pool under the same limit, and `RuntimeError` while a
        CUDA graph is being captured."""
        cuda = self.cupy.cuda
        with cuda.Device(self.device_id):
            stream = self.current_stream()
            if stream.is_capturing():
                raise RuntimeError(
                    'a budget with hold="pool" cannot give memory to a CUDA graph, which would use it again at each replay, '
                    'when it belongs to somebody else: capture under a budget with hold="account"'
                )
            self.collect()
            room_bytes = self.limit_bytes - outside_bytes
            if nbytes and room_bytes <= 0:
                raise BudgetExceeded(
                    nbytes,
                    0,
                    f"{outside_bytes} of {self.limit_bytes} bytes are held outside of the pool, which has none left",
                )
            with self._lock, stream:
                # 0 would mean "no limit" to CuPy; a request of no bytes needs none.
                self._pool.set_limit(size=max(room_bytes, 1))
                try:
                    memory = self._pool.malloc(nbytes)
                except cuda.memory.OutOfMemoryError as error:
                    raise self._refusal(nbytes, room_bytes) from error
        block = CudaBlock(self, memory, nbytes, stream)
        if nbytes:
            self._addresses[block.address] = nbytes
        return block

    @property
    def waiting(self) -> bool:
        """Whether blocks wait for their last readers."""
        return bool(self._delayed)

    def owns(self, address: int) -> bool:
        """Whether a live block begins at `address`."""
        return address in self._addresses

    def collect(self, *, wait: bool = False) -> None:
        """Give back the blocks whose readers are done; with `wait`, wait for those that are not."""
        for _ in range(len(self._delayed)):
            try:
                memory, charge, events = self._delayed.popleft()
            except IndexError:  # another thread took the last one
                return
            if wait:
                for event in events:
                    event.synchronize()
            if not all(event.done for event in events):
                self._delayed.append((memory, charge, events))
                continue
            # The chunk first, then its bytes in the ledger: what the ledger admits, the pool then has.
            del memory
            del charge

    def trim(self, keep_bytes: int = 0) -> None:
        """Give cached chunks back to the device where more than `keep_bytes` are cached. CuPy gives back all or nothing."""
        self.collect()
        with self.cupy.cuda.Device(self.device_id):
            if self._pool.free_bytes() > max(keep_bytes, 0):
                self._pool.free_all_blocks()

    def _retire(self, block: CudaBlock) -> None:
        """A block's finalizer: never waits."""
        self._addresses.pop(block.address, None)
        memory, charge = block._memory, block.charge
        block._memory = block.charge = None
        if block._consumers:
            self._delayed.append((memory, charge, self._last_uses(list(block._consumers.values()))))
            return
        del memory
        del charge

    def _last_uses(self, streams: list[Any]) -> list[Any]:
        """Events that pass when what `streams` have been given so far is done."""
        try:
            return [self.event_on(stream) for stream in streams]
        except self.cupy.cuda.runtime.CUDARuntimeError:
            # A finalizer must not raise. The stream itself answers the same questions, only later: when it is idle.
            return streams

    def _refusal(self, nbytes: int, room_bytes: int) -> BudgetExceeded:
        rounded = -(-nbytes // self.unit_bytes) * self.unit_bytes
        live, total = int(self._pool.used_bytes()), int(self._pool.total_bytes())
        available = room_bytes - live
        books = (
            f"asked {rounded}, in use {live}, cached {total - live}, limit {room_bytes} bytes on cuda:{self.device_id}"
        )
        if rounded > available:
            why = "the pool's limit is reached; free what is held, or raise the budget"
        elif rounded > room_bytes - total:
            why = (
                "the limit would allow it, but free bytes lie in pieces between held blocks (fragmentation); "
                "run under a plan, whose layout has no gaps, or raise the budget"
            )
        else:
            unused, whole = self.cupy.cuda.runtime.memGetInfo()
            why = (
                f"the limit would allow it, but the device has no such block ({unused} of {whole} bytes free); "
                "other allocators hold it: free their caches, or lower the budget"
            )
        return BudgetExceeded(nbytes, max(available, 0), f"{books}: {why}")


def _give_back(device: Any, pool: Any) -> None:
    with device:
        pool.free_all_blocks()


def pinned_buffer(nbytes: int) -> Any:
    """Page-locked host memory of exactly `nbytes`, for a `HostPool` that a CUDA device copies to and from.

    CuPy's own pinned pool would round up to a power of two and has no limit.
    """
    import numpy as np

    cuda = import_cupy().cuda
    if nbytes == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(cuda.PinnedMemoryPointer(cuda.PinnedMemory(nbytes), 0), np.uint8, nbytes)
