"""Every exception of gpuckpt.

`CheckpointError` is the root. User mistakes are also `ValueError` or `TypeError`; running out of a budget is also a
`MemoryError`, so that code which already handles CuPy's or Python's out-of-memory handles ours.

    >>> issubclass(BudgetExceeded, MemoryError), issubclass(DimMismatch, ValueError)
    (True, True)
    >>> BudgetExceeded(need=300, available=100).need
    300
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BudgetClosed",
    "BudgetExceeded",
    "CheckpointError",
    "CheckpointLimit",
    "DLPackRefused",
    "DimMismatch",
    "EmptyPipeline",
    "EmptySegments",
    "InvalidChain",
    "InvalidPlan",
    "NotCheckpointed",
    "OffloadFailed",
    "PromiseBroken",
    "RecomputeMismatch",
    "SavedTensorModified",
    "StateModified",
]


class CheckpointError(Exception):
    """The root of gpuckpt's exceptions."""


class BudgetExceeded(CheckpointError, MemoryError):
    """A request does not fit in a budget. The request changed nothing.

    Attributes: `need` and `available`, in bytes; `hint`, what to do about it.
    """

    def __init__(self, need: int, available: int, hint: str = "raise the budget or recompute more") -> None:
        super().__init__(need, available, hint)
        self.need = need
        self.available = available
        self.hint = hint

    def __str__(self) -> str:
        return f"memory budget exceeded: need {self.need}, available {self.available}; {self.hint}"


class BudgetClosed(CheckpointError, RuntimeError):
    """A budget was used after `close()`, or in a process it does not belong to."""


class EmptySegments(CheckpointError, ValueError):
    """A network of no segments has no output."""

    def __init__(self) -> None:
        super().__init__("a checkpointed network needs at least one segment; got none")


class EmptyPipeline(CheckpointError, ValueError):
    """A pipeline of no segments has no output."""

    def __init__(self) -> None:
        super().__init__("a checkpointed pipeline needs at least one segment; got none")


class DimMismatch(CheckpointError, ValueError):
    """A dimension differs from what a layer was built for. Attributes: `expected`, `got`."""

    def __init__(self, expected: int, got: int, what: str = "dimension") -> None:
        super().__init__(expected, got, what)
        self.expected = expected
        self.got = got
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} mismatch: expected {self.expected}, got {self.got}"


class CheckpointLimit(CheckpointError, RuntimeError):
    """As many activations are stored as a checkpointer may store. Attribute: `limit`."""

    def __init__(self, limit: int, what: str) -> None:
        super().__init__(limit, what)
        self.limit = limit
        self.what = what

    def __str__(self) -> str:
        return (
            f"{self.what} cannot be stored: max_checkpoints={self.limit} are stored already; raise it, or clear() first"
        )


class NotCheckpointed(CheckpointError, RuntimeError):
    """A backward or a recompute was asked for where nothing was stored: run forward first."""


class SavedTensorModified(CheckpointError, RuntimeError):
    """A tensor was changed in place after it had been saved for backward."""


class RecomputeMismatch(CheckpointError, RuntimeError):
    """A recompute did not produce what the first forward produced."""


class StateModified(SavedTensorModified, RecomputeMismatch):
    """A parameter or buffer was changed in place between the forward of checkpointed work and its recompute."""


class InvalidChain(CheckpointError, ValueError):
    """No chain that can be planned: empty, costs that are negative, NaN or infinite, or a model without sequential blocks."""


class InvalidPlan(CheckpointError, ValueError):
    """A plan that does not belong to its chain, or whose stored form is damaged."""


class PromiseBroken(CheckpointError, RuntimeError):
    """A run held more bytes than its plan had promised. Attributes: `promised_bytes`, `measured_bytes`."""

    def __init__(self, promised_bytes: int, measured_bytes: int, hint: str) -> None:
        super().__init__(promised_bytes, measured_bytes, hint)
        self.promised_bytes = promised_bytes
        self.measured_bytes = measured_bytes
        self.hint = hint

    def __str__(self) -> str:
        return f"the plan promised a peak of {self.promised_bytes} bytes and the run held {self.measured_bytes}; {self.hint}"


class OffloadFailed(CheckpointError, RuntimeError):
    """A copy to the host, or back from it, failed."""


class DLPackRefused(CheckpointError, TypeError):
    """An array cannot be exchanged without a copy; the message names the reason."""


class BackendUnavailable(CheckpointError, ImportError):
    """An optional package or a device is missing; the message names what to install."""
