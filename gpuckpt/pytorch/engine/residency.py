"""Which tensors belong to the model, so that no budget charges them: parameters, their views, and what is declared so; and what
belongs to the caller, who keeps a whole data set alive anyway, of which a model is given a slice."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = [
    "charged_bytes",
    "is_copied",
    "is_given",
    "is_movable",
    "is_resident",
    "mark_computed",
    "mark_given",
    "mark_resident",
]

Parameter = torch.nn.Parameter

_residents: dict[int, StorageWeakRef] = {}
_computed: dict[int, StorageWeakRef] = {}
_given: dict[int, tuple[StorageWeakRef, int]] = {}


def mark_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Declare that the storages of `tensors` belong to the model: no budget charges them. Forgotten when they die."""
    _purge(_residents)
    for tensor in (part for whole in tensors for part in parts_of(whole)):
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again, so a stale key cannot name another storage.
        _residents[storage._cdata] = StorageWeakRef(storage)


def mark_computed(values: Iterable[Any], given: Container[int]) -> None:
    """Declare that the tensors among `values` that look like trained leaves were made by a forward, which called
    `requires_grad_()` on them (as is done for adapters over frozen embeddings): budgets charge them. `given`: ids of those that
    the caller trains."""
    for value in values:
        if type(value) is torch.Tensor and value.requires_grad and value.is_leaf and id(value) not in given:
            storage = value.untyped_storage()
            if storage._cdata not in _residents:
                _purge(_computed)
                _computed[storage._cdata] = StorageWeakRef(storage)


def mark_given(tensors: Iterable[torch.Tensor]) -> None:
    """Declare that `tensors` are the caller's: of a storage that they are a part of, budgets charge that part."""
    for tensor in tensors:
        if tensor.layout is torch.strided and type(tensor) is torch.Tensor:
            storage, nbytes = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
            if nbytes < storage.nbytes():
                _, known_bytes = _given.get(storage._cdata, (None, 0))
                for key in [key for key, (ref, _) in list(_given.items()) if ref.expired()]:
                    del _given[key]
                _given[storage._cdata] = StorageWeakRef(storage), max(nbytes, known_bytes)


def charged_bytes(storage: torch.UntypedStorage) -> int:
    """What holding a storage costs a budget."""
    given = _given.get(storage._cdata) if _given else None
    return storage.nbytes() if given is None else given[1]


def is_given(tensor: torch.Tensor) -> bool:
    """Whether the storage of `tensor` is the caller's, of which a part is charged. A pool leaves it where it is."""
    return bool(_given) and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in _given


def is_movable(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` can be had from a copy of its storage: not those of a sparse or nested tensor, a quantised
    one, or a subclass."""
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether a pool on the same device copies `tensor`, and does not leave it where it is."""
    return is_movable(tensor) and not is_given(tensor)


def is_resident(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` are a parameter's (or another resident's) and so are never charged."""
    if tensor.is_inference():
        return True  # autograd saves none of these: a constant of the caller's
    if tensor.is_leaf and (tensor.requires_grad or _is_parameter(tensor)):
        return not (_computed and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in _computed)
    # A view of a parameter. Under FakeTensorMode its storage is another object, and only `_base` tells.
    base = tensor._base
    if base is not None and base.is_leaf and (base.requires_grad or _is_parameter(base)):
        return True
    return bool(_residents) and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in _residents


def _is_parameter(tensor: torch.Tensor) -> bool:
    # Parameter's own instance check takes longer than all else that is asked of a saved tensor, and no plain tensor is one.
    return type(tensor) is not torch.Tensor and isinstance(tensor, Parameter)


def _purge(known: dict[int, StorageWeakRef]) -> None:
    for key in [key for key, ref in list(known.items()) if ref.expired()]:
        del known[key]
