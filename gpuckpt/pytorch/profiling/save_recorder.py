"""What autograd saves, noted and numbered by storage; nothing is held."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from gpuckpt.pytorch._torch_internals import untraced, version_number
from gpuckpt.pytorch.engine.kept.current import paused
from gpuckpt.pytorch.engine.kept.flow import Flow
from gpuckpt.pytorch.engine.residency import charged_bytes, is_copied, is_movable, is_resident
from gpuckpt.pytorch.engine.saved_storage import flat_bytes
from gpuckpt.pytorch.engine.subclasses import parts_of
from gpuckpt.pytorch.engine.verify import checksum

__all__ = ["SaveRecorder", "Storages", "identity", "residents_of"]


def residents_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What is there whether or not anything is saved: the model's own tensors, and leaves that the caller trains."""
    own = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_leaf]
    return own + [
        leaf
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad
    ]


class Storages:
    """Numbers storages; parameters, buffers and leaves that the caller trains have none.

    `copies`: a budget with hold="pool" holds copies, so that a storage that is changed in place counts once for each content:
    kernels of RNNs write into storages without a new version.
    `unit_bytes`: what the budget counts in.
    """

    def __init__(self, residents: Sequence[torch.Tensor], copies: bool = False, unit_bytes: int = 1) -> None:
        self._copies = copies
        self._unit_bytes = unit_bytes
        parts = [part for tensor in residents for part in parts_of(tensor)]
        self._resident = {part.untyped_storage()._cdata for part in parts}
        self._number: dict[tuple[int, Any], int] = {}
        self._first: dict[int, int] = {}  # of each storage, as it was first
        self._made: dict[int, int] = {}  # those of them that have no stamp yet
        # Weak references keep an address from naming two storages, and no memory alive.
        self._refs: list[StorageWeakRef] = []
        self.sizes: list[int] = []
        self.staying: set[int] = set()  # ids of those that are no plain tensors' and stay where they are

    def held_bytes(self, number: int) -> int:
        """What a budget holds for a storage."""
        return -(-self.sizes[number] // self._unit_bytes) * self._unit_bytes

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Ids of the storages of `tensors`, each once, in order."""
        return self.of_stamped([(tensor, self.stamp(tensor)) for tensor in tensors])

    def stamp(self, tensor: torch.Tensor) -> Any:
        """What tells a tensor as it is now from what it was before and will be, as far as that counts."""
        if not (self._copies and is_copied(tensor)):
            return 0
        with paused():
            return version_number(tensor), checksum(flat_bytes(tensor.untyped_storage(), tensor.device))

    def of_stamped(self, tensors: Sequence[tuple[torch.Tensor, Any]]) -> tuple[int, ...]:
        """The same for tensors as they were when they got their stamps."""
        ids: dict[int, None] = {}
        for tensor, stamp in tensors:
            parts = parts_of(tensor)
            for part in parts:
                storage = part.untyped_storage()
                if storage._cdata in self._resident:
                    continue
                key = storage._cdata, stamp
                number = self._number.get(key)
                if number is None and (known := self._made.pop(storage._cdata, None)) is not None:
                    number = self._number[key] = known
                if number is None:
                    number = self._number[key] = len(self.sizes)
                    self._first.setdefault(storage._cdata, number)
                    self._refs.append(StorageWeakRef(storage))
                    self.sizes.append(charged_bytes(storage))
                    if not is_movable(tensor):
                        self.staying.add(number)
                ids[number] = None
        return tuple(ids)

    def known(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """Ids of those storages of `tensors` that have one."""
        found = (self._first.get(part.untyped_storage()._cdata) for tensor in tensors for part in parts_of(tensor))
        return frozenset([number for number in found if number is not None])

    def known_id(self, ref: StorageWeakRef) -> int | None:
        """The id of a storage as it was made; None where it has none so far."""
        return self._first.get(ref.cdata)

    def of_gone(self, storages: Iterable[tuple[StorageWeakRef, int]]) -> tuple[int, ...]:
        """The same of storages that may be gone, given with their bytes, as they were when they were made."""
        ids: dict[int, None] = {}
        for ref, nbytes in storages:
            number = self._first.get(ref.cdata)
            if number is None:
                number = self._first[ref.cdata] = self._made[ref.cdata] = len(self.sizes)
                self._refs.append(ref)
                self.sizes.append(nbytes)
            ids[number] = None
        return tuple(ids)


class _Token:
    """Stands in the graph for a saved tensor, and dies with the node that saved it."""

    __slots__ = ("__weakref__", "held", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.held: Any = None  # what else is to live as long


class SaveRecorder:
    """What a piece of code saves: the tensors that are nobody's parameters, and the shapes of all. `stamp`: that of the
    `Storages` which are to number them."""

    def __init__(self, stamp: Callable[[torch.Tensor], Any] = lambda tensor: 0, flow: Flow | None = None) -> None:
        self.slots: list[
            tuple[int, tuple[int, ...]]
        ] = []  # of what was saved last: its number among `shapes`, and storages
        self._flow = flow
        self._numbers: list[int] = []
        self.tensors: list[tuple[torch.Tensor, Any]] = []  # with their stamps
        self._stamp = stamp
        self.shapes: list[tuple[int, ...]] = []
        self._events: list[tuple[int, bool]] = []  # (number in `tensors`, saved or let go), in order
        self._refs: list[weakref.ref[_Token]] = []
        self.dropped = False  # whether more was held on the way than at the end
        self.loads = 0  # how often a backward has asked for one of them

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)

    @untraced
    def unpack(self, token: _Token) -> torch.Tensor:
        self.loads += 1
        return token.tensor

    @untraced
    def pack(self, tensor: torch.Tensor) -> _Token:
        self.shapes.append(tuple(tensor.shape))
        if self._flow is not None:
            self._flow.save(tensor)
        token = _Token(tensor.detach())
        if not is_resident(tensor):
            number, events = len(self.tensors), self._events
            self._numbers.append(len(self.shapes) - 1)
            self.tensors.append((token.tensor, self._stamp(tensor)))
            events.append((number, True))
            self._refs.append(weakref.ref(token, lambda _: events.append((number, False))))
        return token

    def alive(self) -> bool:
        """Whether anyone still has a graph in which one of the tensors was saved."""
        return any(ref() is not None for ref in self._refs)

    def numbered(self) -> list[tuple[int, torch.Tensor]]:
        """The tensors that are nobody's parameters, each with its number among all."""
        return [(number, tensor) for number, (tensor, _) in zip(self._numbers, self.tensors, strict=True)]

    def storages(self, numbers: Storages, held: set[int]) -> tuple[int, ...]:
        """Ids of what is saved now, and forgets all.

        Branches whose result was dropped meanwhile (the scores that a router ranks) are left out. Where they made the bytes held
        on the way more than they are now, the difference stands in the list, under an id of its own. `held`: what others may hold
        the whole time, so that it is part of no peak.
        """
        storages = [numbers.of_stamped([pair]) for pair in self.tensors]
        alive = [ref() is not None for ref in self._refs]
        self.slots = [(n, ids) for n, ids, lives in zip(self._numbers, storages, alive, strict=True) if lives]
        kept: Counter[int] = Counter()
        for number, saved in self._events:
            kept.update(dict.fromkeys(storages[number], 1 if saved else -1))
        ids = [storage for storage, count in kept.items() if count]
        free = held.intersection(ids)
        holders: Counter[int] = Counter()
        held_bytes = peak_bytes = 0
        for number, saved in self._events:
            for storage in storages[number]:
                holders[storage] += 1 if saved else -1
                if storage not in free and holders[storage] == (1 if saved else 0):
                    held_bytes += numbers.held_bytes(storage) if saved else -numbers.held_bytes(storage)
            peak_bytes = max(peak_bytes, held_bytes)
        self.tensors.clear()
        self._events.clear()
        if peak_bytes > held_bytes:
            self.dropped = True
            ids.append(len(numbers.sizes))
            numbers.sizes.append(peak_bytes - held_bytes)
        return tuple(ids)


@untraced
def unpack(token: _Token) -> torch.Tensor:
    return token.tensor


@untraced
def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
