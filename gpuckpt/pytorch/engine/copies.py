"""Copies between device and host that go on while other work runs: one at a time, in the order in which they were asked for.

On CUDA that is a stream of its own, and events order what comes after; on the CPU a thread. A copy is asked for with the bytes as
flat uint8 tensors, and `wait()` orders the caller's further work after it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from gpuckpt.errors import OffloadFailed
from gpuckpt.memory.fork import renew_after_fork
from gpuckpt.memory.pools.cupy import torch_stream
from gpuckpt.units import format_bytes

__all__ = ["Copies", "Copy", "CopyRecord", "CopyStream", "CopyThread", "copies_for"]

_MOST_RECORDS = 4096


class Copy(Protocol):
    """One copy. It holds both sides until it is done."""

    def wait(self) -> None:
        """Have what follows see the copy. Raises `OffloadFailed` where it failed."""
        ...


class Copies(Protocol):
    """Who copies."""

    def copy(self, target: CopySide, source: CopySide, what: str) -> Copy:
        """Begin to copy `source` to `target` once all is done that the caller has begun. `what`: how errors name it."""
        ...


@dataclass(slots=True)
class CopySide:
    """Bytes as a flat uint8 tensor, and the block of a pool that they lie in, if any."""

    flat: torch.Tensor
    block: Any = None


@dataclass(slots=True)
class CopyRecord:
    """One copy of a `CopyThread`, in seconds of `time.perf_counter`. `waited_s`: how long somebody stood still for it; `thread`:
    who made it."""

    what: str
    nbytes: int
    asked_s: float
    began_s: float = 0.0
    done_s: float = 0.0
    waited_s: float = 0.0
    thread: int = 0


class CopyThread:
    """Copies in a thread, no faster than `bytes_per_s`, each `latency_s` late; by default as fast as it goes.

    `records`: the latest copies.
    """

    def __init__(self, bytes_per_s: float = float("inf"), latency_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.records: deque[CopyRecord] = deque(maxlen=_MOST_RECORDS)
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        renew_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._thread = None

    def copy(self, target: CopySide, source: CopySide, what: str) -> Copy:
        record = CopyRecord(what, source.flat.numel(), time.perf_counter())
        self.records.append(record)
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "gpuckpt-copy")
            sides = [target.flat.numpy(), source.flat.numpy()]
            done = self._thread.submit(self._run, sides, record)
        return _ThreadCopy(done, target, source, sides, record)

    def _run(self, sides: list[np.ndarray], record: CopyRecord) -> None:
        record.began_s, record.thread = time.perf_counter(), threading.get_ident()
        source, target = sides.pop(), sides.pop()  # the thread keeps its arguments a little longer than it runs
        self.move(target, source)
        rest_s = record.began_s + self.latency_s + record.nbytes / self.bytes_per_s - time.perf_counter()
        if rest_s > 0:
            time.sleep(rest_s)
        record.done_s = time.perf_counter()

    def move(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy the bytes; tests let it fail."""
        np.copyto(target, source)


class _ThreadCopy:
    __slots__ = ("_done", "_places", "_record", "_sides")

    def __init__(
        self, done: Future[None], target: CopySide, source: CopySide, sides: list[np.ndarray], record: CopyRecord
    ) -> None:
        self._done = done
        self._places: tuple[CopySide, CopySide] | None = (target, source)
        self._sides = sides
        self._record = record

    def wait(self) -> None:
        began_s = time.perf_counter()
        error = self._done.exception()  # not result(): the error would refer to this call, and the call to the error
        self._record.waited_s += time.perf_counter() - began_s
        if error is not None:
            raise _failed(self._record.what, self._record.nbytes, error) from error
        self._places = None

    def __del__(self) -> None:
        # Nobody needs it. What it reads and writes is free once this is gone, and so the thread has to be done with it.
        if self._places is None:
            return
        if self._done.cancel():
            self._sides.clear()  # the thread gets to what was cancelled after what was asked for before it
        elif (
            self._record.thread != threading.get_ident()
        ):  # a collection of garbage may end it in the thread that copies
            self._done.exception()


class CopyStream:
    """Copies on a stream of their own of a CUDA device. Host memory that is not pinned makes them synchronous."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: CopySide, source: CopySide, what: str) -> Copy:
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                ours = torch_stream(self._device)
                if target.flat.is_cuda and target.block is not None:
                    target.block.writing_on(ours)
                if source.flat.is_cuda and source.block is not None:
                    source.block.used_on(ours)
                target.flat.copy_(source.flat, non_blocking=True)
                done = self._stream.record_event()
                if target.flat.is_cuda and target.block is not None:
                    target.block.written(ours)
        except RuntimeError as error:
            raise _failed(what, source.flat.numel(), error) from error
        return _StreamCopy(done, self._device, target, source)


class _StreamCopy:
    __slots__ = ("_device", "_done", "_places")

    def __init__(self, done: torch.cuda.Event, device: torch.device, target: CopySide, source: CopySide) -> None:
        self._done = done
        self._device = device
        self._places: tuple[CopySide, CopySide] | None = (target, source)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)
        self._places = None

    def __del__(self) -> None:
        # Both sides go back to allocators that hand them out again in the order of the step's stream.
        if self._places is not None:
            with suppress(RuntimeError):
                self.wait()


def copies_for(device: torch.device) -> Copies:
    """Who copies between `device` and the host."""
    return CopyStream(device) if device.type == "cuda" else CopyThread()


def _failed(what: str, nbytes: int, error: BaseException) -> OffloadFailed:
    return OffloadFailed(
        f"the copy of {format_bytes(nbytes)} of {what} failed: {error or type(error).__name__}; the step was given up, and "
        "nothing of it is held here or on the host. Run it again, or plan without host_budget"
    )
