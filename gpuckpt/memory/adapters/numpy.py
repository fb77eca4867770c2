"""NumPy arrays in a pool's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt.errors import BackendUnavailable
from gpuckpt.memory.adapters.inspect import byte_layout
from gpuckpt.memory.protocols import STORAGE_BYTES

__all__ = ["NumpyForm", "storage_dtype"]


class NumpyForm:
    """A NumPy array in host memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            raise TypeError(f"an array of dtype {array.dtype} holds Python objects, not bytes; a budget cannot hold it")
        self.dtype = array.dtype
        self.layout = byte_layout(array.shape, array.strides, array.itemsize)
        self.nbytes = self.layout.size * array.itemsize

    def write(self, array: np.ndarray[Any, Any], block: Any) -> np.ndarray[Any, Any]:
        stored = self.stored(block)
        np.copyto(stored, array[self.layout.stored])
        return stored

    def view(self, block: Any) -> np.ndarray[Any, Any]:
        return self.restored(self.stored(block), block)

    def restored(self, stored: np.ndarray[Any, Any], block: Any) -> np.ndarray[Any, Any]:
        return np.broadcast_to(stored, self.layout.shape) if self.layout.expanded else stored.view()

    def stored(self, block: Any) -> np.ndarray[Any, Any]:
        strides = tuple(stride * self.dtype.itemsize for stride in self.layout.strides)
        return np.ndarray(self.layout.stored_shape, self.dtype, np.asarray(block), strides=strides)

    def shrunk(self, block: Any, dtype: str) -> Any:
        array = self.stored(block)
        if array.dtype.kind != "f" or array.itemsize <= STORAGE_BYTES[dtype]:
            return None
        with np.errstate(over="ignore"):
            small = array.astype(storage_dtype(dtype))
        return small if bool((np.isfinite(small.astype(array.dtype)) == np.isfinite(array)).all()) else None

    def grown(self, small: Any) -> Any:
        full = small.astype(self.dtype)
        return np.broadcast_to(full, self.layout.shape) if self.layout.expanded else full

    def to_host(self, array: np.ndarray[Any, Any]) -> tuple[Any, Callable[[Any], Any]]:
        return array, lambda kept: kept.copy()


def storage_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype for a smaller one to store in. Raises `BackendUnavailable` where a package is needed for it."""
    if name == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendUnavailable(f"storing NumPy and CuPy arrays as {name} needs the package ml_dtypes") from error
    return np.dtype(getattr(ml_dtypes, name))
