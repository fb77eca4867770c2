"""What a budget has held for the latest step, beside what the step's plan promised."""

from __future__ import annotations

from gpuckpt.errors import PromiseBroken
from gpuckpt.memory import Budget

__all__ = ["Promise"]


class Promise:
    """The promise about one budget. Only meaningful while nobody else's share of the budget changes.

    Attributes: `promised_bytes`, of the latest step, or of all those that overlap; `measured_bytes`, the most the budget held
    for them.
    """

    def __init__(self, hint: str) -> None:
        self.promised_bytes = 0
        self.measured_bytes = 0
        self._hint = hint
        self._others_bytes = 0  # held by others when the latest step began

    def idle(self, budget: Budget) -> bool:
        """Whether nothing is held for any step."""
        return budget.used_bytes <= self._others_bytes

    def begin(self, budget: Budget) -> None:
        """From here on the budget's peak is that of the steps that follow."""
        self._others_bytes = budget.used_bytes
        budget.reset_peak()
        self.promised_bytes = 0

    def check(self, budget: Budget, *, binding: bool) -> None:
        """Measure. Raises `PromiseBroken` where more was held than promised and the promise is `binding`."""
        self.measured_bytes = budget.peak_bytes - self._others_bytes
        if binding and self.measured_bytes > self.promised_bytes:
            budget.reset_peak()
            raise PromiseBroken(self.promised_bytes, self.measured_bytes, self._hint)
