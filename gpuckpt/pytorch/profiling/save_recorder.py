"""What autograd saves, noted and numbered by storage; nothing is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import InvalidChain
from gpuckpt.pytorch._torch_internals import untraced

__all__ = ["SaveRecorder", "Storages", "identity", "of_parameter"]


class Storages:
    """Numbers storages; parameters, buffers and leaves that the caller trains have none.

    `copies`: a budget with hold="pool" holds copies, so that a storage that is changed in place counts once for each version.
    """

    def __init__(self, residents: Sequence[torch.Tensor], copies: bool = False) -> None:
        self._copies = copies
        self._resident = {tensor.untyped_storage()._cdata for tensor in residents}
        self._number: dict[tuple[int, int], int] = {}
        # Weak references keep an address from naming two storages, and no memory alive.
        self._refs: list[StorageWeakRef] = []
        self.sizes: list[int] = []

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Ids of the storages of `tensors`, each once, in order."""
        return self.of_versions([(tensor, tensor._version) for tensor in tensors])

    def of_versions(self, tensors: Sequence[tuple[torch.Tensor, int]]) -> tuple[int, ...]:
        """The same for tensors as they were in a version."""
        ids: dict[int, None] = {}
        for tensor, version in tensors:
            if tensor.layout is not torch.strided:
                raise InvalidChain(
                    f"measuring saved tensors of layout {tensor.layout} is not supported; keep such layers out of the chain"
                )
            storage = tensor.untyped_storage()
            if storage._cdata in self._resident:
                continue
            key = storage._cdata, version if self._copies else 0
            number = self._number.get(key)
            if number is None:
                number = self._number[key] = len(self.sizes)
                self._refs.append(StorageWeakRef(storage))
                self.sizes.append(storage.nbytes())
            ids[number] = None
        return tuple(ids)


class SaveRecorder:
    """What one run of a stage saves: the tensors that are no parameter's, and the shapes of all."""

    def __init__(self) -> None:
        self.tensors: list[tuple[torch.Tensor, int]] = []  # with the version that was saved
        self.shapes: list[tuple[int, ...]] = []

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, identity)

    @untraced
    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tensor.shape))
        detached = tensor.detach()
        if not of_parameter(tensor):
            self.tensors.append((detached, tensor._version))
        return detached


def of_parameter(tensor: torch.Tensor) -> bool:
    """Of a fake parameter's view only `_base` tells that it is one; of a real one its storage does as well."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


@untraced
def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
