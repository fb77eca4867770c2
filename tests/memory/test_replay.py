"""A ledger's log replayed against other budgets: the same peak, refused at the same byte, and nothing left behind."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from torch import nn

import gpuckpt
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import Budget, replay
from tests.pytorch.steps import batch, blocks


@pytest.fixture(scope="module")
def traced() -> tuple[list[list[Any]], int]:
    """The log of two training steps, as a file of JSON gives it back, and the peak that the ledger measured."""
    fitted = gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)
    budget = fitted.budget
    for _ in range(2):
        fitted(batch()).square().sum().backward()
    assert budget.used_bytes == 0
    return json.loads(json.dumps(budget.events())), budget.peak_bytes


def test_a_training_step_fits_where_it_was_promised_to(traced: Any) -> None:
    log, peak_bytes = traced
    budget = Budget(peak_bytes, device="cpu")
    assert replay(log, budget) == budget.peak_bytes == peak_bytes
    assert budget.used_bytes == 0


def test_a_byte_less_is_refused_at_the_step_of_the_peak(traced: Any) -> None:
    log, peak_bytes = traced
    budget = Budget(peak_bytes - 1, device="cpu")
    budget.step("mine")
    with pytest.raises(
        BudgetExceeded, match=r"event \d+ of the log \(charge of 'saved tensor'\), in step '"
    ) as refusal:
        replay(log, budget)
    number = next(i for i, row in enumerate(log) if row[3] == peak_bytes)
    assert f"event {number} of the log" in refusal.value.hint
    assert repr(log[number][5]) in refusal.value.hint
    assert budget.used_bytes == 0
    assert budget.ledger.step == "mine"


def test_beside_what_a_budget_holds_already(traced: Any) -> None:
    log, peak_bytes = traced
    budget = Budget(peak_bytes + 100, device="cpu")
    held = budget.charge(100, "mine")
    assert replay(log, budget) == peak_bytes
    assert budget.peak_bytes == peak_bytes + 100
    held.release()
    held = budget.charge(101, "mine")
    with pytest.raises(BudgetExceeded):
        replay(log, budget)
    assert budget.used_bytes == held.nbytes == 101


@pytest.mark.parametrize("seed", range(20))
def test_any_use_of_a_budget_has_the_peak_that_its_ledger_measured(seed: int) -> None:
    draw = random.Random(seed)
    budget = Budget(10_000, device="cpu", log_events=draw.choice([15, 1000]))
    held: list[Any] = []
    used = []
    for _ in range(80):
        if held and draw.random() < 0.45:
            held.pop(draw.randrange(len(held))).release()
        else:
            try:
                held.append(budget.charge(draw.randrange(2500), "x"))
            except BudgetExceeded:
                assert budget.events()[-1].kind == "refuse"
        used.append(budget.used_bytes)
    log = budget.events()
    expected = max(
        max(event.used_bytes for event in log), log[0].used_bytes + log[0].nbytes * (log[0].kind == "release")
    )
    other = Budget(expected, device="cpu")
    assert replay(log, other) == expected
    assert other.used_bytes == 0
    assert len(log) == 15 or expected == budget.peak_bytes == max(used)
    for few_bytes in (expected - 1, 0):
        small = Budget(few_bytes, device="cpu")
        with pytest.raises(BudgetExceeded):
            replay(log, small)
        assert small.used_bytes == 0


def test_what_is_no_log_is_refused_and_holds_nothing(traced: Any) -> None:
    log, _ = traced
    budget = Budget("1GiB", device="cpu")
    for broken in (
        7,
        [1, 2],
        ["charge", "x", -1, 0, 0.0, None],
        ["charge", "x", 1.5, 0, 0.0, None],
        [None, "x", 1, 1, 0.0, 0],
    ):
        with pytest.raises(ValueError, match="event 1 of the log"):
            replay([log[0], broken, *log[2:]], budget)
    charge = next(number for number, row in enumerate(log) if row[0] == "charge" and row[2] and number)
    cut = [row for number, row in enumerate(log) if number != charge]
    less = copy.deepcopy(log)
    less[-1][2] += 1
    for damaged in (cut, less):
        with pytest.raises(ValueError, match="a part is missing"):
            replay(damaged, budget)
    assert replay([], budget) == 0
    assert budget.used_bytes == 0
