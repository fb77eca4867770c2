"""Which tensors belong to the model, so that no budget charges them: parameters, their views, and what is declared so."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["is_resident", "mark_resident"]

Parameter = torch.nn.Parameter

_residents: dict[int, StorageWeakRef] = {}


def mark_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Declare that the storages of `tensors` belong to the model: no budget charges them. Forgotten when they die."""
    for key in [key for key, ref in list(_residents.items()) if ref.expired()]:
        del _residents[key]
    for tensor in (part for whole in tensors for part in parts_of(whole)):
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again, so a stale key cannot name another storage.
        _residents[storage._cdata] = StorageWeakRef(storage)


def is_resident(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` are a parameter's (or another resident's) and so are never charged."""
    if tensor.is_leaf and (tensor.requires_grad or _is_parameter(tensor)):
        return True
    # A view of a parameter. Under FakeTensorMode its storage is another object, and only `_base` tells.
    base = tensor._base
    if base is not None and base.is_leaf and (base.requires_grad or _is_parameter(base)):
        return True
    return bool(_residents) and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in _residents


def _is_parameter(tensor: torch.Tensor) -> bool:
    # Parameter's own instance check takes longer than all else that is asked of a saved tensor, and no plain tensor is one.
    return type(tensor) is not torch.Tensor and isinstance(tensor, Parameter)
