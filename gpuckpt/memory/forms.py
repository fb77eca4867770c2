"""The form of an array: what it takes to lay it into a pool's block and to look at it there again, for each library.

A form is made from an array and holds none of its bytes. `write` copies an array of this form into a block, `view` gives a
zero-copy array of the same library, shape and dtype over a block; views keep the block alive. The same form looks at any
block with those bytes, so an array can be moved between blocks (spilled and brought back) byte by byte.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from gpuckpt.errors import DLPackRefused
from gpuckpt.memory.arrays import Layout, layout_of

__all__ = ["DLPackForm", "Form", "NumpyForm", "TorchForm", "form_of"]


class Form(Protocol):
    """`nbytes`: what a block for it must hold."""

    nbytes: int

    def write(self, array: Any, block: Any) -> Any:
        """Copy `array` into `block`. Returns what `again` takes."""

    def view(self, block: Any) -> Any:
        """The array in `block`, without a copy."""

    def again(self, stored: Any, block: Any) -> Any:
        """As `view`, from what `write` returned: cheaper, as the view does not have to be built up from the bytes."""


def form_of(array: Any, library: str) -> Form:
    """The form of an array of `library` ("numpy", "torch", "cupy", "dlpack"). `TypeError` for what has no plain memory."""
    if library == "numpy":
        return NumpyForm(array)
    if library == "torch":
        return TorchForm(array)
    if library == "cupy":
        from gpuckpt.memory.cupy_form import CupyForm

        return CupyForm(array)
    return DLPackForm(array)


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
        return self.again(self.stored(block), block)

    def again(self, stored: np.ndarray[Any, Any], block: Any) -> np.ndarray[Any, Any]:
        return np.broadcast_to(stored, self.layout.shape) if self.layout.expanded else stored.view()

    def stored(self, block: Any) -> np.ndarray[Any, Any]:
        strides = tuple(stride * self.dtype.itemsize for stride in self.layout.strides)
        return np.ndarray(self.layout.stored_shape, self.dtype, np.asarray(block), strides=strides)


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
        # copy_ resolves the conjugate and negative bits: the block holds plain values.
        stored.copy_(source[self.layout.stored] if self.layout.expanded else source)
        if stored.is_cuda:  # where the block is, not where the bytes come from
            block.written()
        return stored

    def view(self, block: Any) -> Any:
        return self.again(self.stored(block), block)

    def again(self, stored: Any, block: Any) -> Any:
        if stored.is_cuda:
            from gpuckpt.memory.cupy_pool import current_stream, import_cupy

            block.used_on(current_stream(import_cupy().cuda, stored))
        return stored.expand(self.layout.shape) if self.layout.expanded else stored.detach()

    def stored(self, block: Any) -> Any:
        import torch

        if hasattr(block, "__array_interface__"):
            flat = torch.from_numpy(np.asarray(block))
        else:
            from gpuckpt.memory.cupy_form import flat_array

            flat = torch.from_dlpack(flat_array(block))
        return flat.view(self.dtype).as_strided(self.layout.stored_shape, self.layout.strides)


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

    def again(self, stored: Any, block: Any) -> Any:
        return self._from_dlpack(self._form.again(stored, block))


def _as_numpy(array: Any) -> np.ndarray[Any, Any]:
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise DLPackRefused(
            f"{type(array).__name__} of dtype {getattr(array, 'dtype', '?')} cannot be read without a copy: {error}; "
            "exchange its bytes (a uint8 view) instead"
        ) from error


def refuse_unstrided(tensor: Any) -> None:
    """Raise `TypeError` for a torch tensor whose bytes are not one strided run: sparse, quantized, nested, meta, wrapped."""
    import torch

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


def byte_layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Layout:
    """The layout for strides in bytes. Strides that are no whole number of elements make the array one with gaps."""
    if itemsize and all(stride % itemsize == 0 for stride in strides):
        return layout_of(shape, tuple(stride // itemsize for stride in strides))
    return layout_of(shape, tuple(-1 for _ in shape))
