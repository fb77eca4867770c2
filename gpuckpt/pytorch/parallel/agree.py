"""One plan on all ranks, without a word between them.

A collective inside a block (tensor parallelism, FSDP, SyncBatchNorm, an all-to-all) runs again when the block is recomputed, and
has to meet the same block's on the other ranks: ranks that recompute different blocks get wrong numbers, or wait for ever. What
tells plans apart is seconds, which every rank measures on its own clock. So in a job of several ranks the seconds are those of a
roofline: they follow from shapes alone, and ranks with the same shapes and the same budget get the same plan.

No collective is used for it: a rank that meets a new batch size alone would wait in it for the others.
"""

from __future__ import annotations

import torch

from gpuckpt.kernels.audit.roofline import device
from gpuckpt.pytorch.profiling.clock import Clock, WallClock
from gpuckpt.pytorch.profiling.roofline_clock import Roofline

__all__ = ["clock_for_plans"]

_DEVICE = "H100 SXM"  # any one: stages are compared with each other


def clock_for_plans() -> Clock:
    """Real seconds; in a job of several ranks those of a roofline, which are the same on each."""
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return Roofline(device(_DEVICE)) if several else WallClock()
