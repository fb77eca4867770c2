"""Where a step's time and bytes go: ranges in profiles, and a line for each stage on stderr.

A profile by `torch.profiler` shows `gpuckpt/forward/stage3` and `gpuckpt/recompute/stage3` around what runs there; within
`torch.autograd.profiler.emit_nvtx()` they are NVTX ranges. Nothing is marked while nothing profiles.

`GPUCKPT_TRACE=1` prints once for each stage what a plan does with it, when the plan is made.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.profiler import record_function

from gpuckpt.planning import Chain, Plan
from gpuckpt.planning.report import explain
from gpuckpt.pytorch._torch_internals import is_profiling
from gpuckpt.units import format_bytes

__all__ = ["PlanTrace", "stage_range"]

_NOTHING = nullcontext()


def stage_range(stage: int, *, recompute: bool) -> AbstractContextManager[Any]:
    """The range around a call that is part of stage number `stage`."""
    if not is_profiling():
        return _NOTHING
    return record_function(f"gpuckpt/{'recompute' if recompute else 'forward'}/stage{stage}")


class PlanTrace:
    """Says on stderr what plans do with the stages of one model, each thing once; says nothing unless GPUCKPT_TRACE is set."""

    def __init__(self) -> None:
        self._told: set[tuple[int, str, str]] = set()

    def tell(self, chain: Chain, plan: Plan) -> None:
        """Print what `plan` does with each stage of `chain`, but for what was printed before."""
        if os.environ.get("GPUCKPT_TRACE", "") in ("", "0"):
            return
        for stage in explain(chain, plan).stages:
            told = stage.number, stage.name, stage.fate
            if told not in self._told:
                self._told.add(told)
                print(
                    f"gpuckpt: {chain.name} stage{stage.number} {stage.name}: {stage.fate}, runs {stage.runs} times, saves "
                    f"{format_bytes(stage.saves_bytes)}; {stage.why}",
                    file=sys.stderr,
                )
