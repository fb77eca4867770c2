"""The same memory as another library's array: zero-copy, or a refusal that names the reason.

Libraries disagree in silence about what DLPack can carry. Checked by reading their sources and by running them (torch 2.13,
CuPy 14.2, NumPy 2.4): torch drops the negative bit of a tensor, CuPy exports negative strides wrongly, NumPy has no bfloat16
and no float8, torch has no read-only memory, XLA copies what is not aligned. Each of these is refused here, by name. Streams
are negotiated by the objects themselves (`__dlpack__(stream=...)`); a bare capsule negotiates none and is refused.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from gpuckpt.checks import check_choice
from gpuckpt.errors import BackendUnavailable, DLPackRefused
from gpuckpt.memory.adapters.inspect import device_of, library_of

__all__ = ["exchange"]

_LIBRARIES = ("numpy", "torch", "cupy", "jax")


def exchange(array: Any, library: str) -> Any:
    """`array` (NumPy, torch, CuPy, JAX, any DLPack exporter) as an array of `library`: "numpy", "torch", "cupy" or "jax".

    Both look at the same bytes, and either keeps them alive after `del` of the other. JAX arrays are immutable to JAX only: do
    not write through another library's view of one. Raises `DLPackRefused` where that takes
    a copy or loses something, `BackendUnavailable` where the library is not installed.

    >>> import numpy as np, torch
    >>> tensor = exchange(np.arange(3.0), "torch")
    >>> tensor
    tensor([0., 1., 2.], dtype=torch.float64)
    """
    check_choice(library, "library", _LIBRARIES)
    if type(array).__name__ == "PyCapsule":
        raise DLPackRefused("a bare DLPack capsule negotiates no stream; pass the array itself")
    source = _library_of(array)
    if source == library:
        return array
    if source == "torch":
        _check_torch(array, library)
    elif source == "numpy":
        _check_numpy(array, library)
    elif source == "cupy":
        _check_cupy(array)
    device = device_of(array, "torch" if source == "torch" else "dlpack" if source == "jax" else source)
    if (library == "numpy") != (device == "cpu") and library in ("numpy", "cupy"):
        wanted = "host" if library == "numpy" else "CUDA"
        raise DLPackRefused(f"the array is on {device} and {library} takes {wanted} memory only; move it there first")
    imported = _import(array, library)
    here, there = _address(array, source), _address(imported, library)
    if here is not None and there is not None and here != there and 0 not in imported.shape:
        raise DLPackRefused(
            f"{library} copied the array instead of sharing it (alignment or layout it does not support)"
        )
    return imported


def _library_of(array: Any) -> str:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return "jax"
    return library_of(array)


def _check_torch(tensor: Any, library: str) -> None:
    import torch

    if tensor.layout is not torch.strided:
        raise DLPackRefused(f"a {tensor.layout} tensor has no strided memory; exchange its parts")
    if tensor.requires_grad:
        raise DLPackRefused("the tensor requires a gradient, which another library would not record; detach() it first")
    if tensor.is_conj():
        raise DLPackRefused("the tensor's conjugate bit is set, which DLPack cannot carry; resolve_conj() it first")
    if tensor.is_neg():
        raise DLPackRefused("the tensor's negative bit is set, which torch drops in silence; resolve_neg() it first")
    if library in ("numpy", "cupy") and (tensor.dtype is torch.bfloat16 or "float8" in str(tensor.dtype)):
        if library == "cupy" and tensor.dtype is torch.bfloat16 and _has_ml_dtypes():
            return
        raise DLPackRefused(
            f"{library} has no {str(tensor.dtype).removeprefix('torch.')}; exchange tensor.view(torch.uint8)"
        )


def _check_numpy(array: np.ndarray[Any, Any], library: str) -> None:
    if array.dtype.kind not in "biufc" or not array.dtype.isnative or array.dtype.itemsize > 16:
        raise DLPackRefused(f"dtype {array.dtype} cannot be exchanged through DLPack; exchange array.view(np.uint8)")
    if array.dtype == np.longdouble and np.dtype(np.longdouble).itemsize > 8:
        raise DLPackRefused(f"dtype {array.dtype} exists in no other library; convert it to float64")
    if any(stride % array.itemsize for stride in array.strides):
        raise DLPackRefused(
            f"strides {array.strides} are no multiples of the item size {array.itemsize}; copy the array"
        )
    if any(stride < 0 for stride in array.strides) and library == "torch":
        raise DLPackRefused(f"torch has no negative strides {array.strides}; copy the array, or flip it in torch")
    if not array.flags.writeable and library != "jax":
        raise DLPackRefused(f"the array is read-only and {library} would write to it in silence; copy it")


def _check_cupy(array: Any) -> None:
    if any(stride < 0 for stride in array.strides):
        raise DLPackRefused(f"CuPy exports negative strides {array.strides} wrongly (14.2); copy the array")
    if "float8" in str(array.dtype):
        raise DLPackRefused(f"CuPy cannot export {array.dtype}; exchange array.view('u1')")


def _import(array: Any, library: str) -> Any:
    try:
        if library == "numpy":
            return np.from_dlpack(array)
        if library == "torch":
            import torch

            return torch.from_dlpack(array)
        if library == "cupy":
            import cupy

            return cupy.from_dlpack(array)
        import jax

        return jax.numpy.from_dlpack(array, copy=False)
    except ImportError as error:
        raise BackendUnavailable(f"exchanging with {library} needs it installed: {error}") from error
    except (AssertionError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise DLPackRefused(f"{library} refuses this {type(array).__name__} without a copy: {error}") from error


def _address(array: Any, library: str) -> int | None:
    if library == "numpy":
        return int(array.__array_interface__["data"][0])
    if library == "torch":
        return int(array.data_ptr())
    if library == "cupy":
        return int(array.data.ptr)
    if library == "jax":
        return int(array.unsafe_buffer_pointer())
    return None


def _has_ml_dtypes() -> bool:
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return False
    return True
