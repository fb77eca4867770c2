"""Tensors that are more than a storage: which plain tensors hold their bytes, and what subclasses carry besides.

A wrapper (DTensor, a quantised weight) has its bytes in tensors inside of it. Other subclasses are tensors with attributes (a
scale, the variant of a mask), which neither `detach` nor autograd's saved tensors hand on.
"""

from __future__ import annotations

import torch

from gpuckpt.pytorch._torch_internals import is_wrapper

__all__ = ["Carried", "detached", "parts_of"]


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the bytes of `tensor`: itself, those of a sparse or nested one, or those inside of a wrapper,
    whose own storage has none. Raises `TypeError` for a layout that has no such parts."""
    layout = tensor.layout
    if layout is not torch.strided:
        with torch.no_grad():  # asking for the values of a nested tensor would save it
            return _parts_by_layout(tensor, layout)
    if type(tensor) is torch.Tensor or not is_wrapper(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inside = (getattr(tensor, name) for name in names)
    return [part for value in inside if isinstance(value, torch.Tensor) for part in parts_of(value)]


def _parts_by_layout(tensor: torch.Tensor, layout: torch.layout) -> list[torch.Tensor]:
    if layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if layout is torch.jagged:
        return [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]
    raise TypeError(f"a budget cannot hold a saved tensor of layout {layout}; convert it to a strided one")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its past, with all that it carries."""
    found = tensor.detach()
    if type(tensor) is not torch.Tensor and type(found) is type(tensor):
        for name, value in tensor.__dict__.items():
            found.__dict__.setdefault(name, value)
    return found


class Carried:
    """What a tensor is and carries besides its bytes; it keeps neither the tensor nor its past."""

    __slots__ = ("_attributes", "_kind")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._kind = type(tensor)
        inside = {id(part) for part in parts_of(tensor)}
        self._attributes = {name: value for name, value in tensor.__dict__.items() if id(value) not in inside}

    def by(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same bytes with it: `tensor`, as autograd gave it back."""
        if type(tensor) is not self._kind:
            tensor = tensor.as_subclass(self._kind)
        for name, value in self._attributes.items():
            tensor.__dict__.setdefault(name, value)
        return tensor
