"""CuPy arrays in a pool's block. Imported when the first CuPy array or CUDA block appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt.memory.adapters.inspect import byte_layout
from gpuckpt.memory.adapters.numpy import storage_dtype
from gpuckpt.memory.pools.cupy import import_cupy
from gpuckpt.memory.protocols import STORAGE_BYTES

__all__ = ["CupyForm", "flat_array"]


class CupyForm:
    """A CuPy array on one device."""

    def __init__(self, array: Any) -> None:
        self.dtype = array.dtype
        self.layout = byte_layout(tuple(array.shape), tuple(array.strides), array.itemsize)
        self.nbytes = self.layout.size * array.itemsize

    def write(self, array: Any, block: Any) -> Any:
        stored, source = self.stored(block), array[self.layout.stored]
        stream = (
            import_cupy().cuda.get_current_stream()
        )  # on which the array is valid, and perhaps not on the block's own
        block.writing_on(stream)
        ours, theirs = stored.flags, source.flags
        if stored.size and ((ours.c_contiguous and theirs.c_contiguous) or (ours.f_contiguous and theirs.f_contiguous)):
            # Both dense and in the same order: a plain copy of the bytes, without a kernel.
            stored.data.copy_from_device_async(source.data, self.nbytes, stream)
        elif stored.size:
            stored[...] = source
        block.written(stream)
        return stored

    def view(self, block: Any) -> Any:
        return self.restored(self.stored(block), block)

    def restored(self, stored: Any, block: Any) -> Any:
        cupy = import_cupy()
        block.used_on(cupy.cuda.get_current_stream())
        return cupy.broadcast_to(stored, self.layout.shape) if self.layout.expanded else stored.view()

    def stored(self, block: Any) -> Any:
        strides = tuple(stride * self.dtype.itemsize for stride in self.layout.strides)
        return import_cupy().ndarray(self.layout.stored_shape, self.dtype, memptr=block.pointer(), strides=strides)

    def shrunk(self, block: Any, dtype: str) -> Any:
        array = self.stored(block)
        if array.dtype.kind != "f" or array.itemsize <= STORAGE_BYTES[dtype]:
            return None
        cupy = import_cupy()
        block.reading_on(cupy.cuda.get_current_stream())
        with np.errstate(over="ignore"):
            small = array.astype(storage_dtype(dtype))
        return small if bool((cupy.isfinite(small.astype(array.dtype)) == cupy.isfinite(array)).all()) else None

    def grown(self, small: Any) -> Any:
        full = small.astype(self.dtype)
        return import_cupy().broadcast_to(full, self.layout.shape) if self.layout.expanded else full

    def to_host(self, array: Any) -> tuple[Any, Callable[[Any], Any]]:
        device = array.device

        def back(kept: Any) -> Any:
            with device:
                return import_cupy().asarray(kept)

        return array.get(), back


def flat_array(block: Any) -> Any:
    """The bytes of a CUDA block as a one-dimensional uint8 CuPy array."""
    return import_cupy().ndarray((block.nbytes,), "u1", memptr=block.pointer())
