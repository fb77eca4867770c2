"""What a budget needs to know about an array: its library, device, bytes, and how to lay it out in a block.

No array library is imported here before one of its arrays appears. Arrays of libraries this module does not know by name
are met through DLPack and `__array_namespace__` (JAX and whatever else follows the array API standard).
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Layout", "address_of", "byte_layout", "device_of", "layout_of", "library_of", "storage_bytes"]

_DLPACK_CPU = (1, 3)  # kDLCPU and kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged


def library_of(array: Any) -> str:
    """ "numpy", "torch", "cupy" or "dlpack" (any other array that exports itself). Raises `TypeError` for no array."""
    if isinstance(array, np.ndarray):
        return "numpy"
    for name, kind in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, kind)):
            return name
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return "dlpack"
    raise TypeError(
        f"an array was expected (NumPy, torch, CuPy, or one with __dlpack__), got {type(array).__name__}; "
        "save arrays one by one, and keep other values outside the budget"
    )


def device_of(array: Any, library: str) -> str:
    """The device as "cpu", "cuda:N", or the library's own name for another one."""
    if library == "numpy":
        return "cpu"
    if library == "torch":
        return "cpu" if array.is_cpu else str(array.device)
    if library == "cupy":
        return f"cuda:{array.device.id}"
    kind, index = array.__dlpack_device__()
    if kind in _DLPACK_CPU:
        return "cpu"
    return f"cuda:{index}" if kind in _DLPACK_CUDA else f"DLPack device type {int(kind)}"


def storage_bytes(array: Any, library: str) -> int:
    """Bytes that holding `array` keeps alive: of a view, those of the memory it looks into."""
    if library == "torch":
        try:
            return int(array.untyped_storage().nbytes())
        except NotImplementedError:
            raise TypeError(f"array is a {array.layout} tensor, which has no plain memory; save its parts") from None
    if library == "numpy":
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return max(owner.nbytes, array.nbytes if 0 not in array.strides else 0)
    if library == "cupy":
        return int(array.data.mem.size) if array.size else 0
    return int(array.nbytes)


def address_of(array: Any, library: str) -> int:
    """Where the memory begins that `array` lies in; 0 where that is not known."""
    if library == "torch":
        return int(array.untyped_storage().data_ptr()) if array.layout is sys.modules["torch"].strided else 0
    if library == "numpy":
        while isinstance(array.base, np.ndarray):
            array = array.base
        return int(array.__array_interface__["data"][0])
    if library == "cupy":
        return int(array.data.mem.ptr)
    return 0


class Layout(NamedTuple):
    """How an array lies in a block: its `shape`, what of it is stored, and the strides it is given back with.

    Dimensions that merely repeat (stride 0) are stored once and expanded again. A dense array keeps the order of its
    dimensions (channels-last stays channels-last); one with gaps is packed in C order. `strides` count elements.
    """

    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def expanded(self) -> bool:
        """True where `load()` has to repeat dimensions."""
        return self.shape != self.stored_shape

    @property
    def stored(self) -> tuple[slice, ...]:
        """The index that takes the stored part out of the array."""
        pairs = zip(self.shape, self.stored_shape, strict=True)
        return tuple(slice(None) if full == kept else slice(0, 1) for full, kept in pairs)

    @property
    def size(self) -> int:
        """Elements stored."""
        return math.prod(self.stored_shape)


def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    """The layout for an array of `shape` with `strides`, which count elements."""
    stored_shape = tuple(
        1 if stride == 0 and extent > 1 else extent for extent, stride in zip(shape, strides, strict=True)
    )
    packed = _c_strides(stored_shape)
    # Dense: going from the smallest stride up, each one is the number of elements below it.
    expected = 1
    for stride, extent in sorted((s, n) for s, n in zip(strides, stored_shape, strict=True) if n != 1):
        if stride != expected:
            return Layout(shape, stored_shape, packed)
        expected *= extent
    kept = tuple(p if extent == 1 else s for p, s, extent in zip(packed, strides, stored_shape, strict=True))
    return Layout(shape, stored_shape, kept)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def byte_layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Layout:
    """The layout for strides in bytes. Strides that are no whole number of elements make the array one with gaps."""
    if itemsize and all(stride % itemsize == 0 for stride in strides):
        return layout_of(shape, tuple(stride // itemsize for stride in strides))
    return layout_of(shape, tuple(-1 for _ in shape))
