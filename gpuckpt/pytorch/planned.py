"""A plan, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpuckpt.planning import Chain, Plan
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.whole_device.device_scope import Situation

__all__ = ["Planned"]


@dataclass(frozen=True)
class Planned:
    """A plan for inputs of one shape, and the measured model that it was made for. `predicted`: the bytes were not measured with
    inputs of this shape but follow from those of others. `situation`: of the device, if made for one; `flows`: by stage;
    `held_before`: bytes held in forward when a stage began in the first step, by stage."""

    measured: Measured
    plan: Plan
    predicted: bool = False
    situation: Situation | None = None
    flows: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)
    held_before: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def chain(self) -> Chain:
        return self.measured.chain
