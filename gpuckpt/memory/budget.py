"""A hard cap in bytes: the books, the pool behind them, and everything that is held under one limit.

What is counted: bytes charged with `charge`, taken with `allocate`, and held by arrays given to `save` or saved by autograd
inside `with budget:`. At no instant do they exceed `max_bytes`; a request that does not fit raises `BudgetExceeded` and
changes nothing. What is not counted is listed in `gpuckpt.memory.uncapped`.

hold="account"  leaves bytes where they are and counts them: no copy, right wherever another allocator owns the memory.
hold="pool"     moves bytes into the budget's own pool with its own limit: one copy, right where the cap must hold against
                the allocator itself, or where saved bytes shall not mix with its other blocks.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

from gpuckpt.errors import BudgetClosed
from gpuckpt.memory.arrays import device_of, library_of, storage_bytes
from gpuckpt.memory.devices import choose_device
from gpuckpt.memory.host_pool import HostPool
from gpuckpt.memory.ledger import Charge, Event, Ledger, Snapshot
from gpuckpt.memory.saved import Saved
from gpuckpt.memory.sizes import format_bytes, parse_bytes
from gpuckpt.memory.stores import store_numpy, store_torch_cpu

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["CheckpointBudget"]

_CUDA_UNIT_BYTES = 512  # CuPy's pools hand out multiples of this


class CheckpointBudget:
    """A cap of `max_bytes` (an int, or "256MiB"), its ledger and its pool. Thread-safe. Zero is legal and holds nothing.

    `device`: "cpu", "cuda", "cuda:N" or a torch device; None takes the current CUDA device where there is one.
    `hold`: "account" or "pool", see the module's docstring. `log_events`: how many events `events()` remembers.
    """

    def __init__(
        self,
        max_bytes: int | str,
        *,
        device: Any = None,
        hold: Literal["account", "pool"] = "account",
        log_events: int = 4096,
    ) -> None:
        if hold not in ("account", "pool"):
            raise ValueError(f'hold must be "account" (count bytes where they are) or "pool" (move them), got {hold!r}')
        self.device = choose_device(device)
        self.hold = hold
        self.unit_bytes = 1 if self.device == "cpu" else _CUDA_UNIT_BYTES
        self.ledger = Ledger(parse_bytes(max_bytes), log_events=log_events)
        self._pool: HostPool | None = None
        self._pool_lock = threading.Lock()
        self._entered = threading.local()

    @property
    def max_bytes(self) -> int:
        """The cap."""
        return self.ledger.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        return self.ledger.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest `used_bytes` since the start or the last `reset_peak()`."""
        return self.ledger.peak_bytes

    def remaining(self) -> int:
        """Bytes that can still be had."""
        books = self.ledger.snapshot()
        return books.max_bytes - books.used_bytes - books.pending_bytes

    def utilization(self) -> float:
        """Used share of the cap, from 0.0 to 1.0; 0.0 for a budget of zero."""
        return self.used_bytes / self.max_bytes if self.max_bytes else 0.0

    def can_allocate(self, nbytes: int | str) -> bool:
        """Whether a request of `nbytes` would fit at this instant. A closed budget can allocate nothing."""
        return not self.ledger.closed and parse_bytes(nbytes) <= self.remaining()

    def footprint(self, nbytes: int) -> int:
        """Bytes that an array of `nbytes` takes up on this device: whole units of `unit_bytes` (512 on CUDA, 1 on the host)."""
        unit = self.unit_bytes
        return -(-nbytes // unit) * unit

    def allocate(self, nbytes: int) -> None:
        """Count `nbytes` as held, until `free`. Raises `BudgetExceeded` where they do not fit."""
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes)
        self.ledger.charge(nbytes, "allocate")

    def free(self, nbytes: int) -> None:
        """Give back `nbytes` of what `allocate` took; `ValueError` for more than that."""
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes)
        self.ledger.free(nbytes, "free")

    def charge(self, nbytes: int, what: str = "charge") -> Charge:
        """Count exactly `nbytes` as held by the handle that is returned, until its `release()` or its end.

        For bytes of an array on the device ask for `footprint(nbytes)`. Raises `BudgetExceeded` where they do not fit.
        """
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes)
        handle = Charge(self.ledger, what)
        self.ledger.charge(nbytes, what, handle)
        return handle

    def save(self, array: Any, what: str = "array") -> Saved:
        """Hold a NumPy, torch, CuPy or other DLPack array; `saved.load()` gives the same kind of array back.

        hold="pool" copies its bytes into the pool (packed if the array has gaps; a repeated dimension is stored once).
        hold="account" keeps the array itself and charges what it keeps alive: of a view, all the memory it looks into.
        When the bytes go back is told in `Saved`. Raises `BudgetExceeded` where they do not fit, `ValueError` for an array on
        another device, `TypeError` for what has no plain memory (sparse tensors, object arrays).
        """
        library = library_of(array)
        if self.hold == "account":
            charge = self.charge(self.footprint(storage_bytes(array, library)), what=what)
            return Saved(lambda: array, charge.release, charge.nbytes, what)
        device = device_of(array, library)
        if device != self.device:
            raise ValueError(
                f"{what!r} is on {device} and this budget's pool on {self.device}; move it, or use a budget there"
            )
        return self._save_in_pool(array, library, what)

    def reset_peak(self) -> None:
        """Start measuring the peak anew, from what is held now."""
        self.ledger.reset_peak()

    def step(self, label: str | int | None) -> None:
        """Say which step of a plan the events from now on belong to."""
        self.ledger.step = label
        self.ledger.mark("step", str(label))

    def events(self) -> list[Event]:
        """The last `log_events` events, oldest first."""
        return self.ledger.events()

    def snapshot(self) -> Snapshot:
        """The books at one instant."""
        return self.ledger.snapshot()

    def close(self) -> None:
        """Refuse every further request with `BudgetClosed` and give cached memory back. What is still held stays valid, and
        is released as ever."""
        self.ledger.close("this budget was closed; make a new CheckpointBudget")
        with self._pool_lock:
            if self._pool is not None:
                self._pool.trim()

    def __enter__(self) -> CheckpointBudget:
        self.ledger.check_open()
        # The one place where memory/ reaches up: torch's hooks live in the torch room, and whoever never enters a budget
        # never imports torch.
        from gpuckpt.pytorch import saved_tensors

        context = saved_tensors.enter(self)
        self._stack().append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack().pop().__exit__(kind, error, traceback)

    def __reduce__(self) -> Any:
        raise BudgetClosed(
            "a CheckpointBudget does not travel to another process: its memory and its books stay in this one; "
            "make a budget of its own in the worker"
        )

    def __copy__(self) -> CheckpointBudget:
        return self  # there is one cap: a copied model lives under the same

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointBudget:
        return self

    def __repr__(self) -> str:
        return (
            f"CheckpointBudget({format_bytes(self.used_bytes)} of {format_bytes(self.max_bytes)} used, "
            f"device={self.device!r}, hold={self.hold!r})"
        )

    def _stack(self) -> list[Any]:
        try:
            stack: list[Any] = self._entered.stack
        except AttributeError:
            stack = self._entered.stack = []
        return stack

    def _save_in_pool(self, array: Any, library: str, what: str) -> Saved:
        def take(nbytes: int) -> Any:
            return self._take(nbytes, what)

        store = {"numpy": store_numpy, "torch": store_torch_cpu}[library]
        block, load = store(array, take)
        return Saved(load, None, self.footprint(block.nbytes), what)

    def _take(self, nbytes: int, what: str) -> Any:
        """A block of the pool, charged at its footprint."""
        charge = Charge(self.ledger, what)
        self.ledger.reserve(self.footprint(nbytes), charge)
        try:
            block = self._own_pool().take(nbytes)
        except BaseException:
            self.ledger.cancel(charge)
            raise
        block.charge = charge
        self.ledger.commit(charge)
        return block

    def _own_pool(self) -> HostPool:
        with self._pool_lock:
            if self._pool is None:
                self._pool = HostPool(self.max_bytes)
            return self._pool
