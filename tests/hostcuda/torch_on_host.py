"""The pytest fixture `cuda_tensors`: torch's CPU tensors say that they are on CuPy's stand-in device, and streams take notes.

A build of torch without CUDA makes no CUDA tensor, so no branch on `is_cuda` would ever run without a GPU. Here `is_cuda` is
true of every tensor whose bytes do not lie in a host budget's pool; torch's current stream is one of the stand-in's; and
`torch.from_dlpack` looks at a block through its address, which is host memory. What is real: CuPy's pool, streams and events,
torch's arithmetic and autograd. What is not: that work on streams overlaps, and `tensor.device`, which goes on saying "cpu".
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.memory import budget as budgets
from gpuckpt.memory.pools import host
from gpuckpt.memory.pools.cupy import CupyPool
from gpuckpt.pytorch.engine.storage_index import index_of
from tests.hostcuda.fixture import HostCuda


class _Exporter:
    """A CuPy array of the stand-in as NumPy sees host memory."""

    def __init__(self, array: Any) -> None:
        self.array = array
        data = (array.data.ptr, False)
        self.__array_interface__ = {"data": data, "shape": (array.nbytes,), "typestr": "|u1", "version": 3}


class TorchStream:
    """What torch's streams have that is asked of them."""

    device_index = 0

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.cuda_stream: int = stream.ptr


class CudaTensors:
    """`stream()` makes another stream, `on(stream)` makes it torch's current one; `taken`: the streams that blocks were taken on,
    by address; `budget(...)` makes a budget on the device that copies tensors into its pool; `told_yes`: the lines (file, number)
    that asked a tensor whether `is_cuda` and heard yes."""

    def __init__(self, hostcuda: HostCuda) -> None:
        self.hostcuda = hostcuda
        self.cupy = hostcuda.cupy
        self.default = TorchStream(self.cupy.cuda.Stream.null)
        self.taken: list[int] = []
        self.synchronized = 0
        self.host_ranges: list[tuple[int, int]] = []
        self.told_yes: set[tuple[str, int]] = set()
        self._local = threading.local()

    def stream(self) -> TorchStream:
        return TorchStream(self.cupy.cuda.Stream(non_blocking=True))

    @contextlib.contextmanager
    def on(self, stream: TorchStream) -> Iterator[None]:
        before = self.current()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def current(self, device: Any = None) -> TorchStream:
        return getattr(self._local, "stream", self.default)

    def budget(self, size: int | str, **options: Any) -> CheckpointBudget:
        made = CheckpointBudget(size, device="cuda:0", **{"hold": "pool", **options})
        if made.hold == "pool":
            index_of(made)._copies_on = torch.device("cpu")
        return made

    def is_cuda(self, tensor: torch.Tensor) -> bool:
        try:
            address = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # no storage of its own: sparse, fake
            return False
        if any(first <= address < last for first, last in self.host_ranges):
            return False
        asking = sys._getframe(1)
        self.told_yes.add((asking.f_code.co_filename, asking.f_lineno))
        return True

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1

    def aligned_buffer(self, nbytes: int) -> Any:
        buffer = _aligned_buffer(nbytes)
        first = buffer.__array_interface__["data"][0]
        self.host_ranges.append((first, first + max(nbytes, 1)))
        return buffer

    def from_dlpack(self, array: Any) -> torch.Tensor:
        if isinstance(array, self.cupy.ndarray):
            return torch.from_numpy(np.asarray(_Exporter(array)))
        return _from_dlpack(array)


_aligned_buffer = host.aligned_buffer
_from_dlpack = torch.from_dlpack
_device_of = budgets.device_of


@pytest.fixture
def cuda_tensors(hostcuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaTensors]:
    """torch on the stand-in device; kernels stay with torch (`tests.drivercuda` launches them). Lines that heard yes are added to
    the file that GPUCKPT_TOLD_YES names."""
    made = CudaTensors(hostcuda)
    take = CupyPool.take

    def noted(pool: CupyPool, nbytes: int, **options: Any) -> Any:
        block = take(pool, nbytes, **options)
        made.taken.append(block.stream.ptr)
        return block

    def device_of(array: Any, library: str) -> str:
        return "cuda:0" if library == "torch" and array.is_cuda else _device_of(array, library)

    monkeypatch.setenv("GPUCKPT_BACKEND", "torch")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(made.is_cuda), raising=False)
    monkeypatch.setattr(torch, "from_dlpack", made.from_dlpack)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(host, "aligned_buffer", made.aligned_buffer)
    monkeypatch.setattr(budgets, "device_of", device_of)
    monkeypatch.setattr(CupyPool, "take", noted)
    monkeypatch.setattr("gpuckpt.memory.pools.cupy._torch_streams", {})
    yield made
    if notes := os.environ.get("GPUCKPT_TOLD_YES"):
        with open(notes, "a", encoding="utf-8") as file:
            file.writelines(f"{name}:{line}\n" for name, line in sorted(made.told_yes))
