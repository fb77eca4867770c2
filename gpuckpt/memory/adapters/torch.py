"""Torch tensors in a pool's block. Loaded when the first tensor appears: who uses a tensor has loaded torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpuckpt.memory.adapters.inspect import Layout, layout_of
from gpuckpt.memory.pools.cupy import import_cupy, torch_stream
from gpuckpt.memory.protocols import STORAGE_BYTES

__all__ = ["TorchForm", "bytes_of", "torch_allocator"]

_CUDA_ERROR_MEMORY_ALLOCATION = 2  # CuPy does not name it for Python


class TorchForm:
    """A strided torch tensor, on the CPU or on a CUDA device. Views come back detached."""

    def __init__(self, tensor: Any) -> None:
        refuse_unstrided(tensor)
        self.dtype = tensor.dtype
        shape, strides = tuple(tensor.shape), tensor.stride()
        # What most tensors are, without looking at every dimension.
        self.layout = Layout(shape, shape, strides) if tensor.is_contiguous() else layout_of(shape, strides)
        self.nbytes = self.layout.size * tensor.element_size()

    def write(self, tensor: Any, block: Any) -> Any:
        source, stored = tensor.detach(), self.stored(block)
        # Where the block is counts, not where the bytes come from.
        stream = torch_stream(stored.device) if stored.is_cuda else None
        if stream is not None:
            block.writing_on(stream)
        # copy_ resolves the conjugate and negative bits: the block holds plain values.
        stored.copy_(source[self.layout.stored] if self.layout.expanded else source)
        if stream is not None:
            block.written(stream)
        return stored

    def view(self, block: Any) -> Any:
        return self.restored(self.stored(block), block)

    def restored(self, stored: Any, block: Any) -> Any:
        if stored.is_cuda:
            block.used_on(torch_stream(stored.device))
        return stored.expand(self.layout.shape) if self.layout.expanded else stored.detach()

    def stored(self, block: Any) -> Any:
        return bytes_of(block).view(self.dtype).as_strided(self.layout.stored_shape, self.layout.strides)

    def shrunk(self, block: Any, dtype: str) -> Any:
        tensor = self.stored(block)
        if not tensor.is_floating_point() or tensor.element_size() <= STORAGE_BYTES[dtype]:
            return None
        if tensor.is_cuda:
            block.reading_on(torch_stream(tensor.device))
        small = tensor.to(getattr(torch, dtype))
        return small if torch.equal(torch.isfinite(small.float()), torch.isfinite(tensor)) else None

    def grown(self, small: Any) -> Any:
        full = small.to(self.dtype)
        return full.expand(self.layout.shape) if self.layout.expanded else full

    def to_host(self, tensor: Any) -> tuple[Any, Callable[[Any], Any]]:
        device = tensor.device
        return tensor.detach().cpu(), lambda kept: kept.to(device, copy=True)


def bytes_of(block: Any) -> Any:
    """The bytes of a pool's block as a flat uint8 tensor."""
    if hasattr(block, "__array_interface__"):
        return torch.from_numpy(np.asarray(block))
    from gpuckpt.memory.adapters.cupy import flat_array

    flat = torch.from_dlpack(flat_array(block))
    # CuPy's empty arrays have strides of 0, which torch views as no other dtype.
    return flat if block.nbytes else flat.as_strided((0,), (1,))


def refuse_unstrided(tensor: Any) -> None:
    """Raise `TypeError` for a torch tensor whose bytes are not one strided run: sparse, quantized, nested, meta, wrapped."""
    kind = None
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    elif tensor.is_quantized:
        kind = "quantized"
    elif tensor.is_meta:
        kind = "meta"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = type(tensor).__name__
    if kind is not None:
        raise TypeError(
            f"a {kind} tensor has no single strided memory that a pool could hold; "
            'save its parts, or use a budget with hold="account"'
        )


def torch_allocator() -> Any:
    """An allocator for `CupyPool` that draws from torch's caching allocator, so that one allocator owns the device.

    torch's out-of-memory error becomes CUDA's, upon which CuPy's pool gives back what it caches and tries again.
    """
    cuda = import_cupy().cuda

    def malloc(nbytes: int, device_id: int) -> int:
        stream = cuda.get_current_stream().ptr
        try:
            return int(torch.cuda.caching_allocator_alloc(nbytes, device_id, stream))
        except torch.OutOfMemoryError:
            status = _CUDA_ERROR_MEMORY_ALLOCATION
        # Outside the handler: CuPy retries, and torch's traceback would keep its buffers alive meanwhile.
        raise cuda.runtime.CUDARuntimeError(status)

    def free(address: int, device_id: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    return cuda.PythonFunctionAllocator(malloc, free).malloc
