"""The cap as a state machine: random requests, releases, views, threads' leftovers and faults, on both pools, with the books
checked against a model after every single operation. The run prints how much it did; `make nightly` does a hundred times more.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded

UNIT = 512
CAP = 24 * UNIT
KINDS = [
    "save",
    "save",
    "save",
    "load",
    "free",
    "free",
    "drop view",
    "charge",
    "release",
    "allocate",
    "free plain",
    "break allocator",
    "trim",
]


class Books(RuleBasedStateMachine):
    """`counts` adds up over all runs. The model knows what each live object weighs; everything else is asked of the budget."""

    counts: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.budget = self.make_budget()
        self.saved: list[tuple[object, int, int]] = []  # (handle, footprint, fill)
        self.views: list[tuple[object, int, int, int]] = []  # (view, footprint, fill, id of its handle)
        self.charges: list[tuple[object, int]] = []
        self.plain_bytes = self.peak_bytes = 0
        self.broken = False

    @rule(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def one(self, kind, seed):
        self.do(kind, random.Random(seed))

    @rule(seed=st.integers(0, 2**32 - 1))
    def burst(self, seed):
        rng = random.Random(seed)
        for _ in range(40):
            self.do(rng.choice(KINDS), rng)

    def do(self, kind: str, rng: random.Random) -> None:
        before = self.expected_bytes()
        try:
            getattr(self, kind.replace(" ", "_"))(rng)
        except (BudgetExceeded, self.system_error) as error:
            self.counts["faults met" if self.broken else "refused"] += 1
            if not self.broken:
                self.check_refusal(error, before)
            assert self.budget.used_bytes == before, "a failed request changed the ledger"
            self.heal()
        del kind
        self.counts["operations"] += 1
        self.check()

    def check_refusal(self, error: BaseException, before: int) -> None:
        assert isinstance(error, BudgetExceeded)
        if "fragmentation" not in str(error):
            assert before + error.need > CAP, f"refused although it fits: {error}"

    def check(self) -> None:
        expected = self.expected_bytes()
        self.peak_bytes = max(self.peak_bytes, expected)
        books = self.budget.snapshot()
        pool = self.budget._pool
        good = (
            self.budget.used_bytes == expected
            and expected <= CAP
            and books.peak_bytes == self.peak_bytes
            and books.pending_bytes == 0
            and (pool is None or pool.live_bytes == expected - self.plain_bytes - sum(n for _, n in self.charges))
            and (pool is None or pool.live_bytes + pool.cached_bytes <= CAP)
            and (pool is None or expected + pool.cached_bytes <= CAP)
        )
        if not good:
            self.counts["violations"] += 1
        assert good, (expected, books, pool and (pool.live_bytes, pool.cached_bytes))

    def expected_bytes(self) -> int:
        blocks = {id(handle): nbytes for handle, nbytes, _ in self.saved}
        blocks |= {key: nbytes for _, nbytes, _, key in self.views}
        return sum(blocks.values()) + sum(n for _, n in self.charges) + self.plain_bytes

    def save(self, rng) -> None:
        nbytes, fill = rng.choice([0, 1, UNIT, 3 * UNIT, rng.randrange(8 * UNIT)]), rng.randrange(256)
        handle = self.budget.save(self.array(nbytes, fill))
        self.saved.append((handle, self.budget.footprint(nbytes), fill))

    def load(self, rng) -> None:
        if self.saved:
            handle, nbytes, fill = rng.choice(self.saved)
            view = handle.load()
            assert (self.read(view) == fill).all(), "a block was given to somebody else"
            if rng.random() < 0.5:
                # A key that outlives the handle: ids may be reused, handles in `keep` may not die before their views.
                self.views.append(
                    (view[: rng.randrange(1 + view.size)] if view.size else view, nbytes, fill, id(handle))
                )
                self.keep(handle)

    def keep(self, handle) -> None:
        self.__dict__.setdefault("kept", []).append(handle)

    def free(self, rng) -> None:
        if self.saved:
            handle, _, _ = self.saved.pop(rng.randrange(len(self.saved)))
            handle.free()

    def drop_view(self, rng) -> None:
        if self.views:
            view, _, fill, _ = self.views.pop(rng.randrange(len(self.views)))
            assert (self.read(view) == fill).all(), "a block was given to somebody else while a view was out"

    def charge(self, rng) -> None:
        nbytes = rng.randrange(8 * UNIT)
        self.charges.append((self.budget.charge(nbytes), nbytes))

    def release(self, rng) -> None:
        if self.charges:
            handle, _ = self.charges.pop(rng.randrange(len(self.charges)))
            if rng.random() < 0.5:
                handle.release()

    def allocate(self, rng) -> None:
        nbytes = rng.randrange(6 * UNIT)
        self.budget.allocate(nbytes)
        self.plain_bytes += nbytes

    def free_plain(self, rng) -> None:
        nbytes = rng.randint(0, self.plain_bytes)
        self.budget.free(nbytes)
        self.plain_bytes -= nbytes

    def trim(self, rng) -> None:
        if self.budget._pool is not None:
            self.budget._pool.trim(rng.randrange(CAP))

    def teardown(self) -> None:
        self.heal()
        self.saved.clear(), self.views.clear(), self.charges.clear()
        self.__dict__.pop("kept", None)
        self.budget.free(self.plain_bytes)
        self.plain_bytes = 0
        self.check()


class HostBooks(Books):
    counts: ClassVar[Counter[str]] = Counter()
    system_error = MemoryError

    def make_budget(self) -> CheckpointBudget:
        from gpuckpt.memory.pools.host import aligned_buffer

        def allocate(nbytes):
            if self.broken:
                self.counts["faults injected"] += 1
                raise MemoryError("injected")
            return aligned_buffer(nbytes)

        return CheckpointBudget(CAP, device="cpu", hold="pool", allocator=allocate)

    def array(self, nbytes, fill):
        return np.full(nbytes, fill, np.uint8)

    def read(self, view):
        return view

    def break_allocator(self, rng) -> None:
        self.broken = True

    def heal(self) -> None:
        self.broken = False


class CupyBooks(Books):
    counts: ClassVar[Counter[str]] = Counter()
    hostcuda = None
    system_error = BudgetExceeded

    def make_budget(self) -> CheckpointBudget:
        return CheckpointBudget(CAP, device="cuda:0", hold="pool")

    def array(self, nbytes, fill):
        cupy = self.hostcuda.cupy
        source = cupy.ndarray((nbytes,), np.uint8, memptr=self.scratch())
        if nbytes:
            cupy.cuda.runtime.memset(source.data.ptr, fill, nbytes)
        return source

    def scratch(self):
        # One source outside of every pool, so that a fault hits the budget's own allocations only.
        if not hasattr(self, "_scratch"):
            cuda = self.hostcuda.cupy.cuda
            self._scratch = cuda.MemoryPointer(cuda.Memory(CAP), 0)
        return self._scratch

    def read(self, view):
        return view.get()

    def heal(self) -> None:
        self.broken = False
        self.hostcuda.set_capacity(1 << 30)

    def break_allocator(self, rng) -> None:
        self.scratch()
        self.broken = True
        self.counts["faults injected"] += 1
        self.hostcuda.set_capacity(self.hostcuda.used_bytes())


def run(machine: type[Books], operations: int) -> None:
    """Run examples until `operations` operations are done, and print what was done."""
    machine.counts = Counter()
    # CuPy collects garbage before it refuses; what pytest has loaded by now is not to be looked through each time.
    gc.collect()
    gc.freeze()
    try:
        _run_until(machine, operations)
    finally:
        gc.unfreeze()
    counts = machine.counts
    print(f"\n{machine.__name__}: " + ", ".join(f"{counts[what]} {what}" for what in
          ("operations", "refused", "faults injected", "faults met", "violations")))  # fmt: skip
    assert counts["violations"] == 0
    assert counts["refused"] > operations // 100
    assert counts["faults met"] > operations // 1000


def _run_until(machine: type[Books], operations: int) -> None:
    while machine.counts["operations"] < operations:
        left = operations - machine.counts["operations"]
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max(5, min(200, left // 700)),
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_the_host_pool_under_ten_thousand_operations():
    run(HostBooks, 10_000)


def test_cupys_pool_under_ten_thousand_operations(hostcuda):
    CupyBooks.hostcuda = hostcuda
    run(CupyBooks, 10_000)


@pytest.mark.slow
def test_the_host_pool_under_a_million_operations():
    run(HostBooks, 1_000_000)


@pytest.mark.slow
def test_cupys_pool_under_a_million_operations(hostcuda):
    CupyBooks.hostcuda = hostcuda
    run(CupyBooks, 1_000_000)
