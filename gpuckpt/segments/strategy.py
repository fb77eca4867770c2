"""Which layers of a network keep their input. Pure: integers in, integers out.

These are the fixed rules. For the layers that are best under a byte budget, ask the planner (`gpuckpt.plan_chain`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gpuckpt.checks import check_int, shown

__all__ = ["CheckpointStrategy"]

_MOST_LAYERS = 2**24
"""The selection is a list: of this many it takes a second and half a GiB."""


@dataclass(frozen=True)
class CheckpointStrategy:
    """A rule that selects layers. Build one with `every`, `every_nth`, `sqrt` or `none`.

    >>> CheckpointStrategy.sqrt().select_layers(9), CheckpointStrategy.every_nth(4).select_layers(9)
    ([0, 3, 6], [0, 4, 8])
    """

    kind: Literal["every", "every_nth", "sqrt", "none"]
    n: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ("every", "every_nth", "sqrt", "none"):
            raise ValueError(
                f"kind is the unknown strategy {shown(self.kind)}: expected every, every_nth, sqrt or none"
            )
        object.__setattr__(self, "n", check_int(self.n, "n", None))
        if self.n < 0:
            raise ValueError(
                f"n is a stride of {shown(self.n)}, which selects nothing sensible; give 0 (counts as 1) or more"
            )

    @classmethod
    def every(cls) -> CheckpointStrategy:
        """Every layer."""
        return cls("every")

    @classmethod
    def every_nth(cls, n: int) -> CheckpointStrategy:
        """Layers 0, n, 2n, ...; 0 counts as 1."""
        return cls("every_nth", n)

    @classmethod
    def sqrt(cls) -> CheckpointStrategy:
        """isqrt(L) layers, L // isqrt(L) apart, from 0: memory and recompute both grow with the root of the depth."""
        return cls("sqrt")

    @classmethod
    def none(cls) -> CheckpointStrategy:
        """No layer."""
        return cls("none")

    def select_layers(self, total: int) -> list[int]:
        """Indices of the selected ones of `total` layers, ascending.

        Raises `ValueError` for a `total` that is negative or above 2^24.
        """
        total = check_int(total, "total", None)
        if not 0 <= total <= _MOST_LAYERS:
            raise ValueError(f"total: a network cannot have {shown(total)} layers; expected 0 to {_MOST_LAYERS}")
        if self.kind == "none" or total == 0:
            return []
        if self.kind == "sqrt":
            count = math.isqrt(total)
            return list(range(0, total, total // count))[:count]
        return list(range(0, total, max(self.n, 1)))
