"""What the parts of the memory room know of each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from gpuckpt.memory.ledger import Charge, Ledger

__all__ = ["STORAGE_BYTES", "Block", "Evictable", "Form", "Holds", "Pool"]

STORAGE_BYTES = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Smaller dtypes that floating-point arrays can be stored in, and what an element takes."""


class Block(Protocol):
    """Bytes of a pool at `address`, which return to it when the last reference is gone."""

    address: int
    nbytes: int
    charge: Charge | None

    @property
    def foreign_readers(self) -> bool:
        """Whether other streams than the block's own have been told to read it."""
        ...


class Pool(Protocol):
    """Memory with a hard limit: live and cached bytes together never exceed it."""

    unit_bytes: int

    @property
    def live_bytes(self) -> int: ...

    @property
    def cached_bytes(self) -> int: ...

    @property
    def waiting(self) -> bool:
        """Whether blocks wait for their last readers."""
        ...

    def take(self, nbytes: int, *, outside_bytes: int = 0) -> Any:
        """A block of `nbytes`. Raises `BudgetExceeded`."""
        ...

    def owns(self, address: int) -> bool: ...

    def collect(self, *, wait: bool = False) -> None: ...

    def trim(self, keep_bytes: int = 0) -> None: ...


class Form(Protocol):
    """The form of an array: what it takes to lay it into a block and to look at it there again.

    A form is made from an array and holds none of its bytes. The same form looks at any block with those bytes, so an array can
    be moved between blocks byte by byte. `nbytes`: what a block for it must hold.
    """

    nbytes: int

    def write(self, array: Any, block: Any) -> Any:
        """Copy `array` into `block`. Returns what `restored` takes."""
        ...

    def view(self, block: Any) -> Any:
        """The array in `block`, without a copy; it keeps the block alive."""
        ...

    def restored(self, stored: Any, block: Any) -> Any:
        """As `view`, from what `write` returned: cheaper, as the view does not have to be built up from the bytes."""
        ...

    def shrunk(self, block: Any, dtype: str) -> Any:
        """What `block` holds, in a dtype of `STORAGE_BYTES`; None where that saves nothing or numbers would become infinite."""
        ...

    def grown(self, small: Any) -> Any:
        """What `shrunk` made, in the array's own dtype and shape."""
        ...

    def to_host(self, array: Any) -> tuple[Any, Callable[[Any], Any]]:
        """The array as the host can save it, and what makes of that the array where it was."""
        ...


class Evictable(Protocol):
    """Something that holds bytes of a budget and can give them up. It must be weakly referencable."""

    def evict(self, how: str) -> int:
        """Give bytes up by "recompute", "spill" or "compress". Returns how many left the budget: 0 where it cannot, or does
        not want to now. It may be called on any thread, raises nothing where there is no room, and stays loadable."""
        ...


class Holds(Protocol):
    """A budget, as what it holds knows it; see `gpuckpt.memory.budget.Budget`."""

    ledger: Ledger
    storage_dtype: str | None
    over_cap: tuple[Any, ...]

    @property
    def moving(self) -> AbstractContextManager[Any] | None: ...

    @property
    def spill_to(self) -> Any: ...

    @property
    def holders(self) -> Any: ...

    def footprint(self, nbytes: int) -> int: ...

    def charge(self, nbytes: int, what: str = "charge") -> Charge: ...

    def take(self, nbytes: int, what: str) -> Any: ...

    def retake(self, small: Any, charge: Charge) -> Any: ...

    def save(self, array: Any, what: str = "array") -> Any: ...

    def remaining(self) -> int: ...
