"""One forward of a fitted model: which of the planned calls have come, and which others."""

from __future__ import annotations

from torch import nn

from gpuckpt.planning import Simulation, simulate
from gpuckpt.pytorch.other_calls import ExtraCall, call_like, without
from gpuckpt.pytorch.plan_runner import Walk
from gpuckpt.pytorch.planned import Planned

__all__ = ["StepProgress"]

_SMALL_SHARE = 0.01  # of the peak: so much more says nothing of what comes


class StepProgress:
    """`position`: how many of the planned calls have come, or were skipped; `running`: whether one is going on; `count`: how many
    have come; `extra`: calls that were not planned. `spare_bytes`: what the plan leaves of the budget; `began_bytes`: what was
    held of that when the forward began."""

    __slots__ = (
        "_behind",
        "began_bytes",
        "count",
        "extra",
        "given",
        "planned",
        "position",
        "running",
        "skipped",
        "spare_bytes",
        "walk",
    )

    def __init__(self, planned: Planned, walk: Walk, given: frozenset[int], spare_bytes: int, began_bytes: int) -> None:
        self.planned = planned
        self.walk = walk
        self.given = given  # ids of the model's own arguments
        self.spare_bytes = spare_bytes
        self.began_bytes = began_bytes
        self.position = self.count = 0
        self.skipped: list[int] = []
        self.extra: list[ExtraCall] = []
        self.running = False
        self._behind = False

    def planned_call(self, module: nn.Module) -> int | None:
        """The number of the planned call that a call of `module` is; blocks that are skipped leave a gap. None: it is none."""
        modules = self.planned.measured.modules
        number = next((n for n in range(self.position, len(modules)) if modules[n] is module), None)
        if number is not None:
            self.skipped += range(self.position, number)
            self.position = number + 1
            self.count += 1
        return number

    def is_behind(self, number: int, used_bytes: int) -> bool:
        """Whether planned call `number` begins a stage that had better be recomputed, whatever the plan says: earlier ones hold
        more than is planned, and more than in the plan's first step (another branch within a block, other routes), and if the
        rest does so by the same factor, the plan's peak is out of reach."""
        measured = self.planned.measured
        stage = measured.owned[number]
        if not measured.chain.stages[stage].recomputable or (number and measured.owned[number - 1] == stage):
            return False
        held_bytes, peak_bytes = used_bytes - self.began_bytes, self.planned.plan.certificate.peak_bytes
        first_bytes, small_bytes = self.planned.began_with.setdefault(stage, held_bytes), _SMALL_SHARE * peak_bytes
        if held_bytes - first_bytes > small_bytes:  # nearly never: what the plan holds is not worked out before
            planned_bytes = max(first_bytes, self.planned.held_before[stage])
            room_bytes = peak_bytes + self.spare_bytes
            much = held_bytes - planned_bytes > small_bytes and held_bytes * peak_bytes > planned_bytes * room_bytes
            self._behind = self._behind or much
        return self._behind

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
