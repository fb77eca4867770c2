"""The pytest fixture `hostcuda`: real CuPy over host memory, with the controls of the stand-in."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hostcuda import loader

CAPACITY_BYTES = 1 << 30


class HostCuda:
    """CuPy (`.cupy`) on two devices of host memory, and what a test may do to them. Sizes in bytes."""

    def __init__(self, cupy: Any, library: str) -> None:
        self.cupy = cupy
        self._c = ctypes.CDLL(library)
        self._c.hostcuda_used.restype = ctypes.c_size_t
        self._c.hostcuda_peak.restype = ctypes.c_size_t
        self._c.hostcuda_pinned.restype = ctypes.c_size_t
        self._c.hostcuda_waits.restype = ctypes.c_long

    def set_capacity(self, nbytes: int, device: int = 0) -> None:
        self._c.hostcuda_set_capacity(ctypes.c_int(device), ctypes.c_size_t(nbytes))

    def used_bytes(self, device: int = 0) -> int:
        return self._c.hostcuda_used(ctypes.c_int(device))

    def peak_bytes(self, device: int = 0) -> int:
        return self._c.hostcuda_peak(ctypes.c_int(device))

    def pinned_bytes(self) -> int:
        return self._c.hostcuda_pinned()

    def reset_peak(self) -> None:
        self._c.hostcuda_reset_peak()

    def fail_allocation(self, n: int) -> None:
        """The n-th cudaMalloc or cudaHostAlloc from now on fails (0: the next one, -1: none)."""
        self._c.hostcuda_fail_allocation(ctypes.c_long(n))

    def hold_stream(self, stream: Any) -> None:
        """What is recorded on `stream` from now on stays incomplete until `release_stream` or somebody waits for it."""
        self._c.hostcuda_hold_stream(ctypes.c_size_t(stream.ptr))

    def release_stream(self, stream: Any) -> None:
        self._c.hostcuda_release_stream(ctypes.c_size_t(stream.ptr))

    def waits(self, waiter: Any, source: Any) -> int:
        """How often the stream `waiter` was told to wait for work on the stream `source`."""
        return self._c.hostcuda_waits(ctypes.c_size_t(waiter.ptr), ctypes.c_size_t(source.ptr))

    @contextlib.contextmanager
    def capturing(self, stream: Any) -> Iterator[None]:
        """Meanwhile `stream` says that it is captured into a CUDA graph."""
        self._c.hostcuda_capture(ctypes.c_size_t(stream.ptr), 1)
        yield
        self._c.hostcuda_capture(ctypes.c_size_t(stream.ptr), 0)

    def reset(self) -> None:
        gc.collect()
        self.fail_allocation(-1)
        self.cupy.cuda.Device(0).use()
        for device in (0, 1):
            self.set_capacity(CAPACITY_BYTES, device)
        self.cupy.get_default_memory_pool().free_all_blocks()
        self.reset_peak()


@pytest.fixture(scope="session")
def _hostcuda_runtime() -> HostCuda:
    finder = loader.install()
    reason = finder.why_not
    if reason is None:
        try:
            import cupy
        except ImportError as error:
            reason = f"CuPy cannot be imported: {error}"
        else:
            reason = finder.why_not
    if reason is not None:
        message = f"CuPy's pools cannot be tested over host memory here: {reason}"
        if os.environ.get("CI") == "true" and not loader.real_device_present():
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    loader.guard(cupy)
    return HostCuda(cupy, str(finder.module))


@pytest.fixture
def hostcuda(_hostcuda_runtime: HostCuda) -> Iterator[HostCuda]:
    """CuPy over host memory; skipped with the reason where it cannot be built, an error in CI."""
    _hostcuda_runtime.reset()
    yield _hostcuda_runtime
    _hostcuda_runtime.reset()
