"""Moving what a block holds: byte for byte to another block (spill), or into a smaller dtype (compress)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuckpt.errors import BackendUnavailable
from gpuckpt.memory.arrays import library_of
from gpuckpt.memory.forms import NumpyForm, TorchForm
from gpuckpt.memory.host_pool import HostBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuckpt.memory.budget import CheckpointBudget
    from gpuckpt.memory.ledger import Charge

__all__ = ["CompressedForm", "LooseBlock", "copy_bytes", "copy_to_host", "parse_storage_dtype"]

_STORAGE_BYTES = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


def copy_bytes(source: Any, target: Any) -> None:
    """Copy the bytes of one block into another of the same size, on the host or on a CUDA device, and wait for them."""
    if isinstance(source, HostBlock) and isinstance(target, HostBlock):
        np.copyto(np.asarray(target), np.asarray(source))
        return
    from gpuckpt.memory.cupy_form import flat_array

    if isinstance(source, HostBlock):
        flat_array(target).set(np.asarray(source), stream=target.stream)
        target.stream.synchronize()
        target.written()
    else:
        flat_array(source).get(stream=source.stream, out=np.asarray(target), blocking=True)


def copy_to_host(array: Any, budget: CheckpointBudget, what: str) -> tuple[Callable[[], Any], int]:
    """Save a copy of `array` in a host budget. Returns how to make the array again where it was, and its bytes there."""
    library = library_of(array)
    if library == "torch":
        device = array.device
        saved = budget.save(array.detach().cpu(), what)
        return lambda: saved.load().to(device, copy=True), array.numel() * array.element_size()
    if library == "cupy":
        device = array.device
        saved = budget.save(array.get(), what)

        def again() -> Any:
            from gpuckpt.memory.cupy_pool import import_cupy

            with device:
                return import_cupy().asarray(saved.load())

        return again, int(array.nbytes)
    saved = budget.save(array, what)
    # A DLPack exporter comes back as a view onto the second budget's block, which that budget goes on holding.
    return (lambda: saved.load().copy()) if library == "numpy" else saved.load, int(array.nbytes)


def parse_storage_dtype(name: Any) -> str | None:
    """The storage dtype for "compress", by its name. Raises `ValueError` for another."""
    if name is None:
        return None
    short = str(name).removeprefix("torch.")
    if short not in _STORAGE_BYTES:
        raise ValueError(f"storage_dtype must be one of {', '.join(_STORAGE_BYTES)} or None, got {name!r}")
    return short


class LooseBlock:
    """A compressed array that found no block of its own in the pool: charged, but held where it was made."""

    __slots__ = ("__weakref__", "array", "charge", "nbytes")
    foreign_readers = False

    def __init__(self, array: Any, nbytes: int, charge: Charge) -> None:
        self.array = array
        self.nbytes = nbytes
        self.charge: Charge | None = charge


class CompressedForm:
    """A floating-point array of some form, stored in a smaller dtype.

    Rounding is to nearest: a relative error of at most 2^-11 in float16, 2^-8 in bfloat16, 2^-4 in float8_e4m3fn and 2^-3
    in float8_e5m2 for values in the dtype's normal range, and an absolute one of half its smallest subnormal below that.
    """

    def __init__(self, array: Any, form: Any) -> None:
        self._array = array
        self._form = form
        self.nbytes: int = form.nbytes

    @classmethod
    def make(cls, form: Any, block: Any, storage_dtype: str | None) -> CompressedForm | None:
        """What `block` holds, in the smaller dtype; None where that saves nothing or would turn numbers into infinities."""
        if storage_dtype is None:
            return None
        if isinstance(form, TorchForm):
            import torch

            tensor = form.stored(block)
            if not tensor.is_floating_point() or tensor.element_size() <= _STORAGE_BYTES[storage_dtype]:
                return None
            small = tensor.to(getattr(torch, storage_dtype))
            kept = torch.equal(torch.isfinite(small.float()), torch.isfinite(tensor))
            return cls(small, TorchForm(small)) if kept else None
        if isinstance(form, NumpyForm) or type(form).__name__ == "CupyForm":
            array = form.stored(block)
            if array.dtype.kind != "f" or array.itemsize <= _STORAGE_BYTES[storage_dtype]:
                return None
            with np.errstate(over="ignore"):
                small = array.astype(_numpy_dtype(storage_dtype))
            kept = bool((np.isfinite(small.astype(array.dtype)) == np.isfinite(array)).all())
            return cls(small, type(form)(small)) if kept else None
        return None

    def store(self, block: Any) -> None:
        """Write the compressed array into its block and forget the copy of it."""
        self._form.write(self._array, block)
        self._array = None

    def loose(self, charge: Charge) -> LooseBlock:
        """The compressed array as its own block."""
        array, self._array = self._array, None
        return LooseBlock(array, self.nbytes, charge)

    def expand(self, form: Any, block: Any) -> Any:
        """The array in its own dtype and shape: a copy, outside the budget, as every output is before it is saved."""
        small = block.array if isinstance(block, LooseBlock) else self._form.view(block)
        layout = form.layout
        if isinstance(form, TorchForm):
            full = small.to(form.dtype)
            return full.expand(layout.shape) if layout.expanded else full
        full = small.astype(form.dtype)
        return np.broadcast_to(full, layout.shape) if layout.expanded else full


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendUnavailable(f"storing NumPy and CuPy arrays as {name} needs the package ml_dtypes") from error
    return np.dtype(getattr(ml_dtypes, name))
