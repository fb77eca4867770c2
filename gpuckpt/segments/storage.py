"""Activations in fewer bits: fp16, bf16 or fp8, with one power-of-two scale for each array.

The scale maps the largest finite element into the upper half of the format's range, so nothing overflows, and small
activations do not sink below the smallest number of the format. For finite elements

    |restored - x| <= unit_roundoff * |x| + max|x| * smallest_subnormal / largest

format          bytes   unit_roundoff   second term, of max|x|
float16         2       2^-11           2^-24 / 65504
bfloat16        2       2^-8            2^-133 / 3.4e38
float8_e4m3fn   1       2^-4            2^-9 / 448 = 4.4e-6
float8_e5m2     1       2^-3            2^-16 / 57344

NaN stays NaN. Infinities stay as they are, but for float8_e4m3fn, which has none: there they become NaN. Integers and
booleans, and arrays whose elements are no larger than the format's, are kept as they are.

What is kept is an array of plain integers (int16 or uint8), which every pool and exchange takes. Finding the scale reads the
array once and, on a CUDA device, waits for the result. CuPy has no fp8: its arrays go through a torch view of their memory.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuckpt.checks import shown
from gpuckpt.errors import BackendUnavailable
from gpuckpt.memory.adapters.inspect import library_of
from gpuckpt.memory.dlpack import exchange
from gpuckpt.segments.arrays import Array, compat
from gpuckpt.segments.fused import as_tensors

__all__ = ["STORAGE_FORMATS", "Packed", "StorageFormat", "pack", "storage_format", "unpack"]


@dataclass(frozen=True)
class StorageFormat:
    """A floating format. `largest` finite and `smallest` positive number, `roundoff` as a fraction, `nbytes` an element."""

    name: str
    nbytes: int
    largest: float
    smallest: float
    roundoff: float
    has_infinity: bool = True

    def error_bound(self, x: float, largest_x: float) -> float:
        """The largest error of an element of magnitude `x` in an array whose largest magnitude is `largest_x`."""
        return self.roundoff * x + largest_x * self.smallest / self.largest


STORAGE_FORMATS = {
    f.name: f
    for f in (
        StorageFormat("float16", 2, 65504.0, 2.0**-24, 2.0**-11),
        StorageFormat("bfloat16", 2, (2.0 - 2.0**-7) * 2.0**127, 2.0**-133, 2.0**-8),
        StorageFormat("float8_e4m3fn", 1, 448.0, 2.0**-9, 2.0**-4, has_infinity=False),
        StorageFormat("float8_e5m2", 1, 57344.0, 2.0**-16, 2.0**-3),
    )
}


@dataclass(frozen=True)
class Packed:
    """An array in fewer bits: `bits` as integers, x = bits * 2^exponent once read as `format`, back in `dtype`.

    format None: `bits` is the array itself.
    """

    bits: Array
    format: StorageFormat | None
    exponent: int
    dtype: Any


def storage_format(dtype: Any) -> StorageFormat | None:
    """The format meant by a name, a torch dtype or a NumPy dtype; None for None. Raises `ValueError` for any other."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in STORAGE_FORMATS and not isinstance(dtype, str):
        with contextlib.suppress(TypeError, ValueError):
            name = np.dtype(dtype).name
    if name not in STORAGE_FORMATS:
        raise ValueError(f"storage_dtype={shown(dtype)}: expected None or one of {', '.join(STORAGE_FORMATS)}")
    return STORAGE_FORMATS[name]


def pack(array: Array, fmt: StorageFormat | None) -> Packed:
    """`array` in `fmt`, in a copy; the array itself where `fmt` is None or would not make it smaller."""
    xp = compat.array_namespace(array)
    if fmt is None or not xp.isdtype(array.dtype, "real floating") or array.dtype.itemsize <= fmt.nbytes:
        return Packed(array, None, 0, array.dtype)
    exponent = _exponent(xp, array, fmt)
    scaled = _ldexp(xp, array, -exponent)
    if not fmt.has_infinity:
        # Libraries differ in what they make of an infinity here: some saturate, which would be a wrong number.
        scaled = xp.where(xp.isinf(scaled), xp.full_like(scaled, math.nan), scaled)
    return Packed(_to_bits(scaled, fmt), fmt, exponent, array.dtype)


def unpack(packed: Packed, bits: Array) -> Array:
    """The array whose `bits` (of the same library) were kept, in its own dtype. A new array, or `bits` where unpacked."""
    if packed.format is None:
        return bits
    array = _from_bits(bits, packed.format, packed.dtype)
    xp = compat.array_namespace(array)
    # Rounding may have lifted the largest elements above what the dtype can hold once they are scaled back.
    half = packed.exponent // 2
    largest = float(xp.finfo(array.dtype).max) * 2.0**-half * 2.0 ** (half - packed.exponent)
    if largest < packed.format.largest:
        array = xp.where(xp.isfinite(array), xp.clip(array, -largest, largest), array)
    return _ldexp(xp, array, packed.exponent)


def _ldexp(xp: Any, array: Array, exponent: int) -> Array:
    """array * 2^exponent, in steps whose factors the dtype can hold."""
    most = math.frexp(float(xp.finfo(array.dtype).max))[1] - 1
    while exponent:
        step = max(-most, min(most, exponent))
        array = array * 2.0**step
        exponent -= step
    return array


def _exponent(xp: Any, array: Array, fmt: StorageFormat) -> int:
    if math.prod(array.shape) == 0:
        return 0
    magnitude = xp.abs(array)
    largest = float(xp.max(xp.where(xp.isfinite(magnitude), magnitude, xp.zeros_like(magnitude))))
    if largest == 0.0:
        return 0
    # The smallest power of two that brings `largest` into range: ratio = m 2^e with 0.5 <= m < 1.
    mantissa, exponent = math.frexp(largest / fmt.largest)
    return exponent - 1 if mantissa == 0.5 else exponent


def _to_bits(array: Array, fmt: StorageFormat) -> Array:
    library = library_of(array)
    if library == "torch":
        import torch

        return array.to(getattr(torch, fmt.name)).view(torch.uint8 if fmt.nbytes == 1 else torch.int16)
    if library == "cupy" and fmt.nbytes == 1:
        return _through_torch(array, lambda t: _to_bits(t, fmt))
    return array.astype(_numpy_dtype(fmt)).view(np.uint8 if fmt.nbytes == 1 else np.int16)


def _from_bits(bits: Array, fmt: StorageFormat, dtype: Any) -> Array:
    library = library_of(bits)
    if library == "torch":
        import torch

        return bits.view(getattr(torch, fmt.name)).to(dtype)
    if library == "cupy" and fmt.nbytes == 1:
        import torch

        torch_dtype = getattr(torch, np.dtype(dtype).name)
        return _through_torch(bits, lambda t: _from_bits(t, fmt, torch_dtype))
    return bits.view(_numpy_dtype(fmt)).astype(dtype)


def _numpy_dtype(fmt: StorageFormat) -> np.dtype[Any]:
    if fmt.name == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendUnavailable(
            f"storing NumPy or CuPy arrays as {fmt.name} needs the package ml_dtypes: pip install ml_dtypes"
        ) from error
    return np.dtype(getattr(ml_dtypes, fmt.name))


def _through_torch(array: Array, convert: Any) -> Array:
    with as_tensors(array) as (tensor,):
        return exchange(convert(tensor), "cupy")
