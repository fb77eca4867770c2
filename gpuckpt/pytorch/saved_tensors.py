"""Whatever autograd saves, held by a budget: `with budget:` for torch.

The unit that is charged is the storage, because a storage is what a saved tensor keeps alive:

- a storage that several saved tensors share is charged once, and given back when the last of them is gone;
- parameters and their views are never charged. A parameter is a leaf that requires a gradient, or an `nn.Parameter`,
  or any storage named by `mark_resident` (`fit` names those of a model's parameters and buffers);
- a tensor that already lies in a block of the budget's pool is not copied again;
- of a sparse or nested tensor each part is charged.

Two ways to hold (`CheckpointBudget(hold=...)`): "account" leaves the bytes where they are and charges them; "pool" copies
the storage into the budget's pool, so that the pool's own limit guards it. An in-place change after saving is an error
under "account" (backward would read the changed bytes) and harmless under "pool" (backward reads the copy). Changes behind
autograd's back (`tensor.data`, foreign kernels) are seen under neither. What a pool cannot hold (tensors on another device,
sparse ones, subclasses) is charged where it is.

The hooks are `torch.autograd.graph.saved_tensors_hooks`; they are thread-local, as is the notion of a current budget.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import CheckpointBudget
from gpuckpt.pytorch._torch_internals import untraced
from gpuckpt.pytorch.holdings import Geometry, Held, Holding, MovableHolding, flat_bytes, modified
from gpuckpt.pytorch.stale import drop_stale_nodes

__all__ = [
    "Held",
    "Holder",
    "current_budget",
    "enter",
    "holder_of",
    "holds_instead",
    "instead",
    "is_resident",
    "mark_resident",
    "modified",
]

Parameter = torch.nn.Parameter

_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks

_residents: dict[int, StorageWeakRef] = {}
_current = threading.local()


def mark_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Declare that the storages of `tensors` belong to the model: no budget charges them. Forgotten when they die."""
    for key in [key for key, ref in list(_residents.items()) if ref.expired()]:
        del _residents[key]
    for tensor in tensors:
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


class Holder:
    """Puts saved tensors into one budget; knows which storages the budget holds already."""

    def __init__(self, budget: CheckpointBudget | None) -> None:
        self._budget = None if budget is None else weakref.ref(budget)
        # By a storage's address: what holds that storage. By (address, version): what holds a copy of it.
        self._holdings: dict[Any, weakref.ref[Holding]] = {}
        self._purge_at = 256
        moving = None if budget is None else budget.moving
        self._moves = moving is not None
        self._lock = moving or threading.RLock()
        self._copies_on = torch.device(budget.device) if budget is not None and budget.hold == "pool" else None

    @untraced
    def hold(self, tensor: torch.Tensor) -> Held:
        """Charge (and under "pool" copy) the storage of `tensor`. Raises `BudgetExceeded`; then nothing has changed."""
        # detach: an output that its own node saves would otherwise hold itself alive through its grad_fn.
        if self._budget is None or is_resident(tensor):
            return Held(tensor if tensor.is_leaf else tensor.detach(), tensor._version, None)
        budget = self._budget()
        assert budget is not None, "a Holder does not outlive the budget that it is used with"
        try:
            if tensor.layout is not torch.strided:
                return self._hold_parts(budget, tensor)
            if tensor.device == self._copies_on and type(tensor) is torch.Tensor:
                return self._hold_copy(budget, tensor)
            return self._held(tensor.detach(), self._holding(budget, tensor.untyped_storage()))
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
            copied = tensor.device == self._copies_on and type(tensor) is torch.Tensor
            if not copied:
                return False
            if budget.owns(storage.data_ptr()):
                return True
            holding = self._find((storage._cdata, tensor._version))
            return (
                holding is not None
                and holding.flat is not None
                and torch.equal(holding.flat, flat_bytes(storage, tensor.device))
            )

    def hold_copy(self, tensor: torch.Tensor) -> Held:
        """Hold a copy of a strided `tensor` of any device in the budget's pool. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None, "whoever asks for a copy has a budget"
        return self._hold_copy(budget, tensor)

    def bring(self, there: Held, device: torch.device, brought: dict[int, tuple[torch.Tensor, Holding]]) -> Held:
        """Hold on `device` what `there` holds a copy of elsewhere. `brought`: what is back already, by the copy's holding, so
        that tensors that shared a storage share one again. Raises `BudgetExceeded`."""
        budget = None if self._budget is None else self._budget()
        assert budget is not None
        assert isinstance(there.holding, Holding)
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

    def remember(self, key: Any, holding: Holding) -> None:
        """`holding` holds the storage, or the copy, that `key` names."""
        if len(self._holdings) >= self._purge_at:
            self._holdings = {key: ref for key, ref in self._holdings.items() if ref() is not None}
            self._purge_at = max(256, 2 * len(self._holdings))
        self._holdings[key] = weakref.ref(holding)

    def forget(self, key: Any) -> None:
        """Nobody holds the storage that `key` names any more."""
        self._holdings.pop(key, None)

    @staticmethod
    def _held(tensor: torch.Tensor, holding: Holding | None) -> Held:
        held = Held(tensor, tensor._version, holding)
        if isinstance(holding, MovableHolding):
            holding.look(held)
        return held

    def _find(self, key: Any) -> Holding | None:
        ref = self._holdings.get(key)
        holding = None if ref is None else ref()
        return holding if holding is None or holding.away is None else None

    def _new(self, budget: CheckpointBudget, nbytes: int) -> Holding:
        if not self._moves:
            return Holding(nbytes)
        holding = MovableHolding(nbytes, budget, self)
        budget.offer(holding)
        return holding

    def _holding(self, budget: CheckpointBudget, storage: torch.UntypedStorage) -> Holding:
        """What charges `storage` where it is."""
        key = storage._cdata
        with self._lock:
            holding = self._find(key)
            if holding is None:
                nbytes = storage.nbytes()
                holding = self._new(budget, nbytes)
                holding.charge = budget.charge(budget.footprint(nbytes), "saved tensor")
                self.remember(key, holding)
        return holding

    def _hold_copy(self, budget: CheckpointBudget, tensor: torch.Tensor) -> Held:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return Held(tensor.detach(), tensor._version, None)
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

    def _hold_parts(self, budget: CheckpointBudget, tensor: torch.Tensor) -> Held:
        detached = tensor.detach()
        if detached.layout is torch.sparse_coo:
            parts = [detached._indices(), detached._values()]
        elif detached.layout in (torch.sparse_csr, torch.sparse_bsr):
            parts = [detached.crow_indices(), detached.col_indices(), detached.values()]
        elif detached.layout in (torch.sparse_csc, torch.sparse_bsc):
            parts = [detached.ccol_indices(), detached.row_indices(), detached.values()]
        elif detached.layout is torch.jagged:
            parts = [detached.values(), detached.offsets()]  # type: ignore[attr-defined]
        else:
            raise TypeError(
                f"a budget cannot hold a saved tensor of layout {tensor.layout}; convert it to a strided one"
            )
        holdings = [self._holding(budget, part.untyped_storage()) for part in parts]
        return Held(detached, tensor._version, holdings)


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
    context = stack[-1]() if stack else None
    return None if context is None else context.budget


class instead:
    """Within the context a replay that this thread runs holds tensors by `hold`; None: as it always does."""

    __slots__ = ("_before", "_hold")

    def __init__(self, hold: Callable[[torch.Tensor], Any] | None) -> None:
        self._hold = hold

    def __enter__(self) -> None:
        self._before = holds_instead()
        _current.instead = self._hold

    def __exit__(self, *error: object) -> None:
        _current.instead = self._before


def holds_instead() -> Callable[[torch.Tensor], Any] | None:
    """What the innermost `instead` of this thread was given."""
    return getattr(_current, "instead", None)


class enter:
    """Make `budget` the thread's current budget, and hold in it what autograd saves, until `__exit__`.

    A checkpoint's recompute passes hooks of its own, which decide what of the saved tensors is held. Ctrl-C can end `__exit__`
    before its first line; it can therefore be called again, leaves whatever is still open inside of it as well, and is
    called at the latest when the object dies.
    """

    __slots__ = ("__weakref__", "_open", "_pack", "budget")

    def __init__(
        self,
        budget: CheckpointBudget | None,
        pack: Callable[[torch.Tensor], Any] | None = None,
        unpack: Callable[[Any], torch.Tensor] = Held.load,
    ) -> None:
        self.budget = budget
        self._open = False
        if not hasattr(_current, "stack"):
            _current.stack = []
        if pack is None:
            pack = holder_of(budget).hold
            if not _current.stack:
                drop_stale_nodes()
        self._pack = pack
        self._open = True
        _current.stack.append(weakref.ref(self))
        _push_hooks(pack, unpack)

    def __enter__(self) -> None:
        """Nothing more to do: entering begins with the constructor, so that a budget can keep the object for its exit."""

    def __exit__(self, *error: object) -> None:
        stack = getattr(_current, "stack", [])  # another thread's, if a finalizer calls
        while any(ref() is self for ref in stack):
            context = stack[-1]()
            top = _top_hooks(True)
            if context is not None and top is not None and top[0] is context._pack:
                _pop_hooks()
            stack.pop()
        self._open = False

    def __del__(self) -> None:
        if self._open:
            self.__exit__()
