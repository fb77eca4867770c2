"""A training step over the ranks of a pipeline, or on one device: the bytes of each rank, and the rank that decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.device.gradients import stages_of, stages_within
from gpuckpt.planning.device.step_memory import StepMemory, StepPlan
from gpuckpt.planning.pipeline import in_flight, step_seconds

__all__ = ["RankedPlan", "RankedStep"]


@dataclass(frozen=True)
class RankedStep:
    """What each rank of a pipeline has of a step, in order; one memory where there is no pipeline."""

    memories: tuple[StepMemory, ...]
    micro_batches: int = 1

    @classmethod
    def split(cls, memory: StepMemory, cuts: Sequence[tuple[int, int]], micro_batches: int) -> RankedStep:
        """`memory` over ranks that have stages `cuts`, (first, last) each. A weight that what comes before all blocks and what
        comes after them share is on the first rank and on the last one."""
        known, last_rank = stages_of(memory.chain), len(cuts) - 1
        memories = []
        for rank, (first, last) in enumerate(cuts):
            own = []
            for parameter in memory.parameters:
                stage = next(iter(stages_within(parameter.name, known)), None)
                if stage is not None:
                    here = first <= stage <= last
                elif rank == 0:
                    here = parameter.first or parameter.tied
                else:
                    here = rank == last_rank and not parameter.first
                if here:
                    own.append(parameter._replace(first=rank == 0 and stage is None, tied=False))
            held = in_flight("1f1b", len(cuts), rank, micro_batches)
            part = memory.chain.part(first, last)
            memories.append(replace(memory, chain=part, parameters=tuple(own), in_flight=held))
        return cls(tuple(memories), micro_batches)

    @property
    def least_bytes(self) -> int:
        """The smallest budget of a device, the same on every rank, that the step could do with."""
        return max(memory.least_bytes for memory in self.memories)

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer's step takes of the fullest device: no plan has less."""
        return max(m.resident_bytes + m.set_aside_bytes + m.optimizer_peak_bytes for m in self.memories)

    def each(self, changed: Callable[[StepMemory], StepMemory]) -> RankedStep:
        """With every rank's memory `changed`."""
        return replace(self, memories=tuple(map(changed, self.memories)))

    def plan(self, budget_bytes: int, strategy: str = "optimal") -> RankedPlan:
        """The fastest plan of every rank within `budget_bytes` of its device.

        Raises `BudgetExceeded`, whose `need` is what the rank that needs most does.
        """
        plans, refused = [], []
        for memory in self.memories:
            try:
                plans.append(memory.plan(budget_bytes, strategy))
            except BudgetExceeded as error:
                refused.append(error)
        if refused:
            raise max(refused, key=lambda error: error.need)
        return RankedPlan(tuple(plans), self.micro_batches)


@dataclass(frozen=True)
class RankedPlan:
    """A plan for each rank."""

    plans: tuple[StepPlan, ...]
    micro_batches: int

    @property
    def tightest(self) -> int:
        """The rank with the highest peak."""
        return max(range(len(self.plans)), key=lambda rank: self.plans[rank].peak_bytes)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that would do on all ranks."""
        return max(plan.smallest_bytes for plan in self.plans)

    def step_s(self, bytes_per_s: float) -> float:
        """Seconds of a step: of all micro-batches one after another through the pipeline, and of the slowest optimizer's step."""
        if len(self.plans) == 1:
            return self.plans[0].step_s(bytes_per_s)
        forward = [sum(stage.forward_s for stage in plan.memory.chain.stages) for plan in self.plans]
        whole = [plan.plan.certificate.step_s for plan in self.plans]
        backward = [step - ahead for step, ahead in zip(whole, forward, strict=True)]
        moved_s = max(plan.memory.optimizer_moved_bytes for plan in self.plans) / bytes_per_s
        return step_seconds(forward, backward, self.micro_batches, "1f1b") + moved_s
