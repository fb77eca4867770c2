"""Budgets in bytes: the books, the pools behind them, arrays held in them, and how a planned step is laid out."""

from gpuckpt.memory.budget import CheckpointBudget
from gpuckpt.memory.dlpack import exchange
from gpuckpt.memory.layout import Slab, lay_out
from gpuckpt.memory.ledger import Charge, Event, Ledger, Snapshot
from gpuckpt.memory.saved import Saved
from gpuckpt.memory.sizes import format_bytes, parse_bytes
from gpuckpt.memory.tracker import MemoryUsageTracker

__all__ = [
    "Charge",
    "CheckpointBudget",
    "Event",
    "Ledger",
    "MemoryUsageTracker",
    "Saved",
    "Slab",
    "Snapshot",
    "exchange",
    "format_bytes",
    "lay_out",
    "parse_bytes",
]
