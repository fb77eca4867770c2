"""One forward of a fitted model: which of the planned calls have come, and which others."""

from __future__ import annotations

from torch import nn

from gpuckpt.planning import Simulation, simulate
from gpuckpt.pytorch.other_calls import ExtraCall, call_like, without
from gpuckpt.pytorch.plan_maker import Planned
from gpuckpt.pytorch.plan_runner import Walk

__all__ = ["StepProgress"]


class StepProgress:
    """`position`: how many of the planned calls have come, or were skipped; `running`: whether one is going on; `count`: how many
    have come; `extra`: calls that were not planned. `spare_bytes`: what the plan leaves of the budget."""

    __slots__ = ("count", "extra", "given", "planned", "position", "running", "skipped", "spare_bytes", "walk")

    def __init__(self, planned: Planned, walk: Walk, given: frozenset[int], spare_bytes: int) -> None:
        self.planned = planned
        self.walk = walk
        self.given = given  # ids of the model's own arguments
        self.spare_bytes = spare_bytes
        self.position = self.count = 0
        self.skipped: list[int] = []
        self.extra: list[ExtraCall] = []
        self.running = False

    def planned_call(self, module: nn.Module) -> int | None:
        """The number of the planned call that a call of `module` is; blocks that are skipped leave a gap. None: it is none."""
        modules = self.planned.measured.modules
        number = next((n for n in range(self.position, len(modules)) if modules[n] is module), None)
        if number is not None:
            self.skipped += range(self.position, number)
            self.position = number + 1
            self.count += 1
        return number

    def extra_call(self, module: nn.Module) -> bool:
        """Note a call that was not planned. Whether to recompute it: where keeping it takes more than the plan leaves."""
        measured = self.planned.measured
        like = call_like(measured, module, self.position)
        if like is None:
            return False
        self.extra.append(ExtraCall(self.position, module, like))
        stage = measured.chain.stages[measured.owned[like]]
        if (nbytes := measured.chain.charge(stage.saves)) <= self.spare_bytes:
            self.spare_bytes -= nbytes
            return False
        return stage.recomputable

    def fewer_calls(self) -> Simulation | None:
        """The forward is over: what its step holds, where that follows from the planned calls that did not come."""
        measured = self.planned.measured
        missing = {*self.skipped, *range(self.position, len(measured.modules))}
        stages = {measured.owned[number] for number in missing}
        if not missing or self.extra or len(missing) < sum(owner in stages for owner in measured.owned):
            return None
        return simulate(*without(measured.chain, self.planned.plan.tree, stages))
