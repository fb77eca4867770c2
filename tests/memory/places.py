"""Where a budget of `lives.py` lives: its arrays, its memory as seen from outside, and how to make that fail."""

from __future__ import annotations

import random
import weakref
from typing import Any

import numpy as np
import torch

from gpuckpt import CheckpointBudget

UNIT = 512
CAP = 24 * UNIT


class Interrupt(BaseException):
    """What may come at any point, as Ctrl-C does."""


class Allocator:
    """Host memory, with the buffers that are alive; fails once when told to."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.fault: type[BaseException] | None = None
        self._number = 0

    def __call__(self, nbytes: int) -> Any:
        if self.fault is not None:
            raise self.fault("injected")
        buffer = np.empty(nbytes, np.uint8)
        self._number += 1
        self.alive[self._number] = nbytes
        weakref.finalize(buffer, self.alive.pop, self._number).atexit = False
        return buffer

    def held_bytes(self) -> int:
        return sum(self.alive.values())


class HostPlace:
    """NumPy arrays and a host budget. `hold`: as of the budget."""

    unit_bytes = 1

    def __init__(self, hold: str) -> None:
        self.hold = hold

    def make_budget(self, **options: Any) -> CheckpointBudget:
        self.allocator = Allocator()
        own = {"allocator": self.allocator} if self.hold == "pool" else {}
        return CheckpointBudget(CAP, device="cpu", hold=self.hold, **own, **options)

    def full(self, count: int, fill: int, floats: bool) -> Any:
        return np.full(count, fill, np.float32 if floats else np.uint8)

    def held_bytes(self) -> int:
        return self.allocator.held_bytes()

    def break_(self, rng: random.Random) -> None:
        self.allocator.fault = rng.choice([MemoryError, Interrupt])

    def heal(self) -> None:
        self.allocator.fault = None


class CupyPlace:
    """torch tensors that say they are on the stand-in device, and CuPy's own pool there."""

    unit_bytes = UNIT
    hold = "pool"

    def __init__(self, cuda_tensors: Any) -> None:
        self.tensors, self.cuda = cuda_tensors, cuda_tensors.hostcuda

    def make_budget(self, **options: Any) -> CheckpointBudget:
        self.tensors.taken.clear()
        self.before_bytes = self.cuda.used_bytes()
        return self.tensors.budget(CAP, **options)

    def full(self, count: int, fill: int, floats: bool) -> Any:
        return torch.full((count,), fill, dtype=torch.float32 if floats else torch.uint8)

    def held_bytes(self) -> int:
        return self.cuda.used_bytes() - self.before_bytes

    def break_(self, rng: random.Random) -> None:
        self.cuda.fail_allocation(0)

    def heal(self) -> None:
        self.cuda.fail_allocation(-1)
