"""Faults for budgets: the n-th request of bytes is refused, wherever in the program it comes from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.memory import Ledger


class Fault:
    """Counts the requests that one budget's ledger gets, and refuses number `n` (0: the next one) as if it were full."""

    def __init__(self, ledger: Ledger, n: int | None) -> None:
        self.ledger = ledger
        self.n = n
        self.requests = 0
        self.fired = False

    def meets(self, ledger: Ledger) -> bool:
        """Count a request; True for the one to refuse."""
        if ledger is not self.ledger:
            return False
        self.requests += 1
        self.fired = self.fired or self.requests - 1 == self.n
        return self.requests - 1 == self.n


@pytest.fixture
def fail_request(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fault]:
    """`fault = fail_request(budget, n)`: the n-th `charge`, `allocate` or `save` of the budget from now on raises
    `BudgetExceeded`, once; n=None only counts (`fault.requests`). Arming again replaces the fault."""
    armed: list[Fault] = []
    charge, reserve = Ledger.charge, Ledger.reserve

    def failing_charge(self, nbytes, what, handle=None):
        if armed and armed[0].meets(self):
            raise self.refused(nbytes, what)
        charge(self, nbytes, what, handle)

    def failing_reserve(self, nbytes, handle):
        if armed and armed[0].meets(self):
            raise self.refused(nbytes, handle.what)
        reserve(self, nbytes, handle)

    monkeypatch.setattr(Ledger, "charge", failing_charge)
    monkeypatch.setattr(Ledger, "reserve", failing_reserve)

    def arm(budget: CheckpointBudget, n: int | None) -> Fault:
        armed[:] = [Fault(budget.ledger, n)]
        return armed[0]

    return arm
