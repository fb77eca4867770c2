"""The books: exact under threads, under the collector and under interrupts."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
import time

import pytest

from gpuckpt.errors import BudgetClosed, BudgetExceeded
from gpuckpt.memory import Charge, CheckpointBudget, Ledger


def test_accounting_as_the_seeds_do_it():
    budget = CheckpointBudget(100, device="cpu")
    budget.allocate(60)
    assert (budget.used_bytes, budget.remaining(), budget.utilization()) == (60, 40, 0.6)
    assert budget.can_allocate(40)
    assert not budget.can_allocate(41)
    with pytest.raises(BudgetExceeded, match="memory budget exceeded: need 41, available 40") as refusal:
        budget.allocate(41)
    assert (refusal.value.need, refusal.value.available) == (41, 40)
    assert budget.used_bytes == budget.peak_bytes == 60
    budget.free(20)
    assert (budget.used_bytes, budget.peak_bytes) == (40, 60)


def test_free_of_more_than_allocated_is_refused_and_changes_nothing():
    budget = CheckpointBudget(100, device="cpu")
    budget.allocate(10)
    held = budget.charge(30)
    with pytest.raises(ValueError, match="10 bytes allocated"):
        budget.free(11)
    assert budget.used_bytes == 40
    budget.free(10)
    held.release()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("nbytes", [-1, 1.5, True, None])
def test_a_size_that_is_none_is_refused(nbytes):
    budget = CheckpointBudget(100, device="cpu")
    for request in (budget.allocate, budget.free, budget.charge, budget.can_allocate):
        with pytest.raises((TypeError, ValueError)):
            request(nbytes)
    assert budget.snapshot()[1:4] == (0, 0, 0)


def test_zero_is_legal_and_holds_nothing():
    budget = CheckpointBudget("0", device="cpu")
    budget.allocate(0)
    assert budget.utilization() == 0.0
    assert budget.can_allocate(0)
    with pytest.raises(BudgetExceeded, match="need 1, available 0"):
        budget.charge(1)


def test_a_refusal_names_operation_shortfall_and_the_budget_that_would_do():
    budget = CheckpointBudget(1000, device="cpu")
    budget.allocate(700)
    with pytest.raises(BudgetExceeded, match=r"'fc1' is 100 bytes short: 700 of 1000 .* would have done is 1100 bytes"):
        budget.charge(400, "fc1")


def test_a_charge_is_released_once_and_when_collected():
    budget = CheckpointBudget(100, device="cpu")
    charge = budget.charge(40, "a")
    assert charge.nbytes == 40
    charge.release()
    charge.release()
    assert (budget.used_bytes, charge.nbytes) == (0, 0)
    budget.charge(50)
    assert budget.used_bytes == 0
    cycle = [budget.charge(60)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert budget.used_bytes == 0


def test_events_tell_what_happened_in_order_and_are_bounded():
    budget = CheckpointBudget(100, device="cpu", log_events=5)
    budget.step("forward 3")
    charge = budget.charge(30, "x")
    with pytest.raises(BudgetExceeded):
        budget.charge(80, "y")
    charge.release()
    log = [(event.kind, event.what, event.nbytes, event.used_bytes, event.step) for event in budget.events()]
    assert log == [
        ("step", "forward 3", 0, 0, "forward 3"),
        ("charge", "x", 30, 30, "forward 3"),
        ("refuse", "y", 80, 30, "forward 3"),
        ("release", "x", 30, 0, "forward 3"),
    ]
    times = [event.time_s for event in budget.events()]
    assert times == sorted(times)
    for _ in range(10):
        budget.charge(1)
    assert len(budget.events()) == 5
    assert budget.snapshot().refusals == 1


def test_reset_peak_starts_from_what_is_held():
    budget = CheckpointBudget(100, device="cpu")
    held = budget.charge(30)
    budget.charge(60).release()
    assert budget.peak_bytes == 90
    budget.reset_peak()
    assert budget.peak_bytes == 30
    held.release()


def test_a_closed_budget_refuses_requests_and_accepts_releases():
    budget = CheckpointBudget(100, device="cpu")
    charge = budget.charge(40)
    budget.close()
    budget.close()
    for request in (lambda: budget.allocate(0), lambda: budget.charge(1), lambda: budget.__enter__()):
        with pytest.raises(BudgetClosed, match="closed"):
            request()
    assert not budget.can_allocate(1)
    charge.release()
    assert budget.used_bytes == 0


def test_eight_threads_never_exceed_the_cap():
    budget = CheckpointBudget(1000, device="cpu", log_events=200_000)
    refused, stop = [0] * 8, time.perf_counter() + 2.0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def hammer(seat: int) -> None:
        rng, held = random.Random(seat), []
        while time.perf_counter() < stop:
            try:
                held.append(budget.charge(rng.randrange(300), "thread"))
            except BudgetExceeded:
                refused[seat] += 1
            if held and rng.random() < 0.6:
                victim = held.pop(rng.randrange(len(held)))
                if rng.random() < 0.5:
                    victim.release()
                del victim
        held.clear()

    try:
        threads = [threading.Thread(target=hammer, args=(seat,)) for seat in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    events = budget.events()
    print(
        f"8 threads: {len(events)} operations, {sum(refused)} refused, peak {budget.peak_bytes} of 1000, 0 violations"
    )
    assert sum(refused)
    assert max(event.used_bytes for event in events) <= 1000
    assert budget.used_bytes == 0
    if len(events) < 200_000:  # nothing forgotten: the log adds up, line by line
        used = 0
        for event in events:
            used += {"charge": event.nbytes, "release": -event.nbytes}.get(event.kind, 0)
            assert event.used_bytes == used


class Cyclic:
    """Garbage that gives its charge back only when the collector runs: inside some other call, perhaps of the same budget."""

    def __init__(self, charge):
        self.charge = charge
        self.me = self


def test_finalizers_inside_the_budgets_own_calls_keep_the_books_exact():
    budget = CheckpointBudget(10**9, device="cpu")
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(3000):
            Cyclic(budget.charge(7))
            budget.charge(3).release()
            budget.snapshot()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert budget.used_bytes == 0
    assert budget.snapshot().used_bytes == 0


def test_a_finalizer_does_not_wait_for_a_lock_that_another_thread_holds():
    ledger = Ledger(100)
    charge = Charge(ledger, "held elsewhere")
    ledger.charge(40, "held elsewhere", charge)
    locked, release = threading.Event(), threading.Event()

    def holder() -> None:
        with ledger._lock:
            locked.set()
            release.wait(10)

    thread = threading.Thread(target=holder)
    thread.start()
    locked.wait(10)
    start = time.perf_counter()
    del charge  # must not block, although the ledger is locked
    assert time.perf_counter() - start < 1.0
    release.set()
    thread.join()
    assert ledger.used_bytes == 0
    ledger.charge(100, "all of it again")


def test_two_budgets_whose_finalizers_cross_do_not_deadlock():
    budgets = [CheckpointBudget(10**9, device="cpu") for _ in range(2)]
    threshold = gc.get_threshold()

    def cross(mine: CheckpointBudget, other: CheckpointBudget) -> None:
        for _ in range(1500):
            Cyclic(other.charge(1))
            mine.charge(1).release()

    gc.set_threshold(1, 1, 1)
    try:
        threads = [threading.Thread(target=cross, args=pair, daemon=True) for pair in (budgets, budgets[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert [budget.used_bytes for budget in budgets] == [0, 0]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupts are sent by setitimer, which Windows lacks")
def test_ctrl_c_at_any_moment_leaks_nothing():
    """A signal whose handler raises, as Ctrl-C's does, lands anywhere inside save, charge and their releases."""
    import numpy as np

    budget = CheckpointBudget(10**6, device="cpu", hold="pool")
    array = np.zeros(100)
    budget.save(array).free()  # the pool is made, and NumPy's adapter loaded, before the first interrupt

    class Interrupt(BaseException):
        pass

    def raise_it(number, frame):
        raise Interrupt

    old = signal.signal(signal.SIGALRM, raise_it)
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    interrupts = 0
    rng = random.Random(0)
    stop = time.perf_counter() + 3.0
    try:
        while time.perf_counter() < stop:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 4e-4))
                for _ in range(100):  # not for ever: an interrupt inside a finalizer is reported there and swallowed
                    saved = budget.save(array)
                    charge = budget.charge(10)
                    charge.release()
                    saved.free()
            except Interrupt:
                interrupts += 1
            saved = charge = None
            assert budget.snapshot()[1::2][0] == 0, f"bytes leaked after {interrupts} interrupts"
            assert budget.snapshot().pending_bytes == 0
            assert budget._pool.live_bytes == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        sys.unraisablehook = hook
    print(f"{interrupts} interrupts, 0 bytes leaked")
    assert interrupts > 50


def test_a_printed_budget_is_a_table_of_what_is_held():
    budget = CheckpointBudget("1KiB", device="cpu", over_cap=("recompute", "raise"))
    charges = [budget.charge(100, "hidden state"), budget.charge(150, "hidden state"), budget.charge(300, "w" * 100)]
    budget.allocate(24)
    with pytest.raises(BudgetExceeded):
        budget.allocate(1000)
    heading, columns, *rows, figures = str(budget).splitlines()
    assert heading == 'budget of 1 KiB on cpu, hold="account", over the cap: recompute, raise'
    assert columns.split() == ["what", "pieces", "held"]
    assert [row.split()[1:] for row in rows[:1]] == [["1", "300", "B"]]
    assert [row.split() for row in rows[1:]] == [["hidden", "state", "2", "250", "B"], ["allocate", "1", "24", "B"]]
    assert figures == f"held 574 B (56.1%)   peak 574 B   free 450 B   refusals {budget.ledger.refusals}"
    assert max(map(len, str(budget).splitlines())) <= 80
    charges.clear()
    assert str(budget).splitlines()[2:-1] == ["allocate       1  24 B"]
    assert "\n" not in repr(budget)


READERS = {
    "used_bytes": lambda ledger: ledger.used_bytes,
    "snapshot": lambda ledger: ledger.snapshot().used_bytes,
    "held": lambda ledger: sum(nbytes for _, nbytes in ledger.held()),
    "events": lambda ledger: ledger.events()[-1].used_bytes,
    "reset_peak": lambda ledger: ledger.reset_peak() or ledger.peak_bytes,
    "charge": lambda ledger: ledger.charge(10, "all of it") or ledger._plain_bytes - 10,
    "reserve": lambda ledger: ledger.reserve(10, Charge(ledger, "all of it")) or ledger.pending_bytes - 10,
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_asks_first_after_a_handle_died_unbooked_finds_it_gone(reader):
    """The handle dies while another thread has the lock: its finalizer does not wait, the claim waits in the queue."""
    ledger = Ledger(10)
    handle = Charge(ledger, "x")
    ledger.charge(10, "x", handle)
    inside, leave = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with ledger._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold_the_lock)
    thread.start()
    inside.wait()
    del handle
    leave.set()
    thread.join()
    assert ledger._used_bytes == 10, "nobody has looked yet"
    assert READERS[reader](ledger) == 0


def test_every_figure_of_a_ledger_after_each_step():
    """One line an operation: used, peak, pending, charges, refusals, and the event that it wrote."""
    ledger = Ledger(100)
    first, second = Charge(ledger, "first"), Charge(ledger, "second")
    seen = []

    def look() -> None:
        _, used, peak, pending, charges, refusals = ledger.snapshot()
        event = ledger.events()[-1] if ledger.events() else None
        seen.append((used, peak, pending, charges, refusals, event and tuple(event[:4])))

    look()
    ledger.charge(60, "first", first)
    look()
    ledger.reserve(40, second)
    look()
    with pytest.raises(BudgetExceeded, match="'more' is 1 bytes short: 100 of 100 bytes are in use") as refusal:
        ledger.charge(1, "more")
    assert (refusal.value.need, refusal.value.available) == (1, 0)
    look()
    ledger.commit(second)
    look()
    ledger.shrink(second, 15)
    look()
    ledger.charge(25, "plain")
    look()
    ledger.free(5, "free")
    look()
    first.release()
    look()
    first.release()
    look()
    ledger.reset_peak()
    look()
    ledger.reserve(65, first)
    ledger.cancel(first)
    look()
    assert ledger.held() == [("second", 15)]
    assert seen == [
        (0, 0, 0, 0, 0, None),
        (60, 60, 0, 1, 0, ("charge", "first", 60, 60)),
        (60, 60, 40, 1, 0, ("charge", "first", 60, 60)),
        (60, 60, 40, 1, 1, ("refuse", "more", 1, 60)),
        (100, 100, 0, 2, 1, ("charge", "second", 40, 100)),
        (75, 100, 0, 2, 1, ("release", "second", 25, 75)),
        (100, 100, 0, 3, 1, ("allocate", "plain", 25, 100)),
        (95, 100, 0, 3, 1, ("free", "free", 5, 95)),
        (35, 100, 0, 3, 1, ("release", "first", 60, 35)),
        (35, 100, 0, 3, 1, ("release", "first", 60, 35)),
        (35, 35, 0, 3, 1, ("release", "first", 60, 35)),
        (35, 35, 0, 3, 1, ("release", "first", 60, 35)),
    ]


def test_a_handle_cannot_shrink_to_more_than_it_holds():
    ledger = Ledger(100)
    handle = Charge(ledger, "x")
    ledger.charge(10, "x", handle)
    with pytest.raises(ValueError, match="cannot shrink to 11 bytes"):
        ledger.shrink(handle, 11)
    ledger.shrink(handle, 10)
    assert ledger.used_bytes == handle.nbytes == 10
