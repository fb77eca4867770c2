"""Whatever autograd saves, held by a budget: `with budget:` for torch.

The unit that is charged is the storage, because a storage is what a saved tensor keeps alive:

- a storage that several saved tensors share is charged once, and given back when the last of them is gone;
- parameters and their views are never charged. A parameter is a leaf that requires a gradient, or an `nn.Parameter`,
  or any storage named by `mark_resident` (`fit` names those of a model's parameters and buffers);
- a tensor that already lies in a block of the budget's pool is not copied again.

Two ways to hold (`CheckpointBudget(hold=...)`): "account" leaves the bytes where they are and charges them; "pool" copies
the storage into the budget's pool, so that the pool's own limit guards it. An in-place change after saving is an error
under "account" (backward would read the changed bytes) and harmless under "pool" (backward reads the copy).

The hooks are `torch.autograd.graph.saved_tensors_hooks`; they are thread-local, as is the notion of a current budget.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import SavedTensorModified
from gpuckpt.memory import CheckpointBudget

__all__ = ["Held", "Holder", "current_budget", "enter", "holder_of", "is_resident", "mark_resident"]

Parameter = torch.nn.Parameter

_residents: dict[int, StorageWeakRef] = {}
_current = threading.local()


def mark_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Declare that the storages of `tensors` belong to the model: no budget charges them. Forgotten when they die."""
    for key in [key for key, ref in _residents.items() if ref.expired()]:
        del _residents[key]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again, so a stale key cannot name another storage.
        _residents[storage._cdata] = StorageWeakRef(storage)


def is_resident(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` are a parameter's (or another resident's) and so are never charged."""
    if isinstance(tensor, Parameter) or (tensor.is_leaf and tensor.requires_grad):
        return True
    # A view of a parameter. Under FakeTensorMode its storage is another object, and only `_base` tells.
    base = tensor._base
    if base is not None and (isinstance(base, Parameter) or (base.is_leaf and base.requires_grad)):
        return True
    return bool(_residents) and tensor.untyped_storage()._cdata in _residents


def modified(tensor: torch.Tensor) -> SavedTensorModified:
    return SavedTensorModified(
        f"a saved {tensor.dtype} tensor of shape {tuple(tensor.shape)} was changed in place before its backward ran; "
        "replace the in-place operation, or save under hold='pool', which keeps a copy"
    )


class Held:
    """One saved tensor: a view of a storage that a budget holds."""

    __slots__ = ("__weakref__", "holding", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, version: int, holding: object | None) -> None:
        self.tensor = tensor
        self.version = version  # -1: a copy that nobody else can change
        self.holding = holding

    def load(self) -> torch.Tensor:
        tensor = self.tensor
        if self.version >= 0 and tensor._version != self.version:
            raise modified(tensor)
        return tensor


class _Holding:
    """One charged storage. Lives as long as a `Held` refers to it, and gives its bytes back when it dies."""

    __slots__ = ("__weakref__", "charge", "loaded")

    def __init__(self, charge: object, loaded: torch.Tensor | None = None) -> None:
        self.charge = charge
        self.loaded = loaded  # under "pool": the block, as one flat uint8 tensor


class Holder:
    """Puts saved tensors into one budget; knows which storages the budget holds already."""

    def __init__(self, budget: CheckpointBudget | None) -> None:
        self._budget = None if budget is None else weakref.ref(budget)
        self._holdings: dict[tuple[int, int], weakref.ref[_Holding]] = {}
        self._purge_at = 256
        self._lock = threading.RLock()
        self._copies = budget is not None and budget.hold == "pool"

    def hold(self, tensor: torch.Tensor) -> Held:
        """Charge (and under "pool" copy) the storage of `tensor`. Raises `BudgetExceeded`; then nothing has changed."""
        version = tensor._version
        # detach: an output that its own node saves would otherwise hold itself alive through its grad_fn.
        if self._budget is None or is_resident(tensor):
            return Held(tensor if tensor.is_leaf else tensor.detach(), version, None)
        budget = self._budget()
        assert budget is not None, "a Holder does not outlive the budget that it is used with"
        if tensor.layout is not torch.strided:
            return self._hold_sparse(budget, tensor)
        storage = tensor.untyped_storage()
        if self._copies:
            return self._hold_copy(budget, tensor, storage, version)
        key = (storage._cdata, 0)
        with self._lock:
            ref = self._holdings.get(key)
            holding = None if ref is None else ref()
            if holding is None:
                holding = _Holding(budget.charge(budget.footprint(storage.nbytes()), "saved tensor"))
                self._remember(key, holding)
        return Held(tensor.detach(), version, holding)

    def _hold_copy(
        self, budget: CheckpointBudget, tensor: torch.Tensor, storage: torch.UntypedStorage, version: int
    ) -> Held:
        nbytes = storage.nbytes()
        if nbytes == 0:
            return Held(tensor.detach(), -1, None)
        with self._lock:
            # Either the bytes lie in a block already (a load of something saved before, or a kernel's output), or this
            # storage was copied before and has not been changed since.
            block_key = (storage.data_ptr(), -1)
            for key in (block_key, (storage._cdata, version)):
                ref = self._holdings.get(key)
                holding = None if ref is None else ref()
                if holding is not None:
                    break
            else:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
                saved = budget.save(flat, "saved tensor")
                holding = _Holding((saved, StorageWeakRef(storage)), saved.load())
                assert holding.loaded is not None
                self._remember((storage._cdata, version), holding)
                self._remember((holding.loaded.data_ptr(), -1), holding)
        assert holding.loaded is not None
        block = holding.loaded.untyped_storage()
        offset = holding.loaded.storage_offset() // tensor.element_size() + tensor.storage_offset()
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        view.set_(block, offset, tensor.size(), tensor.stride())  # type: ignore[call-overload]
        if tensor.is_conj():
            view = torch.conj(view)
        if tensor.is_neg():
            view = torch._neg_view(view)
        return Held(view, -1, holding)

    def _hold_sparse(self, budget: CheckpointBudget, tensor: torch.Tensor) -> Held:
        detached = tensor.detach()
        if detached.layout is torch.sparse_coo:
            parts = [detached._indices(), detached._values()]
        elif detached.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = [detached.crow_indices(), detached.col_indices(), detached.values()]
        elif detached.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = [detached.ccol_indices(), detached.row_indices(), detached.values()]
        else:
            raise TypeError(
                f"a budget cannot hold a saved tensor of layout {tensor.layout}; convert it to a strided one"
            )
        nbytes = sum(budget.footprint(part.untyped_storage().nbytes()) for part in parts)
        return Held(detached, -1, _Holding(budget.charge(nbytes, "saved sparse tensor")))

    def _remember(self, key: tuple[int, int], holding: _Holding) -> None:
        if len(self._holdings) >= self._purge_at:
            self._holdings = {key: ref for key, ref in self._holdings.items() if ref() is not None}
            self._purge_at = max(256, 2 * len(self._holdings))
        self._holdings[key] = weakref.ref(holding)


_holders: weakref.WeakKeyDictionary[CheckpointBudget, Holder] = weakref.WeakKeyDictionary()
_unbudgeted = Holder(None)
_holders_lock = threading.Lock()


def holder_of(budget: CheckpointBudget | None) -> Holder:
    """The one `Holder` of a budget; of None, one that keeps tensors and charges nobody."""
    if budget is None:
        return _unbudgeted
    holder = _holders.get(budget)
    if holder is None:
        with _holders_lock:
            holder = _holders.setdefault(budget, Holder(budget))
    return holder


def current_budget() -> CheckpointBudget | None:
    """The innermost budget that this thread has entered, or None."""
    stack = getattr(_current, "stack", None)
    return stack[-1] if stack else None


class enter:
    """Make `budget` the thread's current budget, and hold in it what autograd saves, until `__exit__`.

    A checkpoint's recompute passes hooks of its own, which decide what of the saved tensors is held.
    """

    def __init__(
        self,
        budget: CheckpointBudget | None,
        pack: Callable[[torch.Tensor], Any] | None = None,
        unpack: Callable[[Any], torch.Tensor] = Held.load,
    ) -> None:
        self._hooks = saved_tensors_hooks(pack or holder_of(budget).hold, unpack)
        if not hasattr(_current, "stack"):
            _current.stack = []
        self._hooks.__enter__()
        _current.stack.append(budget)

    def __enter__(self) -> None:
        """Nothing more to do: entering begins with the constructor, so that a budget can keep the object for its exit."""

    def __exit__(self, *error: object) -> None:
        _current.stack.pop()
        self._hooks.__exit__()
