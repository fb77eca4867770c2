"""What a budget holds of a saved tensor: `SavedStorage`, one charged storage, and `HeldTensor`, a view into it.

Under "account" the bytes stay in torch's storage and a charge counts them; under "pool" they are a copy in a block of the
budget's pool, and the block carries the charge. Either way they leave the ledger when the last `HeldTensor` that looks into the
storage is gone.

A `MovableStorage` can also give its bytes up when the budget asks (`gpuckpt.memory.eviction`): spilled to the second budget
and brought back, charged again, when one of its tensors is loaded; or compressed, and expanded into a copy that only the
node that asked for it holds. It moves only where nothing else looks into the storage: elsewhere nothing would be freed.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from gpuckpt.errors import BudgetExceeded, SavedTensorModified
from gpuckpt.memory import Budget, Charge
from gpuckpt.memory.adapters.torch import TorchForm, bytes_of
from gpuckpt.memory.compression import CompressedForm
from gpuckpt.memory.pools.cupy import torch_stream
from gpuckpt.pytorch._torch_internals import current_node, storage_use_count, tensor_use_count, untraced
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes_after
from gpuckpt.pytorch.engine.kept.current import paused

__all__ = [
    "Geometry",
    "HeldTensor",
    "MovableStorage",
    "SavedStorage",
    "flat_bytes",
    "modified",
    "writes_late",
]


class Index(Protocol):
    """What a storage that moves tells the index that it stands in."""

    def remember(self, key: Any, holding: SavedStorage) -> None: ...

    def forget(self, key: Any) -> None: ...


def modified(tensor: torch.Tensor) -> SavedTensorModified:
    """The error for a saved tensor that is no longer what was saved."""
    return SavedTensorModified(
        f"a saved {tensor.dtype} tensor of shape {tuple(tensor.shape)} was changed in place before its backward ran; "
        "replace the in-place operation, or save under hold='pool', which keeps a copy (checkpointed work that changes its "
        "own arguments in place can be run again only once)"
    )


class Geometry:
    """What a tensor is in its storage."""

    __slots__ = ("conj", "device", "dtype", "neg", "offset", "size", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        self.dtype = tensor.dtype
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.conj, self.neg = tensor.is_conj(), tensor.is_neg()

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The same in another storage, given as its bytes. All such tensors share the version counter of `flat`."""
        rest = flat.numel() % self.dtype.itemsize
        typed = (flat[:-rest] if rest else flat).view(self.dtype)
        tensor = typed.as_strided(self.size, self.stride, self.offset)
        if self.conj:
            tensor = torch.conj(tensor)
        if self.neg:
            tensor = torch._neg_view(tensor)
        return tensor.detach()  # no view of `flat`, which it would keep alive


class HeldTensor:
    """One saved tensor: a view of a storage that a budget holds, or of one that is not charged (`holding` is None)."""

    __slots__ = ("__weakref__", "geometry", "holding", "tensor", "version")

    geometry: Geometry

    def __init__(self, tensor: torch.Tensor, version: int, holding: SavedStorage | list[SavedStorage] | None) -> None:
        self.tensor: torch.Tensor | None = tensor  # None while its holding is away; then `geometry` tells what it was
        self.version = version
        self.holding = holding

    @untraced
    def load(self) -> torch.Tensor:
        """The tensor as it was saved. Raises `SavedTensorModified` where it is not any more, `BudgetExceeded` where it was
        spilled and there is no room for it, `NotImplementedError` where a copy could not be what its node needs."""
        tensor = self.tensor
        if isinstance(self.holding, SavedStorage) and self.holding.source is not None and writes_late():
            raise drop_stale_nodes_after(
                NotImplementedError(
                    "rrelu in training saves its noise before it fills it in, so that the copy of a budget with hold='pool' "
                    "holds none of it; use a budget with hold='account', or another activation (leaky_relu)"
                )
            )
        if tensor is None:
            assert isinstance(self.holding, MovableStorage), "only these move"
            try:
                return self.holding.bring_back(self)
            except BaseException as error:
                drop_stale_nodes_after(error)
                raise
        if tensor._version != self.version:
            raise drop_stale_nodes_after(modified(tensor))
        if tensor.is_cuda and isinstance(self.holding, SavedStorage) and self.holding.block is not None:
            # Backward may run on another stream than forward: reuse of the block has to wait for this one too.
            self.holding.block.used_on(torch_stream(tensor.device))
        return tensor


class SavedStorage:
    """One storage of `nbytes`, held by a budget.

    `charge` counts it where its bytes stay where they are; `block` and `flat` (its bytes, uint8) are the copy in the pool.
    `away`: where the bytes are if they were moved. `source` keeps the address of a copied storage from naming another one.
    """

    __slots__ = ("__weakref__", "away", "block", "charge", "flat", "nbytes", "source")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.charge: Charge | None = None
        self.block: Any = None
        self.flat: torch.Tensor | None = None
        self.away: torch.Tensor | None = None
        self.source: StorageWeakRef | None = None

    def copy_in(self, budget: Budget, flat: torch.Tensor) -> torch.Tensor:
        """Copy the bytes of `flat` into a block of the pool, and look at them there. Raises `BudgetExceeded`."""
        form = TorchForm(flat)
        block = budget.take(self.nbytes, "saved tensor")
        self.flat, self.block = form.write(flat, block).detach(), block
        return self.flat

    def make_room(self, budget: Budget) -> torch.Tensor:
        """A block of the pool for its bytes, which come later. Raises `BudgetExceeded`."""
        block = budget.take(self.nbytes, "saved tensor")
        self.flat, self.block = bytes_of(block), block
        return self.flat

    def move_in(self, budget: Budget, flat: torch.Tensor, device: torch.device, pooled: bool) -> torch.Tensor:
        """Hold a copy of `flat`, bytes that lie elsewhere: in the pool, or charged where torch puts it."""
        if pooled:
            return self.copy_in(budget, flat)
        charge = budget.charge(budget.footprint(self.nbytes), "saved tensor brought back")
        moved = flat.to(device, copy=True)
        self.charge = charge
        return moved


class MovableStorage(SavedStorage):
    """A holding whose bytes a budget can spill or compress. Moves happen under `budget.moving`. `exact`: it is not compressed."""

    __slots__ = ("_budget", "_dtype", "_helds", "_index", "exact")

    def __init__(self, nbytes: int, budget: Budget, index: Index) -> None:
        super().__init__(nbytes)
        self._budget = budget
        self._index = index  # is told which storage the bytes are in
        self._helds: list[weakref.ref[HeldTensor]] = []
        self._dtype: torch.dtype | None = None  # what to expand to; None: not compressed
        self.exact = False

    def look(self, held: HeldTensor) -> HeldTensor:
        """`held` looks into this holding from now on."""
        self._helds = [ref for ref in self._helds if ref() is not None]
        self._helds.append(weakref.ref(held))
        return held

    def evict(self, how: str) -> int:
        """Give bytes up by "spill" or "compress"; see `gpuckpt.memory.eviction.Evictable`."""
        if how not in ("spill", "compress"):
            return 0
        with self._budget.moving:  # type: ignore[union-attr]
            before_bytes = self._charged_bytes()
            if before_bytes == 0 or (how == "compress" and (self.exact or self.away is not None)):
                return 0
            if not (self._spill() if how == "spill" else self._compress()):
                return 0
            return before_bytes - self._charged_bytes()

    def bring_back(self, held: HeldTensor) -> torch.Tensor:
        """The tensor of `held`, whose bytes are away. Spilled bytes are charged again, for all who look into them; compressed
        ones are expanded into a copy that is not held, as every output is before it is saved."""
        budget = self._budget
        with paused(), budget.moving:  # type: ignore[union-attr]
            if held.tensor is not None:  # another thread was faster
                return held.tensor
            away = self.away
            assert away is not None
            if self._dtype is not None:
                full = away.to(held.geometry.device).to(self._dtype)
                return held.geometry.of(full.view(torch.uint8))
            flat = self.move_in(budget, away, held.geometry.device, budget.hold == "pool")
            self.away = None
            self._return(flat)
            assert held.tensor is not None
            return held.tensor

    def _return(self, flat: torch.Tensor) -> None:
        """The bytes are here again, in `flat`."""
        if self.block is not None:
            self.flat = flat
        for held in self._lookers():
            held.tensor = held.geometry.of(flat)
            held.version = held.tensor._version
        self._index.remember(flat.untyped_storage()._cdata, self)

    def _lookers(self) -> list[HeldTensor]:
        return [held for ref in self._helds if (held := ref()) is not None]

    def _charged_bytes(self) -> int:
        charge = self.charge if self.block is None else self.block.charge
        return 0 if charge is None else charge.nbytes

    def _bytes_here(self) -> torch.Tensor | None:
        """The storage's bytes, where only our own tensors look into them and they are as they were saved."""
        helds = self._lookers()
        if any(map(_looked_at, helds)):
            return None
        tensors = [held.tensor for held in helds if held.tensor is not None and held.tensor._version == held.version]
        if not tensors or len(tensors) < len(helds):
            return None
        storage = tensors[0].untyped_storage()
        # Our tensors, `flat`, and the Python object `storage`. Any other reference would keep the bytes where they are.
        if storage_use_count(storage._cdata) > len(tensors) + (self.flat is not None) + 1:
            return None
        return flat_bytes(storage, tensors[0].device)

    def _spill(self) -> bool:
        source = self._bytes_here() if self.away is None else self.away
        if source is None:
            return False
        form = TorchForm(source)
        assert self._budget.spill_to is not None, "a budget that names spill has one"
        try:
            block = self._budget.spill_to.take(form.nbytes, "saved tensor (spilled)")
        except BudgetExceeded:
            return False
        form.write(source, block)
        del source
        # Copying takes a while, in which another thread may have loaded one of the tensors.
        if self.away is None and not self._leave():
            return False
        self.away = form.view(block)
        self.block = None
        if self.charge is not None:
            self.charge.release()
            self.charge = None
        return True

    def _compress(self) -> bool:
        source = self._bytes_here()
        dtypes = {held.tensor.dtype for held in self._lookers() if held.tensor is not None}
        if source is None or len(dtypes) != 1:
            return False
        dtype = dtypes.pop()
        small = _smaller(source, dtype, getattr(torch, str(self._budget.storage_dtype)))
        flat_form = TorchForm(source)
        del source
        if small is None or not self._leave():
            return False
        packed = CompressedForm(small)
        if self.block is None:
            charge, self.charge = self.charge, None
            assert charge is not None
            self.away, self._dtype = small, dtype
            self._budget.ledger.shrink(charge, self._budget.footprint(packed.nbytes))
            self.block = packed.loose(charge)
            return True
        # The charge outlives the block: it shrinks without ever being up for grabs.
        block, self.block = self.block, None
        charge, block.charge = block.charge, None
        ref = weakref.ref(block)
        del block
        block = ref()
        if block is not None:  # a backward has loaded one of the tensors since we looked
            block.charge, self.block = charge, block
            self._return(flat_form.view(block))
            return False
        self.away, self._dtype = small, dtype
        try:
            self.block = self._budget.retake(packed, charge)
        except BaseException:  # an interrupt: what is held stays charged
            self.block = packed.loose(charge)
            raise
        self.away = packed.view(self.block)
        return True

    def _leave(self) -> bool:
        """Let go of the bytes, remembering who looked at what of them; False where something else looks at them now."""
        source = self._bytes_here()
        if source is None:
            return False
        self._index.forget(source.untyped_storage()._cdata)
        for held in self._lookers():
            assert held.tensor is not None
            held.geometry = Geometry(held.tensor)
            held.tensor = None
        self.flat = None
        return True


def writes_late() -> bool:
    """Whether the node that backward is at has a kernel that wrote into what it had saved: in training, rrelu's kernel fills the
    noise in once that is saved, and nothing in a tensor tells. (So does batch_norm with running statistics, but its backward
    reads none of them in training.)"""
    node: Any = current_node()
    return node is not None and node.name().startswith("RreluWithNoise") and node._saved_training


def _looked_at(held: HeldTensor) -> bool:
    """Whether a tensor that `load()` gave out is still in use: by Python code, or by autograd in a running backward."""
    tensor = held.tensor
    # Of Python `held`, this name and the call; of C++ the Python object itself.
    return sys.getrefcount(tensor) > 3 or (tensor is not None and tensor_use_count(tensor) > 1)


def flat_bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """The bytes of a storage as one flat uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _smaller(flat: torch.Tensor, dtype: torch.dtype, storage_dtype: torch.dtype) -> torch.Tensor | None:
    """The numbers in a smaller dtype; None where that saves nothing or would turn numbers into infinities."""
    if not dtype.is_floating_point or dtype.itemsize <= storage_dtype.itemsize or flat.numel() % dtype.itemsize:
        return None
    full = flat.view(dtype)
    small = full.to(storage_dtype)
    return small if torch.equal(torch.isfinite(small.float()), torch.isfinite(full)) else None
