"""The ledger of one budget: who holds how many bytes, admitted or refused in one step.

Exact under threads, under the garbage collector and under Ctrl-C:

* Every change happens under one re-entrant lock, in a straight run of integer arithmetic. CPython runs finalizers and
  signal handlers only at calls, backward jumps and container allocations, so none of them ever sees a half-written ledger.
* A handle's bytes stand on its claim, which the ledger keeps: a weak reference whose callback is `deque.append` itself. When
  the handle dies the claim is in the queue without a line of Python having run, so neither a lock held elsewhere nor an
  interrupt can get in between; whatever reads or changes the ledger empties the queue first.
* A handle's finalizer books it at once where it can, so that the log has the right time. It never waits, and it does not
  matter if it is cut short: the queue has the claim. Two budgets whose finalizers run inside each other's calls cannot
  deadlock.
* A claim gets its bytes in the same step in which they are booked, so that an interrupt cannot leave bytes without
  an owner.

The ledger knows numbers only. Where bytes live is the pools' matter, what to do when they do not fit is the budget's.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

from gpuckpt.errors import BudgetClosed, BudgetExceeded
from gpuckpt.memory.fork import renew_after_fork

__all__ = ["Charge", "Event", "Ledger", "Snapshot"]


class Event(NamedTuple):
    """One line of the log. `kind`: charge, release, allocate, free, refuse, step, or the name of an eviction."""

    kind: str
    what: str
    nbytes: int
    used_bytes: int  # after the event
    time_s: float  # of time.perf_counter
    step: str | int | None  # of the plan, as last set


class Snapshot(NamedTuple):
    """The ledger's figures at one instant. `pending_bytes` are admitted, while a pool is still looking for their place."""

    max_bytes: int
    used_bytes: int
    peak_bytes: int
    pending_bytes: int
    charges: int
    refusals: int


class _Claim(weakref.ref["Charge"]):
    """What one handle holds. Outlives the handle by as long as it takes to book its end."""

    __slots__ = ("held_bytes", "pending_bytes", "what")

    held_bytes: int
    pending_bytes: int  # reserved, not committed yet
    what: str


class Charge:
    """Bytes held in a ledger until `release()`, or until the handle is collected. Thread-safe."""

    __slots__ = ("__weakref__", "_claim", "_ledger")

    def __init__(self, ledger: Ledger, what: str) -> None:
        self._ledger = ledger
        self._claim = claim = _Claim(self, ledger._when_dead)
        claim.held_bytes = claim.pending_bytes = 0
        claim.what = what
        ledger._claims.add(claim)

    @property
    def nbytes(self) -> int:
        """Bytes this handle still holds: 0 once released."""
        return self._claim.held_bytes

    @property
    def what(self) -> str:
        """What the bytes are, as it was said when they were charged."""
        return self._claim.what

    def release(self) -> None:
        """Give the bytes back. The second time does nothing."""
        self._ledger.release(self)

    def __del__(self) -> None:
        claim = self._claim
        if claim.held_bytes:
            self._ledger._try_to_book(claim)

    def __repr__(self) -> str:
        return f"Charge({self.nbytes} bytes, {self.what!r})"


class Ledger:
    """Counts bytes up to `max_bytes`. Sizes given to it are non-negative ints; the budget checks what users pass.

    `log_events`: how many events are remembered; the oldest are forgotten first.
    """

    __slots__ = (
        "__weakref__",
        "_claims",
        "_closed_because",
        "_dead",
        "_events",
        "_limit_bytes",
        "_lock",
        "_pending_bytes",
        "_plain_bytes",
        "_used_bytes",
        "_when_dead",
        "charges",
        "max_bytes",
        "peak_bytes",
        "refusals",
        "step",
    )

    def __init__(self, max_bytes: int, *, log_events: int = 4096) -> None:
        self.max_bytes = max_bytes
        self.peak_bytes = self.charges = self.refusals = 0
        self.step: str | int | None = None
        self._used_bytes = self._pending_bytes = self._plain_bytes = 0
        # What admission compares with: max_bytes, or -1 once closed, so that an open ledger pays nothing for the check.
        self._limit_bytes = max_bytes
        self._closed_because: str | None = None
        self._lock = threading.RLock()
        self._events: deque[list[Any]] = deque(maxlen=log_events)
        self._claims: set[_Claim] = set()
        self._dead: deque[_Claim] = deque()
        self._when_dead = self._dead.append
        renew_after_fork(self)

    @property
    def used_bytes(self) -> int:
        """Bytes held at this instant."""
        if self._dead:
            with self._lock:
                self._book_dead()
        return self._used_bytes

    @property
    def pending_bytes(self) -> int:
        """Bytes that are admitted, while a pool looks for their place."""
        return self._pending_bytes

    def charge(self, nbytes: int, what: str, handle: Charge | None = None) -> None:
        """Book `nbytes` to `handle`, or as plain accounting without one. Raises `BudgetExceeded` and then changes nothing."""
        # Built before anything is read: the container may start a collection, whose finalizers change the ledger.
        event = ["charge" if handle is not None else "allocate", what, nbytes, 0, perf_counter(), self.step]
        with self._lock:
            if self._dead:
                self._book_dead()
            used = self._used_bytes + nbytes
            if used + self._pending_bytes > self._limit_bytes:
                self.refuse(nbytes, what)
            self._used_bytes = used
            if used > self.peak_bytes:
                self.peak_bytes = used
            if handle is None:
                self._plain_bytes += nbytes
            else:
                handle._claim.held_bytes += nbytes
            self.charges += 1
            event[3] = used
            self._events.append(event)

    def free(self, nbytes: int, what: str) -> None:
        """Take `nbytes` of plain accounting off the ledger; `ValueError` where fewer were allocated."""
        event = ["free", what, nbytes, 0, perf_counter(), self.step]
        with self._lock:
            plain = self._plain_bytes - nbytes
            if plain < 0:
                raise ValueError(
                    f"free(nbytes={nbytes}) of a budget with {self._plain_bytes} bytes allocated; "
                    "free at most what allocate() took (arrays and charges are released by their own handles)"
                )
            self._plain_bytes = plain
            self._used_bytes -= nbytes
            event[3] = self._used_bytes
            self._events.append(event)

    def reserve(self, nbytes: int, handle: Charge) -> None:
        """Admit `nbytes` that do not exist yet: a pool now looks for their place. `commit` or `cancel` follows."""
        with self._lock:
            if self._dead:
                self._book_dead()
            if self._used_bytes + self._pending_bytes + nbytes > self._limit_bytes:
                self.refuse(nbytes, handle.what)
            self._pending_bytes += nbytes
            handle._claim.pending_bytes += nbytes

    def commit(self, handle: Charge) -> None:
        """What was reserved for `handle` now exists, and the handle holds it."""
        claim = handle._claim
        event = ["charge", claim.what, 0, 0, perf_counter(), self.step]
        with self._lock:
            nbytes = claim.pending_bytes
            used = self._used_bytes + nbytes
            self._pending_bytes -= nbytes
            claim.pending_bytes = 0
            claim.held_bytes += nbytes
            self._used_bytes = used
            if used > self.peak_bytes:
                self.peak_bytes = used
            self.charges += 1
            event[2] = nbytes
            event[3] = used
            self._events.append(event)

    def cancel(self, handle: Charge) -> None:
        """What was reserved for `handle` found no place."""
        with self._lock:
            claim = handle._claim
            self._pending_bytes -= claim.pending_bytes
            claim.pending_bytes = 0

    def shrink(self, handle: Charge, nbytes: int) -> None:
        """Let `handle` hold `nbytes` from now on, at most what it holds already."""
        event = ["release", handle.what, 0, 0, perf_counter(), self.step]
        with self._lock:
            less = handle._claim.held_bytes - nbytes
            if less < 0:
                raise ValueError(f"{handle!r} cannot shrink to {nbytes} bytes")
            handle._claim.held_bytes = nbytes
            self._used_bytes -= less
            event[2] = less
            event[3] = self._used_bytes
            self._events.append(event)

    def release(self, handle: Charge) -> None:
        """Take what `handle` holds off the ledger; nothing where it holds nothing."""
        with self._lock:
            self._book_end(handle._claim)

    def refused(self, need_bytes: int, what: str) -> BudgetExceeded:
        """The error for a request of `need_bytes`, with the ledger as it is now."""
        held = self._used_bytes + self._pending_bytes
        available = max(self.max_bytes - held, 0)
        return BudgetExceeded(
            need_bytes,
            available,
            f"{what!r} is {need_bytes - available} bytes short: {held} of {self.max_bytes} bytes are in use, and the smallest "
            f"budget that would have done is {held + need_bytes} bytes; raise the budget or recompute more",
        )

    def mark(self, kind: str, what: str, nbytes: int = 0) -> None:
        """Write a line in the log that changes no figure."""
        event = [kind, what, nbytes, 0, perf_counter(), self.step]
        with self._lock:
            event[3] = self._used_bytes
            self._events.append(event)

    def reset_peak(self) -> None:
        """Forget the highest `used_bytes` seen: what is held now is the new peak."""
        with self._lock:
            self._book_dead()
            self.peak_bytes = self._used_bytes

    def events(self) -> list[Event]:
        """The remembered events, oldest first."""
        with self._lock:
            self._book_dead()
            return [Event(*event) for event in self._events]

    def held(self) -> list[tuple[str, int]]:
        """What each live handle holds, as it was named when it was charged, and its bytes, in the order of the names."""
        with self._lock:
            self._book_dead()
            return sorted((claim.what, claim.held_bytes) for claim in list(self._claims) if claim.held_bytes)

    def snapshot(self) -> Snapshot:
        """All numbers of one instant."""
        with self._lock:
            self._book_dead()
            return Snapshot(
                self.max_bytes, self._used_bytes, self.peak_bytes, self._pending_bytes, self.charges, self.refusals
            )

    @property
    def closed(self) -> bool:
        """True once `close()` was called, or in a process that forked off the ledger's own."""
        return self._closed_because is not None

    def check_open(self) -> None:
        """Raise `BudgetClosed` where nothing may be asked for any more."""
        if self._closed_because is not None:
            raise BudgetClosed(self._closed_because)

    def close(self, because: str) -> None:
        """Refuse every further request with `BudgetClosed(because)`; releases go on working."""
        with self._lock:
            self._closed_because = because
            self._limit_bytes = -1

    def refuse(self, nbytes: int, what: str) -> NoReturn:
        """Raise for a request that does not fit, and count it."""
        if self._closed_because is not None:
            raise BudgetClosed(self._closed_because)
        self.refusals += 1
        self._events.append(["refuse", what, nbytes, self._used_bytes, perf_counter(), self.step])
        raise self.refused(nbytes, what)

    def _try_to_book(self, claim: _Claim) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._book_end(claim)
            finally:
                self._lock.release()

    def _book_dead(self) -> None:
        # Booked before it leaves the queue: booking a claim again does nothing, losing one would. A finalizer or a signal
        # handler inside this loop may have emptied the queue meanwhile.
        dead = self._dead
        while dead:
            try:
                claim = dead[0]
                self._book_end(claim)
                self._claims.discard(claim)
                if dead[0] is claim:
                    dead.popleft()
            except IndexError:
                return

    def _book_end(self, claim: _Claim) -> None:
        """Book that a claim ends. The caller holds the lock."""
        event = ["release", claim.what, 0, 0, perf_counter(), self.step]
        nbytes = claim.held_bytes
        self._used_bytes -= nbytes
        self._pending_bytes -= claim.pending_bytes
        claim.held_bytes = claim.pending_bytes = 0
        event[2] = nbytes
        event[3] = self._used_bytes
        if nbytes:
            self._events.append(event)

    def after_fork(self) -> None:
        """In a child process: close. The lock may have been held by a thread that does not exist there."""
        self._lock = threading.RLock()
        self._closed_because = (
            "this budget belongs to the process that made it, not to its fork; make a new CheckpointBudget here"
        )
        self._limit_bytes = -1
