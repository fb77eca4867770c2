"""`CheckpointBudget`: a hard cap in bytes that also holds, inside a `with` block, whatever autograd saves."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any

from gpuckpt.memory.budget import Budget
from gpuckpt.units import format_bytes

__all__ = ["CheckpointBudget"]


class CheckpointBudget(Budget):
    """A cap of `max_bytes` that also holds what autograd saves inside `with budget:`. Thread-safe.

    Args:
        max_bytes: an int, or a text like "256MiB". Zero is legal and holds nothing.
        device, hold, over_cap, spill_to, storage_dtype, allocator, log_events: as in `gpuckpt.memory.Budget`.

    `print(budget)` shows what is held and by what it is held. Raises `BudgetExceeded` for a request that does not fit, which
    changes nothing, and `ValueError` or `TypeError` for options that do not go together.

    >>> import torch
    >>> budget = CheckpointBudget("1KiB", device="cpu")
    >>> with budget:
    ...     y = torch.ones(8, requires_grad=True).exp()
    >>> budget.used_bytes, budget.peak_bytes, budget.max_bytes
    (32, 32, 1024)
    >>> print(budget)
    budget of 1 KiB on cpu, hold="account", over the cap: raise
    what          pieces  held
    saved tensor       1  32 B
    held 32 B (3.1%)   peak 32 B   free 992 B   refusals 0
    >>> del y
    >>> budget.used_bytes
    0
    """

    def __init__(self, max_bytes: int | str, *, device: Any = None, **options: Any) -> None:
        if device is None and not {"torch", "cupy"} & set(sys.modules) and _driver_is_there():
            import torch  # noqa: F401  # the judge of which device is the current one

        super().__init__(max_bytes, device=device, **options)
        self._entered = threading.local()

    def __enter__(self) -> CheckpointBudget:
        self.ledger.check_open()
        from gpuckpt.pytorch.engine import hooks  # a budget that is never entered never loads torch

        context = hooks.enter(self)
        self._stack().append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack().pop().__exit__(kind, error, traceback)

    def __str__(self) -> str:
        """A table: for each kind of thing that is held how many pieces and bytes, largest first, and the ledger's figures."""
        from gpuckpt.planning.tables import cut_text, text_table  # NumPy comes with it

        used_bytes, held = self.used_bytes, self.ledger.held()
        if (plain_bytes := used_bytes - sum(nbytes for _, nbytes in held)) > 0:
            held.append(("allocate", plain_bytes))
        pieces: dict[str, list[int]] = {}
        for what, nbytes in held:
            pieces.setdefault(what, []).append(nbytes)
        rows = [
            (cut_text(what, 48), str(len(sizes)), format_bytes(sum(sizes)))
            for what, sizes in sorted(pieces.items(), key=lambda item: (-sum(item[1]), item[0]))
        ]
        policies = ", ".join(p if isinstance(p, str) else getattr(p, "__name__", repr(p)) for p in self.over_cap)
        figures = {
            "held": f"{format_bytes(used_bytes)} ({100 * self.utilization():.1f}%)",
            "peak": format_bytes(self.peak_bytes),
            "free": format_bytes(self.remaining()),
            "refusals": str(self.ledger.refusals),
        }
        return "\n".join(
            [
                f'budget of {format_bytes(self.max_bytes)} on {self.device}, hold="{self.hold}", over the cap: {policies}',
                *text_table([("what", "pieces", "held"), *rows], (False, True, True), most_rows=20),
                "   ".join(f"{name} {figure}" for name, figure in figures.items()),
            ]
        )

    def _stack(self) -> list[Any]:
        try:
            stack: list[Any] = self._entered.stack
        except AttributeError:
            stack = self._entered.stack = []
        return stack


def _driver_is_there() -> bool:
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
