"""Writing an array into a pool's block, and looking at it there again: one function for each array library.

Each returns a `load` function: called, it gives a fresh zero-copy view onto the block, of the same library, shape and dtype as
the array that was written. The view, and whatever is made from it without copying, keeps the block alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuckpt.memory.arrays import Layout, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Take = Callable[[int], Any]
    Load = Callable[[], Any]

__all__ = ["store_numpy", "store_torch_cpu"]


def store_numpy(array: np.ndarray[Any, Any], take: Take) -> tuple[Any, Load]:
    """Copy a NumPy array into a block of `take(nbytes)`. Returns the block and its `load`."""
    dtype = array.dtype
    if dtype.hasobject:
        raise TypeError(f"an array of dtype {dtype} holds Python objects, not bytes; a budget cannot hold it")
    layout = _byte_layout(array.shape, array.strides, dtype.itemsize)
    block = take(layout.size * dtype.itemsize)
    strides = tuple(stride * dtype.itemsize for stride in layout.strides)
    view: np.ndarray[Any, Any] = np.ndarray(layout.stored_shape, dtype, np.asarray(block), strides=strides)
    np.copyto(view, array[layout.stored])

    def load() -> np.ndarray[Any, Any]:
        return np.broadcast_to(view, layout.shape) if layout.expanded else view.view()

    return block, load


def store_torch_cpu(tensor: Any, take: Take) -> tuple[Any, Load]:
    """Copy a strided torch CPU tensor into a block of `take(nbytes)`. Returns the block and its `load`."""
    import torch

    refuse_unstrided(tensor)
    layout = layout_of(tuple(tensor.shape), tuple(tensor.stride()))
    block = take(layout.size * tensor.element_size())
    stored = torch.from_numpy(np.asarray(block)).view(tensor.dtype).as_strided(layout.stored_shape, layout.strides)
    source = tensor.detach()
    stored.copy_(source[layout.stored] if layout.expanded else source)

    def load() -> torch.Tensor:
        return stored.expand(layout.shape) if layout.expanded else stored.detach()

    return block, load


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


def _byte_layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Layout:
    """The layout for strides in bytes. Strides that are no whole number of elements make the array one with gaps."""
    if itemsize and all(stride % itemsize == 0 for stride in strides):
        return layout_of(shape, tuple(stride // itemsize for stride in strides))
    return layout_of(shape, tuple(-1 for _ in shape))
