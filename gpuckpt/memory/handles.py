"""A handle on one array inside a budget."""

from __future__ import annotations

import weakref
from typing import Any

from gpuckpt.errors import NotCheckpointed
from gpuckpt.memory.compression import CompressedForm, LooseBlock
from gpuckpt.memory.ledger import Charge
from gpuckpt.memory.protocols import Form, Holds
from gpuckpt.memory.transfer import copy_bytes, copy_to_host

__all__ = ["Saved", "SavedInPlace", "SavedInPool"]


class Saved:
    """One array that a budget holds, made by `CheckpointBudget.save`.

    When do the bytes go back? The handle holds the pool's block, and so does every view that `load()` gave out, along with
    whatever was made from such a view without copying (slices, transposes, DLPack imports). The block returns to the pool,
    and its bytes leave the budget, at the moment when the last of these is gone: `free()` (or collecting the handle) ends the
    handle's own hold at once, a view that outlives it keeps the bytes, charged, until it dies too. So a view never looks at
    memory that was given to something else, and the ledger never says less than what is held. Under `hold="account"` the handle
    holds the array itself; after `free()` its bytes are off the ledger even if the caller still has the array, which was
    never the budget's.

    >>> import gpuckpt, numpy as np
    >>> budget = gpuckpt.memory.Budget(1024, device="cpu", hold="pool")
    >>> saved = budget.save(np.arange(4.0))
    >>> saved.nbytes, saved.load().tolist()
    (32, [0.0, 1.0, 2.0, 3.0])
    >>> saved.free()
    >>> budget.used_bytes
    0
    """

    __slots__ = ("__weakref__", "what")

    what: str

    @property
    def nbytes(self) -> int:
        """Bytes charged for it now: the pool's footprint; 0 once freed, spilled, or where the bytes were charged already."""
        raise NotImplementedError

    def load(self) -> Any:
        """The array: same library, dtype, shape and values. Raises `NotCheckpointed` after `free()`.

        Under `hold="pool"` it is a zero-copy view onto the pool's block, so what is written into it is there in the next
        `load()` as well; a torch tensor comes back detached, a repeated (broadcast) dimension is repeated again.
        Under `hold="account"` it is the very array that was saved. An array that was spilled is brought back first, which
        raises `BudgetExceeded` where there is no room for it.
        """
        raise NotImplementedError

    def free(self) -> None:
        """End this handle's hold on the bytes. The second time does nothing."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"Saved({self.nbytes} bytes, {self.what!r})"

    def _freed(self) -> NotCheckpointed:
        return NotCheckpointed(f"{self.what!r} was freed and cannot be loaded; load() before free()")


class SavedInPlace(Saved):
    """The array itself, charged where it lies; without a charge where its bytes are in the budget's pool already.

    It can be spilled: a copy goes to the second budget, and the handle's own reference and charge end. Whether memory comes
    free by that is up to the other owners of the array. It is not compressed, which would change an array that others may have.
    """

    __slots__ = ("_array", "_budget", "_charge", "_held", "_spilled")

    def __init__(self, budget: Holds, array: Any, charge: Charge | None, what: str) -> None:
        self.what = what
        self._budget = budget
        self._array = array
        self._charge = charge
        self._held = True
        self._spilled: Any = None  # how to get it back, and its bytes

    @property
    def nbytes(self) -> int:
        charge = self._charge
        return 0 if charge is None else charge.nbytes

    def load(self) -> Any:
        moving = self._budget.moving
        if moving is None:
            if not self._held:
                raise self._freed()
            return self._array
        with moving:
            if not self._held:
                raise self._freed()
            if self._spilled is not None:
                bring_back, nbytes = self._spilled
                self._charge = self._budget.charge(self._budget.footprint(nbytes), self.what)
                self._array, self._spilled = bring_back(), None
            return self._array

    def free(self) -> None:
        charge, self._charge = self._charge, None
        self._held = False
        self._array = self._spilled = None
        if charge is not None:
            charge.release()

    def evict(self, how: str) -> int:
        """Give the array up by "spill"; see `over_cap.Evictable`."""
        moving = self._budget.moving
        if moving is None or how != "spill" or self._budget.spill_to is None:
            return 0
        with moving:
            charge = self._charge
            if charge is None or not charge.nbytes:
                return 0
            try:
                self._spilled = copy_to_host(self._array, self._budget.spill_to, f"{self.what} (spilled)")
            except MemoryError:  # the second budget is full, or the host is
                return 0
            freed_bytes = charge.nbytes
            self._array = self._charge = None
            charge.release()
            return freed_bytes


class SavedInPool(Saved):
    """A copy in a block of the budget's pool, which can be spilled to a second budget or compressed.

    Moves happen under the budget's `moving` lock, and only where nothing but the handle holds the block: a view that is out
    would keep the bytes where they are.
    """

    __slots__ = ("_block", "_budget", "_compressed", "_form", "_spilled", "_stored")

    def __init__(self, budget: Holds, form: Form, block: Any, stored: Any, what: str) -> None:
        self.what = what
        self._budget = budget
        self._form = form
        self._block: Any = block
        self._stored: Any = stored  # the array over the block, as it was written; None once the block has changed
        self._spilled: Any = None  # a block of the spill budget
        self._compressed: Any = None  # the form to expand from, when the block holds the array in a smaller dtype

    @property
    def nbytes(self) -> int:
        block = self._block
        return 0 if block is None else self._budget.footprint(block.nbytes)

    def load(self) -> Any:
        moving = self._budget.moving
        if moving is None:
            block = self._block
            if block is None:
                raise self._freed()
            return self._form.restored(self._stored, block)
        with moving:
            if self._spilled is not None:
                self._bring_back()
            if self._block is None:
                raise self._freed()
            if self._compressed is not None:
                return self._compressed.expand(self._form, self._block)
            return self._form.view(self._block)

    def free(self) -> None:
        moving = self._budget.moving
        if moving is None:
            self._block = self._stored = None
            return
        with moving:
            self._block = self._stored = self._spilled = self._compressed = None

    def evict(self, how: str) -> int:
        """Give the block up by "spill" or "compress"; see `over_cap.Evictable`."""
        moving = self._budget.moving
        if moving is None or how not in ("spill", "compress"):
            return 0
        with moving:
            if self._block is None or not self._block.nbytes or isinstance(self._block, LooseBlock):
                return 0  # nothing to give, or compressed already and in no block whose bytes could be copied
            return self._spill() if how == "spill" else self._compress()

    def _spill(self) -> int:
        budget = self._budget
        assert budget.spill_to is not None, "parse_policies requires a budget to spill to"
        freed_bytes = self.nbytes
        try:
            copy = budget.spill_to.take(self._block.nbytes, f"{self.what} (spilled)")
        except MemoryError:  # the second budget is full, or the host is
            return 0
        copy_bytes(self._block, copy)
        if not self._let_go():
            return 0
        self._spilled = copy
        return freed_bytes

    def _bring_back(self) -> None:
        block = self._budget.take(self._spilled.nbytes, self.what)
        copy_bytes(self._spilled, block)
        self._block, self._spilled = block, None

    def _compress(self) -> int:
        if self._compressed is not None or self._block.foreign_readers:
            return 0
        small = CompressedForm.make(self._form, self._block, self._budget.storage_dtype)
        if small is None:
            return 0
        before_bytes = self.nbytes
        # The charge outlives the block: it shrinks to the smaller size without ever being up for grabs.
        charge = self._block.charge
        if not self._let_go(charge):
            return 0
        self._compressed = small
        try:
            self._block = self._budget.retake(small, charge)
        except BaseException:  # an interrupt: the array has left its block, and must not be lost
            self._block = small.loose(charge)
            raise
        return before_bytes - self.nbytes

    def _let_go(self, charge: Charge | None = None) -> bool:
        """Drop the block. False, with the block held as before, where a view still holds it. `charge` is kept if given."""
        block = self._block
        ref = weakref.ref(block)
        if charge is not None:
            block.charge = None
        self._block = self._stored = None
        del block
        block = ref()
        if block is None:
            return True
        if charge is not None:
            block.charge = charge
        self._block = block
        return False
