"""How fast saved tensors go to the host and come back, timed with the very code that offloads them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from gpuckpt.memory import Budget
from gpuckpt.pytorch.engine.copies import Copies
from gpuckpt.pytorch.engine.offload import Spill
from gpuckpt.pytorch.profiling.clock import Clock

__all__ = ["Link", "measure_link"]

_SMALL_BYTES, _SMALL_COUNT = 4096, 16
_LARGE_BYTES = 8 << 20
_REPEATS = 3


class Link(NamedTuple):
    """What moving one storage costs, one way: `latency_s`, and its bytes by `bytes_per_s`."""

    bytes_per_s: float
    latency_s: float


def measure_link(device: torch.device, host: Budget, clock: Clock, copies: Copies) -> Link:
    """Time spills of tensors of `device`, small and large, there and back; one way is half of that."""
    large = torch.ones(_LARGE_BYTES, dtype=torch.uint8, device=device)
    small = [torch.ones(_SMALL_BYTES, dtype=torch.uint8, device=device) for _ in range(_SMALL_COUNT)]
    with _like(host, 2 * _LARGE_BYTES) as (budget, there):
        latency_s = _round_trip_s(small, budget, there, clock, copies) / (2 * _SMALL_COUNT)
        large_s = _round_trip_s([large], budget, there, clock, copies) / 2
    return Link(_LARGE_BYTES / max(large_s - latency_s, large_s / 2), latency_s)


@contextmanager
def _like(host: Budget, nbytes: int) -> Iterator[tuple[Budget, Budget]]:
    """A pair of budgets for trials, so that the ledgers of the real ones stay as they are."""
    there = Budget(nbytes, device="cpu", hold="pool", allocator=host.allocator)
    yield Budget(2 * nbytes, device="cpu"), there
    there.close()


def _round_trip_s(tensors: list[torch.Tensor], budget: Budget, host: Budget, clock: Clock, copies: Copies) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):  # the first warms up
        began_s = clock.now()
        spill = Spill(budget, host, copies)
        parts = [spill.hold(tensor) for tensor in tensors]
        spill.send()
        spill.let_go()
        spill.bring_back()
        seconds.append(clock.now() - began_s)
        del parts, spill
    return statistics.median(seconds[1:])
