"""Arrays of other libraries in a pool's block: JAX and whatever else follows the array API standard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt.errors import DLPackRefused
from gpuckpt.memory.adapters.numpy import NumpyForm

__all__ = ["DLPackForm"]


class DLPackForm:
    """An array of another library (JAX and whatever follows the array API standard) in host memory, through DLPack."""

    def __init__(self, array: Any) -> None:
        namespace = getattr(array, "__array_namespace__", None)
        if namespace is None:
            raise DLPackRefused(
                f"{type(array).__name__} exports itself but names no array namespace that could take it back; "
                "convert it to NumPy, torch or CuPy first"
            )
        self._from_dlpack = namespace().from_dlpack
        self._form = NumpyForm(_as_numpy(array))
        self.nbytes = self._form.nbytes

    def write(self, array: Any, block: Any) -> Any:
        return self._form.write(_as_numpy(array), block)

    def view(self, block: Any) -> Any:
        return self._from_dlpack(self._form.view(block))

    def restored(self, stored: Any, block: Any) -> Any:
        return self._from_dlpack(self._form.restored(stored, block))

    def shrunk(self, block: Any, dtype: str) -> Any:
        return None  # the standard has no smaller floating-point dtypes

    def grown(self, small: Any) -> Any:
        raise AssertionError("nothing is stored in a smaller dtype")

    def to_host(self, array: Any) -> tuple[Any, Callable[[Any], Any]]:
        return array, lambda kept: kept  # a view onto the block, which the budget goes on holding


def _as_numpy(array: Any) -> np.ndarray[Any, Any]:
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise DLPackRefused(
            f"{type(array).__name__} of dtype {getattr(array, 'dtype', '?')} cannot be read without a copy: {error}; "
            "exchange its bytes (a uint8 view) instead"
        ) from error
