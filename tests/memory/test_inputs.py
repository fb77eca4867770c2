"""Parameters of gpuckpt.memory, gpuckpt.units and CheckpointBudget with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.memory import Budget, MemoryUsageTracker, exchange, format_bytes, parse_bytes, replay
from tests.inputs import Call, Make, rows_of


def budget_used(**options: Any) -> None:
    budget = Budget(**options)
    saved = budget.save(np.zeros(3))
    assert saved.load().tolist() == [0.0, 0.0, 0.0]
    saved.free()
    assert budget.used_bytes == 0
    assert len(budget.events()) == min(options["log_events"], 2)
    repr(budget)


def checkpoint_budget_used(**options: Any) -> None:
    budget = CheckpointBudget(**options)
    with budget:
        torch.ones(3, requires_grad=True).exp().sum().backward()
    assert budget.used_bytes == 0


def with_budget(method: str) -> Any:
    def call(**arguments: Any) -> None:
        for hold in ("account", "pool"):
            budget = Budget(1000, device="cpu", hold=hold)
            budget.allocate(10)
            getattr(budget, method)(**arguments)
            assert 0 <= budget.used_bytes <= 1000
            assert budget.snapshot().pending_bytes == 0

    return call


def with_tracker(method: str) -> Any:
    def call(**arguments: Any) -> None:
        tracker = MemoryUsageTracker()
        tracker.record_stored_activation(100)
        tracker.record_gradient(100)
        getattr(tracker, method)(**arguments)
        tracker.summary()

    return call


OPTIONS = {"max_bytes": 1000, "device": "cpu", "hold": "account", "over_cap": ("raise",), "spill_to": None}
CALLS = {
    "Budget": Call(budget_used, **OPTIONS, storage_dtype=None, allocator=None, streams=None, log_events=10),
    "Budget in a pool": Call(budget_used, **OPTIONS | {"hold": "pool"}, log_events=10),
    "CheckpointBudget": Call(
        checkpoint_budget_used, **OPTIONS, storage_dtype=None, allocator=None, streams=None, log_events=10
    ),
    "can_allocate": Call(with_budget("can_allocate"), nbytes=10),
    "footprint": Call(with_budget("footprint"), nbytes=10),
    "allocate": Call(with_budget("allocate"), nbytes=10),
    "free": Call(with_budget("free"), nbytes=10),
    "charge": Call(with_budget("charge"), nbytes=10, what="x"),
    "save": Call(with_budget("save"), names={"array": "'x'"}, array=Make(lambda: np.zeros(3)), what="x"),
    "take": Call(with_budget("take"), nbytes=10, what="x"),
    "prefetch": Call(with_budget("prefetch"), nbytes=10),
    "owns": Call(with_budget("owns"), address=10),
    "step": Call(with_budget("step"), label="x"),
    "exchange": Call(exchange, array=Make(lambda: np.zeros(3)), library="torch"),
    "replay": Call(
        replay,
        names={"events": "event 0 of the log"},
        events=Make(lambda: [("charge", "x", 10, 10, 0.0, None)]),
        budget=Make(lambda: Budget(1000, device="cpu")),
    ),
    "parse_bytes": Call(parse_bytes, size="1MiB"),
    "format_bytes": Call(format_bytes, nbytes=10),
    **{
        f"tracker.{name}": Call(with_tracker(name), nbytes=10)
        for name in (
            "record_stored_activation",
            "release_stored_activation",
            "record_recomputed",
            "record_gradient",
            "release_gradient",
        )
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


@pytest.mark.parametrize(
    "allocator",
    [
        lambda n: np.empty(n + 1, np.uint8),
        lambda n: np.empty(n - 1, np.uint8),
        lambda n: None,
        bytes,
        int,
        lambda n: [0] * n,
    ],
)
def test_an_allocator_that_returns_something_else_is_refused(allocator):
    """A smaller buffer would be written past its end, a larger one held and not counted."""
    budget = Budget(1000, device="cpu", hold="pool", allocator=allocator)
    with pytest.raises(TypeError, match="allocator returned"):
        budget.save(np.zeros(3))
    assert budget.snapshot()[1:4] == (0, 0, 0)
    assert budget._pool.live_bytes == budget._pool.cached_bytes == 0
