"""The ledger's log as a trace in Chrome's format."""

from __future__ import annotations

import doctest
import json

import pytest

import gpuckpt
from gpuckpt.memory import Budget
from gpuckpt.report import ledger
from gpuckpt.report.ledger import chrome_trace


def test_the_trace_holds_what_the_log_holds() -> None:
    budget = Budget(1000, device="cpu", log_events=100)
    budget.step("forward")
    budget.allocate(300)
    budget.step("backward")
    budget.allocate(500)
    with pytest.raises(gpuckpt.BudgetExceeded):
        budget.allocate(900)
    budget.free(300)
    budget.free(500)
    rows = json.loads(json.dumps(chrome_trace(budget.events())))["traceEvents"]
    held = [row["args"]["bytes"] for row in rows if row["ph"] == "C"]
    assert held == [event.used_bytes for event in budget.events()]
    assert (max(held), held[-1]) == (800, 0)
    ranges = [row for row in rows if row["ph"] == "X"]
    assert [row["name"] for row in ranges] == ["forward", "backward"]
    assert ranges[0]["ts"] + ranges[0]["dur"] == pytest.approx(ranges[1]["ts"], abs=0.01)
    assert [row["name"] for row in rows if row["ph"] == "i"] == ["refuse"]
    assert all(row["ts"] >= 0 and row.get("dur", 0) >= 0 for row in rows)


def test_an_empty_log_is_an_empty_trace() -> None:
    assert chrome_trace([]) == {"traceEvents": []}


def test_the_examples() -> None:
    assert doctest.testmod(ledger).failed == 0
