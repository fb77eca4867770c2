"""A hard cap in bytes: the ledger, the pool behind them, and everything that is held under one limit.

What is counted: bytes charged with `charge`, taken with `allocate`, and held by arrays given to `save` or saved by autograd
inside `with budget:`. At no instant do they exceed `max_bytes`; a request that does not fit raises `BudgetExceeded` and
changes nothing. What is not counted is listed in `gpuckpt.memory.uncapped`.

hold="account"  leaves bytes where they are and counts them: no copy, right wherever another allocator owns the memory.
hold="pool"     moves bytes into the budget's own pool with its own limit: one copy, right where the cap must hold against the
                allocator itself, or where saved bytes shall not mix with its other blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

from gpuckpt.checks import check_choice, check_function, check_int
from gpuckpt.errors import BudgetClosed, BudgetExceeded
from gpuckpt.memory.adapters import form_of
from gpuckpt.memory.adapters.inspect import address_of, device_of, library_of, storage_bytes
from gpuckpt.memory.compression import parse_storage_dtype
from gpuckpt.memory.devices import choose_device, choose_streams
from gpuckpt.memory.eviction import Holders, make_room, parse_policies
from gpuckpt.memory.fork import renew_after_fork
from gpuckpt.memory.handles import Saved, SavedInPlace, SavedInPool
from gpuckpt.memory.ledger import Charge, Event, Ledger, Snapshot
from gpuckpt.memory.pools.host import HostPool
from gpuckpt.memory.protocols import Evictable, Pool
from gpuckpt.units import format_bytes, parse_bytes

__all__ = ["Budget"]

_CUDA_UNIT_BYTES = 512  # CuPy's pools hand out multiples of this


class Budget:
    """A cap of `max_bytes` (an int, or "256MiB"), its ledger and its pool. Thread-safe. Zero is legal and holds nothing.

    `device`: "cpu", "cuda", "cuda:N" or a torch device; None takes the current CUDA device where there is one.
    `hold`: "account" or "pool", see the module's docstring.
    `over_cap`: what to do when a request does not fit, in this order: see `gpuckpt.memory.eviction`. `spill_to`: the second
    budget, on the host and with hold="pool", for "spill". `storage_dtype`: for "compress", "float16" or another.
    `allocator`: what a CUDA pool draws from (`torch_allocator()`), or a host pool (`pinned_buffer`); None: its own.
    `streams`: "torch" or "cupy", on whose current stream a CUDA pool's blocks lie; None: see `gpuckpt.memory.pools.cupy`.
    `log_events`: how many events `events()` remembers.
    """

    device: str
    hold: str

    def __init__(
        self,
        max_bytes: int | str,
        *,
        device: Any = None,
        hold: Literal["account", "pool"] = "account",
        over_cap: Sequence[Any] | str = ("raise",),
        spill_to: Budget | None = None,
        storage_dtype: Any = None,
        allocator: Callable[..., Any] | None = None,
        streams: Literal["torch", "cupy"] | None = None,
        log_events: int = 4096,
    ) -> None:
        check_choice(hold, "hold", ("account", "pool"))
        self.storage_dtype = parse_storage_dtype(storage_dtype)
        self.over_cap = parse_policies(over_cap, spill_to, self.storage_dtype)
        self.spill_to = spill_to
        self.device = choose_device(device)
        self.hold = hold
        self.unit_bytes = 1 if self.device == "cpu" else _CUDA_UNIT_BYTES
        self.ledger = Ledger(
            parse_bytes(max_bytes, "max_bytes"), log_events=check_int(log_events, "log_events", 0, 2**31)
        )
        self.holders = Holders()
        # Held while a saved array moves; None where nothing ever moves, so that loading pays nothing for it.
        self.moving = (
            threading.RLock() if {"spill", "compress"} & {p for p in self.over_cap if isinstance(p, str)} else None
        )
        check_function(allocator, "allocator")
        self.allocator = allocator
        self.streams = choose_streams(streams)
        self._pool: Pool | None = None
        self._pool_lock = threading.RLock()
        # A refusal by the ledger is final and nothing has to be done around a request: the short way through.
        self._plain = self.over_cap == ("raise",)
        renew_after_fork(self)

    def after_fork(self) -> None:
        """In a child process: new locks, since a thread that does not exist there may have held the old ones."""
        self._pool_lock = threading.RLock()
        if self.moving is not None:
            self.moving = threading.RLock()

    @property
    def max_bytes(self) -> int:
        """The cap."""
        return self.ledger.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        if self._pool is not None:
            self._pool.collect()
        return self.ledger.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest `used_bytes` since the start or the last `reset_peak()`."""
        return self.ledger.peak_bytes

    def remaining(self) -> int:
        """Bytes that can still be had."""
        if self._pool is not None:
            self._pool.collect()
        now = self.ledger.snapshot()
        return now.max_bytes - now.used_bytes - now.pending_bytes

    def utilization(self) -> float:
        """Used share of the cap, from 0.0 to 1.0; 0.0 for a budget of zero."""
        return self.used_bytes / self.max_bytes if self.max_bytes else 0.0

    def can_allocate(self, nbytes: int | str) -> bool:
        """Whether a request of `nbytes` would fit at this instant. A closed budget can allocate nothing."""
        return not self.ledger.closed and parse_bytes(nbytes, "nbytes") <= self.remaining()

    def footprint(self, nbytes: int) -> int:
        """Bytes that an array of `nbytes` takes up on this device: whole units of `unit_bytes` (512 on CUDA, 1 on the host)."""
        if type(nbytes) is not int:
            nbytes = check_int(nbytes, "nbytes")
        return -(-nbytes // self.unit_bytes) * self.unit_bytes

    def allocate(self, nbytes: int) -> None:
        """Count `nbytes` as held, until `free`. Raises `BudgetExceeded` where they do not fit."""
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes, "nbytes")
        if self._plain:
            self.ledger.charge(nbytes, "allocate")
        else:
            self._admit(lambda: self._charge_beside_pool(nbytes, "allocate", None), nbytes, "allocate")

    def free(self, nbytes: int) -> None:
        """Give back `nbytes` of what `allocate` took; `ValueError` for more than that."""
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes, "nbytes")
        self.ledger.free(nbytes, "free")

    def charge(self, nbytes: int, what: str = "charge") -> Charge:
        """Count exactly `nbytes` as held by the handle that is returned, until its `release()` or its end.

        For bytes of an array on the device ask for `footprint(nbytes)`. Raises `BudgetExceeded` where they do not fit.
        """
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes, "nbytes")
        handle = Charge(self.ledger, what)
        if self._plain:
            self.ledger.charge(nbytes, what, handle)
        else:
            self._admit(lambda: self._charge_beside_pool(nbytes, what, handle), nbytes, what)
        return handle

    def save(self, array: Any, what: str = "array") -> Saved:
        """Hold a NumPy, torch, CuPy or other DLPack array; `saved.load()` gives the same kind of array back.

        hold="pool" copies its bytes into the pool (packed if the array has gaps; a repeated dimension is stored once), except
        for one that lies in a block of this pool already: that block is held on, and charged once.
        hold="account" keeps the array itself and charges what it keeps alive: of a view, all the memory it looks into.
        When the bytes go back is told in `Saved`. Raises `BudgetExceeded` where they do not fit, `ValueError` for an array on
        another device, `TypeError` for what has no plain memory (sparse tensors, object arrays).
        """
        library = library_of(array)
        if self.hold == "account":
            charge = self.charge(self.footprint(storage_bytes(array, library)), what)
            return self._offered(SavedInPlace(self, array, charge, what))
        device = device_of(array, library)
        if device != self.device:
            raise ValueError(
                f"{what!r} is on {device} and this budget's pool on {self.device}; move it, or use a budget there"
            )
        self.ledger.check_open()
        if self._pool is not None and self._pool.owns(address_of(array, library)):
            return SavedInPlace(self, array, None, what)
        form = form_of(array, library)
        block = self.take(form.nbytes, what)
        return self._offered(SavedInPool(self, form, block, form.write(array, block), what))

    def take(self, nbytes: int, what: str) -> Any:
        """An uninitialised block of the pool, charged at its footprint until it and all views of it are gone.

        `np.asarray(block)` looks at a host block, `block.pointer()` at a CUDA block, which lies on the current stream of the
        budget's library (`streams`). Raises `BudgetExceeded` where it does not fit, `TypeError` and `ValueError` for what is no
        count of bytes, `RuntimeError` while a CUDA graph is being captured.
        """
        if type(nbytes) is not int or nbytes < 0:
            nbytes = parse_bytes(nbytes, "nbytes")
        pool = self._pool or self._make_pool()
        charge = Charge(self.ledger, what)
        footprint_bytes = self.footprint(nbytes)
        block: Any = None

        def ask() -> None:
            nonlocal block
            with self._pool_lock:
                self.ledger.reserve(footprint_bytes, charge)
                try:
                    block = pool.take(nbytes, outside_bytes=self._held_beside_pool() - footprint_bytes)
                except BaseException:
                    self.ledger.cancel(charge)
                    raise
                block.charge = charge
                self.ledger.commit(charge)

        self._admit(ask, footprint_bytes, what)
        return block

    def prefetch(self, nbytes: int) -> None:
        """Bring one piece of `nbytes` into the pool's cache, before the first step of a plan whose peak that is.

        CuPy's pool cuts later requests from cached pieces and merges them again. What a plan holds ends in the reverse order of
        its beginning, so that in one piece as large as its peak no gaps arise, where pieces fetched one by one could refuse a
        certified plan. Host pools never cut a block and need nothing. Call it on the step's stream. Raises `BudgetExceeded`.
        """
        if self.hold == "pool" and self.device != "cpu" and nbytes:
            self.take(nbytes, "planned step")

    def retake(self, small: Any, charge: Charge) -> Any:
        """A block for the compressed form `small`, which takes over `charge` from the larger block that it replaces."""
        self.ledger.shrink(charge, self.footprint(small.nbytes))
        try:
            assert self._pool is not None, "what is compressed lay in the pool"
            with self._pool_lock:
                outside_bytes = self._held_beside_pool() - self.footprint(small.nbytes)
                block = self._pool.take(small.nbytes, outside_bytes=outside_bytes)
        except MemoryError:
            return small.loose(charge)
        small.store(block)
        block.charge = charge
        return block

    def owns(self, address: int) -> bool:
        """Whether a live block of this budget's pool begins at `address`."""
        return self._pool is not None and self._pool.owns(address)

    def offer(self, holder: Evictable) -> None:
        """Register something that can give bytes up when a request does not fit; oldest are asked first. Held weakly."""
        self.holders.add(holder)

    def withdraw(self, holder: Evictable) -> None:
        """Take back `offer`."""
        self.holders.discard(holder)

    def reset_peak(self) -> None:
        """Start measuring the peak again, from what is held now."""
        self.ledger.reset_peak()

    def step(self, label: str | int | None) -> None:
        """Say which step of a plan the events from now on belong to."""
        self.ledger.step = label
        self.ledger.mark("step", str(label))

    def events(self) -> list[Event]:
        """The last `log_events` events, oldest first."""
        return self.ledger.events()

    def snapshot(self) -> Snapshot:
        """The ledger's figures at one instant."""
        return self.ledger.snapshot()

    def close(self) -> None:
        """Refuse every further request with `BudgetClosed` and give cached memory back. What is still held stays valid, and
        is released as ever."""
        self.ledger.close("this budget was closed; make a new CheckpointBudget")
        with self._pool_lock:
            if self._pool is not None:
                self._pool.trim()

    def __reduce__(self) -> Any:
        raise BudgetClosed(
            "a budget does not travel to another process: its memory and its ledger stay in this one; "
            "make a budget of its own in the worker"
        )

    def __copy__(self) -> Budget:
        return self  # there is one cap: a copied model lives under the same

    def __deepcopy__(self, memo: dict[int, Any]) -> Budget:
        return self

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({format_bytes(self.used_bytes)} of {format_bytes(self.max_bytes)} used, "
            f"device={self.device!r}, hold={self.hold!r})"
        )

    def _offered(self, saved: SavedInPlace | SavedInPool) -> Saved:
        if self.moving is not None:
            self.holders.add(saved)
        return saved

    def _admit(self, ask: Callable[[], None], need_bytes: int, what: str) -> None:
        """Make a request: at once; after blocks that wait for their readers are back; after the policies made room."""
        try:
            ask()
            return
        except BudgetExceeded:
            waits = self._pool is not None and self._pool.waiting
            if not waits and self.over_cap == ("raise",):
                raise
        # Out of the handler: its traceback pins buffers that are about to go.
        if self._pool is not None:
            self._pool.collect(wait=True)
        if not make_room(self, ask, need_bytes, what):
            ask()  # raises for the reason that holds now

    def _held_beside_pool(self) -> int:
        """Bytes held or pending, less those in the pool's live blocks; both read again where a block died in between."""
        live_bytes, held_bytes = -1, 0
        while live_bytes != (live_bytes := 0 if self._pool is None else self._pool.live_bytes):
            held_bytes = self.ledger.used_bytes + self.ledger.pending_bytes
        return max(held_bytes - live_bytes, 0)

    def _charge_beside_pool(self, nbytes: int, what: str, handle: Charge | None) -> None:
        """Charge bytes outside of the pool: together with all that the pool has, cached blocks included, they fit the cap."""
        if (pool := self._pool) is None:
            return self.ledger.charge(nbytes, what, handle)
        with self._pool_lock:
            room_bytes = self.max_bytes - self.ledger.used_bytes - self.ledger.pending_bytes - nbytes
            if room_bytes < 0:  # refused here: a collection on the way to the ledger could let it pass, nothing trimmed
                self.ledger.refuse(nbytes, what)
            pool.trim(room_bytes)
            if room_bytes < (stuck_bytes := pool.cached_bytes):
                self.ledger.check_open()
                hint = (
                    f"{what!r} would fit, but {stuck_bytes} free bytes of the pool lie in pieces between held blocks and "
                    "cannot be given back (fragmentation); run under a plan, whose layout has no gaps, or raise the budget"
                )
                raise BudgetExceeded(nbytes, max(room_bytes + nbytes - stuck_bytes, 0), hint)
            self.ledger.charge(nbytes, what, handle)

    def _make_pool(self) -> Any:
        with self._pool_lock:
            if self._pool is None and self.device == "cpu":
                self._pool = HostPool(self.max_bytes, allocate=self.allocator)
            elif self._pool is None:
                from gpuckpt.memory.pools.cupy import CupyPool  # CuPy takes a second to load

                device_id = int(self.device.removeprefix("cuda:"))
                self._pool = CupyPool(self.max_bytes, device_id, allocator=self.allocator, library=self.streams)
            self._plain = False
            return self._pool
