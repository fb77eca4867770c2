"""Reduced precision storage: really fewer bytes, and errors within the documented bound."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from gpuckpt.errors import BackendUnavailable
from gpuckpt.segments.storage import STORAGE_FORMATS, pack, storage_format, unpack

NAMES = tuple(STORAGE_FORMATS)


@pytest.mark.parametrize("name", NAMES)
def test_the_formats_are_what_ml_dtypes_says(name: str) -> None:
    info, fmt = ml_dtypes.finfo(name), STORAGE_FORMATS[name]
    assert fmt.largest == float(info.max)
    assert fmt.smallest == float(info.smallest_subnormal)
    assert fmt.roundoff == 2.0 ** -(info.nmant + 1)
    assert fmt.nbytes * 8 == info.bits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_errors_stay_within_the_bound_at_every_scale(lib: Any, name: str, dtype: str, scale: float) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(4000) * 10.0 ** rng.uniform(-6, 0, 4000) * scale).astype(dtype)
    fmt = STORAGE_FORMATS[name]
    packed = pack(lib.array(x, dtype), fmt)
    assert packed.bits.nbytes == x.size * fmt.nbytes
    back = lib.numpy(unpack(packed, packed.bits))
    assert back.dtype == x.dtype
    bound = fmt.error_bound(np.abs(x).astype("float64"), float(np.abs(x).max()))
    # torch rounds float64 by way of float32: one more rounding, of 2^-24.
    assert np.all(np.abs(back.astype("float64") - x) <= bound * (1 + 2.0**-12))
    assert np.abs(back.astype("float64") - x).max() > bound.max() / 100, (
        "a bound that is never approached proves nothing"
    )


@pytest.mark.parametrize("name", NAMES)
def test_both_libraries_store_the_same_bits(name: str) -> None:
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    ours, theirs = (pack(a, STORAGE_FORMATS[name]) for a in (x, torch.from_numpy(x)))
    np.testing.assert_array_equal(ours.bits, theirs.bits.numpy())
    assert ours.exponent == theirs.exponent


@pytest.mark.parametrize("name", NAMES)
def test_zeros_extremes_and_what_is_not_finite(lib: Any, name: str) -> None:
    fmt = STORAGE_FORMATS[name]

    def there_and_back(values: list[float]) -> np.ndarray:
        packed = pack(lib.array(values), fmt)
        return lib.numpy(unpack(packed, packed.bits))

    np.testing.assert_array_equal(there_and_back([0.0, 0.0]), [0, 0])
    assert there_and_back([]).shape == (0,)
    largest = float(np.finfo(np.float32).max)
    assert np.all(np.isfinite(there_and_back([largest, -largest, 1.0])))
    odd = there_and_back([np.nan, np.inf, -np.inf, 1.0])
    assert np.isnan(odd[0])
    assert odd[3] == 1.0, "what is not finite does not spoil its neighbours"
    if name == "float8_e4m3fn":
        assert np.isnan(odd[1:3]).all()
    else:
        np.testing.assert_array_equal(odd[1:3], [np.inf, -np.inf])
    np.testing.assert_array_equal(there_and_back([2.0**-140, -(2.0**-141)]), [2.0**-140, -(2.0**-141)])


def test_what_would_not_shrink_is_kept_as_it_is(lib: Any) -> None:
    for array in (lib.array([1, 2], "int64"), lib.array([1.5], "float16"), lib.array([True], "bool")):
        packed = pack(array, STORAGE_FORMATS["float16"])
        assert packed.bits is array
        assert unpack(packed, packed.bits) is array
    bf16 = torch.ones(3, dtype=torch.bfloat16)
    assert pack(bf16, STORAGE_FORMATS["float8_e5m2"]).bits.nbytes == 3


def test_names_and_dtypes() -> None:
    assert storage_format(None) is None
    for given in ("bfloat16", torch.bfloat16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert storage_format(given) is STORAGE_FORMATS["bfloat16"]
    for given in (np.float16, torch.float16):
        assert storage_format(given) is STORAGE_FORMATS["float16"]
    for given in ("float32", torch.float64, "half", 3, np.int8):
        with pytest.raises(ValueError, match="storage_dtype"):
            storage_format(given)


def test_without_ml_dtypes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(BackendUnavailable, match="pip install ml_dtypes"):
        pack(np.ones(2, np.float32), STORAGE_FORMATS["bfloat16"])
    assert pack(np.ones(2, np.float32), STORAGE_FORMATS["float16"]).bits.nbytes == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CuPy's arithmetic needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cupy_stores_the_same_bits(name: str) -> None:
    import cupy

    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    ours, theirs = pack(x, STORAGE_FORMATS[name]), pack(cupy.asarray(x), STORAGE_FORMATS[name])
    np.testing.assert_array_equal(ours.bits, theirs.bits.get())
    np.testing.assert_array_equal(unpack(ours, ours.bits), unpack(theirs, theirs.bits).get())
