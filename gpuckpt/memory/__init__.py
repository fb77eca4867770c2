"""Budgets in bytes: the ledger, the pools behind it, and arrays held in them. Knows neither torch nor Triton."""

import sys
from typing import Any

from gpuckpt.memory.budget import Budget
from gpuckpt.memory.dlpack import exchange
from gpuckpt.memory.handles import Saved
from gpuckpt.memory.ledger import Charge, Event, Ledger, Snapshot
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
]


def __getattr__(name: str) -> Any:
    if name == "CheckpointBudget":  # it has moved up: a budget that autograd saves into knows torch
        return sys.modules["gpuckpt"].CheckpointBudget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
