"""Arrays of NumPy, torch and CuPy by one code path.

`as_array` is the door: what enters is an array of one of the three libraries, without an autograd graph behind it. Arrays
of other libraries come in through DLPack without a copy, lists become float32 NumPy arrays. Behind the door everything is
written against the array API, through array-api-compat, which looks at arrays and imports no library that is not in use.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from gpuckpt.checks import shown
from gpuckpt.errors import BackendUnavailable, DimMismatch, DLPackRefused
from gpuckpt.memory.adapters.inspect import device_of, library_of
from gpuckpt.memory.dlpack import exchange

try:
    import array_api_compat as compat
except ImportError as error:
    raise BackendUnavailable(
        "gpuckpt.segments needs the package array-api-compat (pip install array-api-compat); "
        "checkpoint, fit, budgets and the fused operations do without it"
    ) from error

__all__ = ["Array", "as_array", "check_last_dim", "compat", "like_array", "matching", "nbytes", "place_of"]

Array = Any
"""An array of NumPy, torch or CuPy. Their union cannot be named without importing all three."""


def as_array(value: Any, name: str = "the array") -> Array:
    """`value` as an array of NumPy, torch or CuPy: itself where it is one, detached from autograd where it is torch's.

    Other arrays are viewed through DLPack: by NumPy where they lie in host memory, by CuPy where they lie on a CUDA device.
    Numbers and (nested) lists become float32 NumPy arrays. Raises `DLPackRefused` for arrays on any other device, and for
    what DLPack cannot carry without a copy; `TypeError`, with `name`, for what is no array, and for arrays of Python objects
    and sparse ones, whose bytes are not those of their elements.
    """
    if isinstance(value, np.generic):
        value = np.asarray(value)
    elif isinstance(value, int | float | list | tuple):
        return _numbers(value, name)
    try:
        library = library_of(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    if library == "torch":
        if value.layout is not sys.modules["torch"].strided:
            raise TypeError(f"{name} is a tensor of layout {value.layout}; expected a dense one")
        return value.detach()
    if library != "dlpack":
        if value.dtype.hasobject:
            raise TypeError(f"{name} is an array of Python objects; expected one of numbers")
        return value
    device = device_of(value, library)
    if device == "cpu":
        return exchange(value, "numpy")
    if device.startswith("cuda"):
        return exchange(value, "cupy")
    raise DLPackRefused(
        f"an array of {type(value).__module__}.{type(value).__name__} lies on {device}; "
        "only host memory and CUDA devices are known: copy it there first"
    )


def _numbers(value: Any, name: str) -> Array:
    try:
        with np.errstate(over="raise"):  # a number that is too large would become an infinity
            return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # the last: an entry is a tensor
        raise TypeError(
            f"{name} is {shown(value)}; expected an array, or numbers in lists of equal lengths: {error}"
        ) from None


def nbytes(array: Array) -> int:
    """Bytes of the array's elements."""
    return int(array.nbytes)


def like_array(value: Array, like: Array | None) -> Array:
    """`value` in the library, on the device and in the floating dtype of `like`; unchanged where `like` is None."""
    value = as_array(value)
    if like is None:
        return value
    like = as_array(like, "like")
    xp = compat.array_namespace(like)
    if place_of(value) != place_of(like):
        host = value if library_of(value) == "numpy" else np.asarray(compat.to_device(value, "cpu"))
        value = xp.asarray(host, device=compat.device(like))
    return xp.astype(value, like.dtype, copy=False) if xp.isdtype(like.dtype, "real floating") else value


def place_of(array: Array) -> str:
    """Library and device of the array, as "numpy on cpu"."""
    library = library_of(array)
    return f"{library} on {device_of(array, library)}"


def matching(value: Any, own: Array, what: str) -> Array:
    """`value` as an array that can meet `own` in arithmetic. Lists take `own`'s library, device and dtype.

    Raises `TypeError` where libraries or devices differ: arrays are never moved behind the caller's back.
    """
    if isinstance(value, int | float | list | tuple):
        return like_array(_numbers(value, what), own)
    array = as_array(value, what)
    if place_of(array) != place_of(own):
        raise TypeError(
            f"{what} is {place_of(array)}, the weights are {place_of(own)}; "
            "build the layer with like=<an input>, or move one of them"
        )
    return array


def check_last_dim(array: Array, expected: int, what: str) -> None:
    """Raise `DimMismatch` unless the last dimension of `array` is `expected`. A 0-d array counts as having none (0)."""
    got = int(array.shape[-1]) if array.ndim else 0
    if got != expected:
        raise DimMismatch(expected, got, what)
