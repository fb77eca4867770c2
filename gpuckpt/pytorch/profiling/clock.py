"""What time is measured by: real seconds, or those that a roofline says."""

from __future__ import annotations

import time
from typing import Protocol

import torch

__all__ = ["Clock", "WallClock"]


class Clock(Protocol):
    """Seconds that have gone by, by whatever counts them. `exact`: the same work always takes the same."""

    exact: bool

    def now(self) -> float: ...


class WallClock:
    """Real seconds, the devices' work included."""

    exact = False

    def now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()
