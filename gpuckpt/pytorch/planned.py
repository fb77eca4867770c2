"""A plan, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gpuckpt.planning import Chain, Plan, simulate
from gpuckpt.planning.tree import flatten
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.whole_device.device_scope import Situation

__all__ = ["Planned"]


@dataclass(frozen=True)
class Planned:
    """A plan for inputs of one shape, and the measured model that it was made for. `predicted`: the bytes were not measured with
    inputs of this shape but follow from those of others. `situation`: of the device, if made for one; `flows`: by stage;
    `began_with`: bytes held in forward when a stage began in the first step, by stage."""

    measured: Measured
    plan: Plan
    predicted: bool = False
    situation: Situation | None = None
    flows: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    began_with: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def chain(self) -> Chain:
        return self.measured.chain

    @cached_property
    def held_before(self) -> tuple[int, ...]:
        """Bytes that the plan may hold in forward when each stage begins; within a frame, those of the whole frame. All that code
        between blocks saves is among them: of that it is not known when."""
        loose = [i for stage in self.chain.stages if not stage.recomputable for i in stage.saves]
        loose_bytes = self.chain.charge(loose)
        trace = simulate(self.chain, self.plan.tree).trace
        steps, found, held_bytes, at = flatten(self.plan.tree), list[int](), 0, 0
        node = 0
        while node < len(steps):
            step = steps[node]
            found.append(held_bytes + loose_bytes)
            while trace[at][0] == "forward":  # something was dropped
                at += 1
            held_bytes, at, node = trace[at][1], at + 1, step.end
            found += [held_bytes + loose_bytes] * (step.last - step.first)
        return tuple(found)
