"""Which storages a budget holds already: `StorageIndex` puts saved tensors into one budget, each storage once.

The unit that is charged is the storage, because a storage is what a saved tensor keeps alive:

- a storage that several saved tensors share is charged once, and given back when the last of them is gone;
- what is resident (see residency.py) is never charged;
- a tensor that already lies in a block of the budget's pool is not copied again;
- of a sparse or nested tensor, and of a wrapper around others (DTensor, quantised weights), each part is charged.

Two ways to hold (`CheckpointBudget(hold=...)`): "account" leaves the bytes where they are and charges them; "pool" copies
the storage into the budget's pool, so that the pool's own limit guards it. An in-place change after saving is an error
under "account" (backward would read the changed bytes) and harmless under "pool" (backward reads the copy). What a pool cannot
hold (tensors on another device, sparse ones, subclasses) is charged where it is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import Budget
from gpuckpt.memory.fork import renew_after_fork
from gpuckpt.pytorch._torch_internals import innermost_transform, is_wrapper, untraced
from gpuckpt.pytorch.engine.kept.current import paused
from gpuckpt.pytorch.engine.residency import charged_bytes, is_copied, is_resident
from gpuckpt.pytorch.engine.saved_storage import (
    Geometry,
    HeldTensor,
    MovableStorage,
    SavedStorage,
    flat_bytes,
)
from gpuckpt.pytorch.engine.subclasses import detached, parts_of

__all__ = ["Source", "StorageIndex", "index_of"]


class Source:
    """Where a tensor's bytes are, without keeping them."""

    __slots__ = ("_counter", "_storage", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._version = tensor._version
        # It counts in-place changes with the tensor, and has no bytes.
        self._counter = tensor.detach()
        self._counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def storage(self) -> torch.UntypedStorage | None:
        """The storage, where it is alive and nothing was changed in place."""
        if self._storage.expired() or self._counter._version != self._version:
            return None
        return torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)


class StorageIndex:
    """Puts saved tensors into one budget; knows which storages the budget holds already."""

    def __init__(self, budget: Budget | None) -> None:
        self._budget = None if budget is None else weakref.ref(budget)
        # By a storage's address: what holds that storage. By (address, version): what holds a copy of it.
        self._holdings: dict[Any, weakref.ref[SavedStorage]] = {}
        self._purge_at = 256
        moving = None if budget is None else budget.moving
        self._moves = moving is not None
        self._lock = moving or threading.RLock()
        renew_after_fork(self)
        self._copies_on = torch.device(budget.device) if budget is not None and budget.hold == "pool" else None

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    @untraced
    def hold(self, tensor: torch.Tensor) -> HeldTensor:
        """Charge (and under "pool" copy) the storage of `tensor`. Raises `BudgetExceeded`; then nothing has changed."""
        # detach: an output that its own node saves would otherwise hold itself alive through its grad_fn.
        if self._budget is None or is_resident(tensor):
            return HeldTensor(tensor if tensor.is_leaf else detached(tensor), tensor._version, None)
        budget = self._budget()
        assert budget is not None, "an index does not outlive the budget that it is used with"
        try:
            plain = type(tensor) is torch.Tensor
            if tensor.layout is not torch.strided or (not plain and is_wrapper(tensor)):
                return self._hold_parts(budget, tensor)
            if tensor.is_leaf and tensor._is_zerotensor():  # a tangent of zeros, which has no bytes
                return HeldTensor(tensor, tensor._version, None)
            # A transform of torch.func may be tracing: a copy by bytes would be no part of what it sees.
            copied = tensor.device == self._copies_on and is_copied(tensor)
            if copied and innermost_transform() is None:
                with paused():
                    return self._hold_copy(budget, tensor)
            own = tensor.detach() if plain else detached(tensor)
            return self._held(own, self._holding(budget, tensor.untyped_storage()))
        except BudgetExceeded as error:
            node = "" if tensor.grad_fn is None else f" that {tensor.grad_fn.name()} is the backward of"
            error.hint = f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}{node} cannot be saved: {error.hint}"
            raise

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of a strided `tensor` is held already, so that holding it costs nothing."""
        budget = None if self._budget is None else self._budget()
        if budget is None:
            return False
        storage = tensor.untyped_storage()
        with self._lock:
            if self._find(storage._cdata) is not None:
                return True
            if tensor.device != self._copies_on or not is_copied(tensor):
                return False
            if budget.owns(storage.data_ptr()):
                return True
            holding = self._find((storage._cdata, tensor._version))
            return (
                holding is not None
                and holding.flat is not None
                and torch.equal(holding.flat, flat_bytes(storage, tensor.device))
            )

    def hold_copy(self, tensor: torch.Tensor) -> HeldTensor:
        """Hold a copy of a strided `tensor` of any device in the budget's pool. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None, "a copy is made for a budget only"
        return self._hold_copy(budget, tensor)

    def bring(
        self, there: HeldTensor, device: torch.device, brought: dict[int, tuple[torch.Tensor, SavedStorage]]
    ) -> HeldTensor:
        """Hold on `device` what `there` holds a copy of elsewhere. `brought`: what is back already, by the copy's holding, so
        that tensors that shared a storage share one again. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None
        assert isinstance(there.holding, SavedStorage)
        assert there.tensor is not None
        with self._lock:
            known = brought.get(id(there.holding))
            if known is None:
                source = there.holding.flat
                assert source is not None, "a copy lies in a pool"
                holding = self._new(budget, there.holding.nbytes)
                flat = holding.move_in(budget, source, device, self._copies_on == device)
                self.remember(flat.untyped_storage()._cdata, holding)
                known = brought[id(there.holding)] = flat, holding
            flat, holding = known
            return self._held(Geometry(there.tensor).of(flat), holding)

    def room(self, nbytes: int) -> SavedStorage:
        """Room for a copy of `nbytes` in the budget's pool, not filled in. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None, "a copy is made for a budget only"
        holding = self._new(budget, nbytes)
        holding.make_room(budget)
        return holding

    def room_for(self, nbytes: int, device: torch.device) -> tuple[torch.Tensor, SavedStorage]:
        """Room on `device` for `nbytes` that come back, as flat bytes, and what holds it. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None
        holding = self._new(budget, nbytes)
        if self._copies_on == device:
            return holding.make_room(budget), holding
        charge = budget.charge(budget.footprint(nbytes), "saved tensor brought back")
        flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
        holding.charge = charge
        return flat, holding

    def find(self, source: Source, device: torch.device) -> tuple[torch.Tensor, SavedStorage] | None:
        """The bytes of a storage that is held, and as it was, and what holds it; None where it is not."""
        with self._lock:
            storage = source.storage()
            holding = None if storage is None else self._find(storage._cdata)
            return None if storage is None or holding is None else (flat_bytes(storage, device), holding)

    def look(self, tensor: torch.Tensor, room: SavedStorage) -> HeldTensor:
        """A look, as `tensor` has it into its storage, into the copy that `room` is for."""
        assert room.flat is not None
        return self._held(Geometry(tensor).of(room.flat), room)

    def look_back(self, there: HeldTensor, flat: torch.Tensor, holding: SavedStorage) -> HeldTensor:
        """What `there` looks at elsewhere, in `flat`, which came back and is held by `holding`."""
        assert there.tensor is not None
        with self._lock:
            self.remember(flat.untyped_storage()._cdata, holding)
            return self._held(Geometry(there.tensor).of(flat), holding)

    def remember(self, key: Any, holding: SavedStorage) -> None:
        """`holding` holds the storage, or the copy, that `key` names."""
        if len(self._holdings) >= self._purge_at:
            self._holdings = {key: ref for key, ref in self._holdings.items() if ref() is not None}
            self._purge_at = max(256, 2 * len(self._holdings))
        self._holdings[key] = weakref.ref(holding)

    def forget(self, key: Any) -> None:
        """The storage that `key` names is not held any more."""
        self._holdings.pop(key, None)

    @staticmethod
    def _held(tensor: torch.Tensor, holding: SavedStorage | None) -> HeldTensor:
        held = HeldTensor(tensor, tensor._version, holding)
        if isinstance(holding, MovableStorage):
            holding.look(held)
        return held

    def _find(self, key: Any) -> SavedStorage | None:
        ref = self._holdings.get(key)
        holding = None if ref is None else ref()
        return holding if holding is None or holding.away is None else None

    def _new(self, budget: Budget, nbytes: int) -> SavedStorage:
        if not self._moves:
            return SavedStorage(nbytes)
        holding = MovableStorage(nbytes, budget, self)
        budget.offer(holding)
        return holding

    def _holding(self, budget: Budget, storage: torch.UntypedStorage) -> SavedStorage:
        """What charges `storage` where it is."""
        key = storage._cdata
        with self._lock:
            holding = self._find(key)
            if holding is None:
                nbytes = charged_bytes(storage)
                holding = SavedStorage(nbytes) if nbytes < storage.nbytes() else self._new(budget, nbytes)
                holding.charge = budget.charge(budget.footprint(nbytes), "saved tensor")
                self.remember(key, holding)
        return holding

    def _hold_copy(self, budget: Budget, tensor: torch.Tensor) -> HeldTensor:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return HeldTensor(tensor.detach(), tensor._version, None)
        with self._lock:
            holding = self._find(storage._cdata)
            if holding is not None or budget.owns(storage.data_ptr()):
                # The bytes lie in a block already: a load of something saved before, or the output of a kernel.
                return self._held(tensor.detach(), holding)
            key = (storage._cdata, tensor._version)
            source = flat_bytes(storage, tensor.device)
            holding = self._find(key)
            # A version belongs to a tensor and not to a storage: the chunks of an RNN's gates share one storage, are changed
            # in place one by one, and each counts for itself. Only the bytes tell whether a copy is still what is saved.
            if holding is None or holding.flat is None or not torch.equal(holding.flat, source):
                holding = self._new(budget, nbytes)
                flat = holding.copy_in(budget, source)
                holding.source = StorageWeakRef(storage)
                self.remember(key, holding)
                self.remember(flat.untyped_storage()._cdata, holding)
            assert holding.flat is not None, "it is here"
            return self._held(Geometry(tensor).of(holding.flat), holding)

    def _hold_parts(self, budget: Budget, tensor: torch.Tensor) -> HeldTensor:
        own = detached(tensor)
        parts = [part for part in parts_of(own) if not is_resident(part)]
        holdings = [self._holding(budget, part.untyped_storage()) for part in parts]
        return HeldTensor(own, tensor._version, holdings)


_indexes: weakref.WeakKeyDictionary[Budget, StorageIndex] = weakref.WeakKeyDictionary()
_uncharged = StorageIndex(None)
_lock = threading.Lock()


def index_of(budget: Budget | None) -> StorageIndex:
    """The one `StorageIndex` of a budget; of None, one that keeps tensors and charges nothing."""
    if budget is None:
        return _uncharged
    index = _indexes.get(budget)
    if index is None:
        with _lock:
            index = _indexes.setdefault(budget, StorageIndex(budget))
    return index
