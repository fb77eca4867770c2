"""Budgets in bytes: the ledger, the pools behind it, and arrays held in them. Knows neither torch nor Triton.

A `Budget` has a `Ledger`, which refuses what does not fit; a `Charge` is bytes held until it is released, a `Saved` an array:

    >>> import numpy as np
    >>> budget = Budget("1KiB", device="cpu")
    >>> charge = budget.charge(600, "a buffer")
    >>> saved = budget.save(np.zeros(50), "activations")
    >>> budget.ledger.held()
    [('a buffer', 600), ('activations', 400)]
    >>> budget.allocate(100)
    Traceback (most recent call last):
    gpuckpt.errors.BudgetExceeded: memory budget exceeded: need 100, available 24; ...
    >>> charge.release()
    >>> budget.snapshot().used_bytes, budget.snapshot().peak_bytes, budget.snapshot().refusals
    (400, 1000, 1)
    >>> [(event.kind, event.nbytes, event.used_bytes) for event in budget.events()]
    [('charge', 600, 600), ('charge', 400, 1000), ('refuse', 100, 1000), ('release', 600, 400)]

`Snapshot` is the ledger's figures at one instant, `Event` one line of its log.
"""

import sys
from typing import Any

from gpuckpt.memory.budget import Budget
from gpuckpt.memory.dlpack import exchange
from gpuckpt.memory.handles import Saved
from gpuckpt.memory.ledger import Charge, Event, Ledger, Snapshot
from gpuckpt.memory.replay import replay
from gpuckpt.memory.tracker import MemoryUsageTracker
from gpuckpt.units import format_bytes, parse_bytes

__all__ = [
    "Budget",
    "Charge",
    "Event",
    "Ledger",
    "MemoryUsageTracker",
    "Saved",
    "Snapshot",
    "exchange",
    "format_bytes",
    "parse_bytes",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name == "CheckpointBudget":  # it has moved up: a budget that autograd saves into knows torch
        return sys.modules["gpuckpt"].CheckpointBudget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
