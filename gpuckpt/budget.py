"""`CheckpointBudget`: a hard cap in bytes that also holds, inside a `with` block, whatever autograd saves."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any

from gpuckpt.memory.budget import Budget

__all__ = ["CheckpointBudget"]


class CheckpointBudget(Budget):
    __doc__ = Budget.__doc__

    def __init__(self, max_bytes: int | str, *, device: Any = None, **options: Any) -> None:
        if device is None and not {"torch", "cupy"} & set(sys.modules) and _driver_is_there():
            import torch  # noqa: F401  # the judge of which device is the current one

        super().__init__(max_bytes, device=device, **options)
        self._entered = threading.local()

    def __enter__(self) -> CheckpointBudget:
        self.ledger.check_open()
        from gpuckpt.pytorch.engine import hooks  # whoever never enters a budget never loads torch

        context = hooks.enter(self)
        self._stack().append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack().pop().__exit__(kind, error, traceback)

    def _stack(self) -> list[Any]:
        try:
            stack: list[Any] = self._entered.stack
        except AttributeError:
            stack = self._entered.stack = []
        return stack


def _driver_is_there() -> bool:
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
