"""Whole lives of a budget, driven at random, after each operation compared with what is really held, seen from outside.

A life: one budget with policies in some order, and some hundred operations: save, load, keep views, free, lose a handle in a
cycle, charge, evict, be refused, meet faults and exceptions, fork, change threads, collect garbage. "From outside" means by the
buffers that the allocator handed out and that are alive, by CUDA's own count, or by weak references to the arrays.
"""

from __future__ import annotations

import gc
import os
import random
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetClosed, BudgetExceeded
from gpuckpt.memory.compression import LooseBlock
from tests.memory.places import CAP, UNIT, Allocator, Interrupt

HOST_CAP = 14 * UNIT
OPERATIONS = 300  # of one life
NAMED = ("recompute", "spill", "compress")
# How often each is drawn.
KINDS = {
    "save": 24, "load": 14, "free": 9, "drop view": 8, "lose": 2, "lose in cycle": 2, "charge": 4, "release": 4, "allocate": 3,
    "free plain": 4, "offer": 3, "restore": 3, "evict": 8, "too large": 1, "break": 4, "trim": 2, "collect": 2, "together": 0.4,
    "fork": 0.05,
}  # fmt: skip


class PolicyFailed(Exception):
    """Raised by a user's policy."""


class Recomputable:
    """Bytes that can be computed again: given up when the budget asks."""

    def __init__(self, life: Life, nbytes: int) -> None:
        self.life, self.nbytes = life, nbytes
        self.held: Any = None
        self.restore()

    def restore(self) -> None:
        budget = self.life.budget
        if self.held is None:
            self.held = budget.take(self.nbytes, "r") if budget.hold == "pool" else budget.charge(self.nbytes, "r")
        budget.offer(self)

    def evict(self, how: str) -> int:
        if how != "recompute" or self.held is None:
            return 0
        self.held = None
        return self.life.budget.footprint(self.nbytes)


class Entry:
    """A saved array as the model knows it."""

    def __init__(self, handle: Any, array: Any, fill: int) -> None:
        self.handle, self.fill = handle, fill
        self.nbytes = int(array.nbytes)
        self.source = weakref.ref(array)


class Life:
    """One budget from its beginning to its end; the same seed gives the same life, but for threads and automatic collections."""

    def __init__(self, place: Any, seed: int, counts: Counter[str], threads: ThreadPoolExecutor) -> None:
        self.place, self.seed, self.counts, self.threads = place, seed, counts, threads
        self.rng = rng = random.Random(seed)
        policies: list[Any] = rng.sample([*NAMED, self.policy], rng.randint(0, 4))
        policies += ["raise"] if not policies or rng.random() < 0.3 else []
        dtype = rng.choice(["float16", "bfloat16", "float8_e4m3fn"])
        self.most_fill = 15 if dtype == "float8_e4m3fn" else 255  # what the smaller dtype holds exactly
        self.host_allocator = Allocator()
        self.host = CheckpointBudget(HOST_CAP, device="cpu", hold="pool", allocator=self.host_allocator)
        self.budget = place.make_budget(
            over_cap=tuple(policies), spill_to=self.host, storage_dtype=dtype, log_events=10**5
        )
        self.named = [policy for policy in policies if isinstance(policy, str)]
        self.entries: list[Entry] = []
        self.views: list[tuple[Any, int]] = []
        self.charges: list[Any] = []
        self.offered: list[Recomputable] = []
        self.handles: weakref.WeakSet[Any] = weakref.WeakSet()
        self.plain_bytes = self.highest_bytes = 0
        self.cycles = 0
        self.broken = self.in_policy = False

    def run(self) -> None:
        rng = self.rng
        automatic = rng.random() < 0.5  # collections in the middle of anything, or only where the life asks for one
        gc.disable()
        if automatic:
            gc.set_threshold(rng.randint(5, 200), 5, 5)
            gc.enable()
        try:
            for number in range(OPERATIONS):
                kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    self.one(kind)
                except AssertionError as error:
                    error.add_note(f"life {self.seed}, operation {number}: {kind}; over_cap={self.budget.over_cap}")
                    self.counts["violations"] += 1
                    raise
            self.end()
        finally:
            gc.set_threshold(700, 10, 10)
            gc.enable()

    def one(self, kind: str) -> None:
        before_bytes = self.budget.used_bytes
        operation = getattr(self, kind.replace(" ", "_").replace("break", "break_"))
        try:
            if self.rng.random() < 0.15:
                self.counts["on another thread"] += 1
                self.threads.submit(operation).result()
            else:
                operation()
            self.counts[kind] += 1
        except PolicyFailed:
            self.counts["exceptions of a policy"] += 1
        except Interrupt:
            self.counts["interrupts"] += 1
        except (BudgetExceeded, MemoryError) as error:
            self.counts["faults met" if self.broken else "refused"] += 1
            if not self.broken:
                self.check_refusal(error, before_bytes)
        if kind != "break":
            self.heal()
        self.counts["operations"] += 1
        self.check()

    def check_refusal(self, error: BaseException, before_bytes: int) -> None:
        assert isinstance(error, BudgetExceeded), error
        now_bytes = self.budget.used_bytes
        assert now_bytes <= before_bytes, "a refused request left bytes on the ledger"
        if "fragmentation" not in str(error) and not self.cycles:
            assert now_bytes + error.need > CAP, f"refused although it fits: {error}"

    def heal(self) -> None:
        self.broken = False
        self.place.heal()
        self.host_allocator.fault = None

    def check(self) -> None:
        """The ledger against what is held, with no collection between two figures."""
        automatic = gc.isenabled()
        gc.disable()
        try:
            self.compare()
        finally:
            if automatic:
                gc.enable()

    def compare(self) -> None:
        used_bytes = self.budget.used_bytes
        books = self.budget.snapshot()
        self.highest_bytes = max(self.highest_bytes, used_bytes)
        assert books.pending_bytes == 0
        assert used_bytes <= books.peak_bytes <= CAP
        assert self.highest_bytes <= books.peak_bytes
        beside_bytes = self.plain_bytes + sum(charge.nbytes for charge in self.charges)
        pool = self.budget._pool
        if self.budget.hold == "account":
            handles = list(self.handles)
            own = sum(h.nbytes for h in handles) + sum(r.nbytes for r in self.offered if r.held is not None)
            assert used_bytes == beside_bytes + own, (used_bytes, beside_bytes, own)
            for entry in self.entries:
                spilled = entry.nbytes > 0 and entry.handle.nbytes == 0
                if not spilled:
                    assert entry.source() is not None, "charged, and not there"
                elif not self.views and entry.source() is not None:
                    gc.collect()  # tracebacks of what was injected
                    assert entry.source() is None, "spilled, and still there"
        elif pool is not None:
            loose_bytes = sum(h.nbytes for h in self.handles if isinstance(h._block, LooseBlock))
            held_bytes = self.place.held_bytes()
            live_bytes, cached_bytes = pool.live_bytes, pool.cached_bytes
            assert held_bytes == live_bytes + cached_bytes, (held_bytes, live_bytes, cached_bytes)
            assert held_bytes + beside_bytes + loose_bytes <= CAP, (held_bytes, beside_bytes, loose_bytes)
            assert used_bytes == live_bytes + beside_bytes + loose_bytes, (used_bytes, live_bytes, beside_bytes)
        spill = self.host._pool
        if spill is not None:
            held_bytes = self.host_allocator.held_bytes()
            assert held_bytes == spill.live_bytes + spill.cached_bytes <= HOST_CAP
            assert self.host.used_bytes == spill.live_bytes

    def end(self) -> None:
        """Everything is given back, whatever it had been through; a closed budget gives what it holds and takes nothing."""
        self.heal()
        self.budget.close()
        for entry in self.entries:
            if not (entry.nbytes and entry.handle.nbytes == 0):  # what was spilled would need a new block
                self.verify(entry)
        for size in (0, 1):
            with pytest.raises(BudgetClosed):
                self.budget.save(self.place.full(size, 1, False))
        entry = None
        self.entries.clear(), self.views.clear(), self.charges.clear(), self.offered.clear()
        self.budget.free(self.plain_bytes)
        self.plain_bytes = 0
        gc.collect()
        self.check()
        assert self.budget.used_bytes == self.host.used_bytes == 0
        for budget in (self.budget, self.host):
            if budget._pool is not None:
                budget._pool.trim(0)
        assert self.host_allocator.held_bytes() == 0
        assert self.budget._pool is None or self.place.held_bytes() == 0
        self.counts.update({f"{e.kind} by policy": 1 for e in self.budget.events() if e.kind in NAMED})
        self.counts["lives"] += 1

    # One operation each.

    def save(self) -> None:
        entry = self.saved(self.rng, 8 * UNIT)
        self.entries.append(entry)

    def saved(self, rng: random.Random, most_bytes: int) -> Entry:
        floats, fill = rng.random() < 0.7, rng.randint(1, self.most_fill)
        nbytes = rng.choice([0, 4, UNIT, 3 * UNIT, rng.randrange(most_bytes)])
        array = self.place.full(nbytes // 4 if floats else nbytes, fill, floats)
        handle = self.budget.save(array)
        self.handles.add(handle)
        return Entry(handle, array, fill)

    def verify(self, entry: Entry) -> Any:
        view = entry.handle.load()
        if self.budget.hold == "account":  # the array itself; another one once it was spilled
            entry.source = weakref.ref(view)
        assert view.nbytes == entry.nbytes
        assert bool((view == entry.fill).all()), "another array's bytes"
        return view

    def load(self) -> None:
        if self.entries:
            entry = self.rng.choice(self.entries)
            away = entry.nbytes and entry.handle.nbytes == 0
            view = self.verify(entry)
            self.counts["brought back"] += bool(away)
            if self.rng.random() < 0.4:
                self.views.append((view[self.rng.randrange(len(view)) :] if len(view) else view, entry.fill))

    def drop_view(self) -> None:
        if self.views:
            view, fill = self.views.pop(self.rng.randrange(len(self.views)))
            assert bool((view == fill).all()), "a block was given to somebody else while a view was out"

    def free(self) -> None:
        if self.entries:
            self.taken_out().handle.free()

    def taken_out(self) -> Entry:
        return self.entries.pop(self.rng.randrange(len(self.entries)))

    def lose(self) -> None:
        if self.entries:
            self.taken_out()

    def lose_in_cycle(self) -> None:
        if self.entries:
            cycle: list[Any] = [self.taken_out()]
            cycle.append(cycle)
            self.cycles += 1

    def collect(self) -> None:
        gc.collect()
        self.cycles = 0

    def charge(self) -> None:
        self.charges.append(self.budget.charge(self.rng.randrange(6 * UNIT)))

    def release(self) -> None:
        if self.charges:
            self.charges.pop(self.rng.randrange(len(self.charges))).release()

    def allocate(self) -> None:
        nbytes = self.rng.randrange(4 * UNIT)
        self.budget.allocate(nbytes)
        self.plain_bytes += nbytes

    def free_plain(self) -> None:
        nbytes = self.rng.randint(0, self.plain_bytes)
        self.budget.free(nbytes)
        self.plain_bytes -= nbytes

    def offer(self) -> None:
        if len(self.offered) < 4:
            self.offered.append(Recomputable(self, self.rng.randrange(1, 5 * UNIT)))
        else:
            self.offered.pop(0)

    def restore(self) -> None:
        if self.offered:
            self.rng.choice(self.offered).restore()

    def evict(self) -> None:
        holders = [*(entry.handle for entry in self.entries), *self.offered]
        if holders and self.budget.moving is not None:
            how, before_bytes = self.rng.choice(NAMED), self.budget.used_bytes
            freed_bytes = self.rng.choice(holders).evict(how)
            now_bytes = self.budget.used_bytes
            assert now_bytes + freed_bytes <= before_bytes if self.cycles else now_bytes + freed_bytes == before_bytes
            self.counts[f"evict: {how}"] += bool(freed_bytes)

    def too_large(self) -> None:
        with pytest.raises(BudgetExceeded) as error:
            self.budget.save(self.place.full(CAP + 1, 1, False))
        assert error.value.need > CAP

    def trim(self) -> None:
        if self.budget._pool is not None:
            self.budget._pool.trim(self.rng.randrange(CAP))

    def policy(self, budget: Any, need_bytes: int, what: str) -> bool:
        """A user's: it fails, frees something, or does nothing."""
        self.counts["asked a policy"] += 1
        if self.rng.random() < 0.1:
            raise PolicyFailed
        if self.charges and self.rng.random() < 0.5:
            self.charges.pop(0).release()
            return True
        return False

    def break_(self) -> None:
        self.broken = True
        self.counts["faults injected"] += 1
        self.place.break_(self.rng)
        self.host_allocator.fault = self.rng.choice([None, MemoryError, Interrupt])

    def together(self) -> None:
        """Two threads at a time."""
        seeds = [self.rng.randrange(2**32) for _ in range(2)]
        for future in [self.threads.submit(self.beside, seed) for seed in seeds]:
            future.result()

    def beside(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5):
            try:
                entry = self.saved(rng, 5 * UNIT)
                self.verify(entry)
                entry.handle.free()
            except (BudgetExceeded, PolicyFailed):
                continue

    def fork(self) -> None:
        """A child may read and let go of what the budget holds, and ask for nothing."""
        before_bytes = self.budget.used_bytes
        child = os.fork()
        if child == 0:
            passed = False
            try:
                passed = self.in_child(before_bytes)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0 if passed else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child's budget is not what the parent's was"
        assert self.budget.used_bytes <= before_bytes

    def in_child(self, before_bytes: int) -> bool:
        assert self.budget.used_bytes <= before_bytes
        for entry in self.entries:
            if entry.handle.nbytes:
                self.verify(entry)
        entry = None
        with pytest.raises(BudgetClosed, match="belongs to the process"):
            self.save()
        self.entries.clear()
        self.check()
        return True


def live(place: Any, operations: int, seed: int, enough: Callable[[], bool] = lambda: False) -> Counter[str]:
    """Lives one after the other until so many operations are done, or `enough()`; what was done."""
    counts: Counter[str] = Counter()
    gc.collect()
    gc.freeze()  # a collection looks at what the lives made, and not at all that pytest has loaded
    try:
        with ThreadPoolExecutor(2) as threads:
            while counts["operations"] < operations and not enough():
                Life(place, seed, counts, threads).run()
                seed += 1
    finally:
        gc.unfreeze()
    return counts
