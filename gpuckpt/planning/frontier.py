"""The frontier of a chain: step time against budget, from the smallest budget that works to the one that needs no recompute.

The knee is the point farthest below the straight line between the two ends: up to there another byte buys much time, beyond it
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuckpt.checks import check_int
from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain, check_chain
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.planner import plan_chain
from gpuckpt.planning.simulate import simulate
from gpuckpt.planning.strategies import keep_all

__all__ = ["Frontier", "plan_frontier"]

_MOST_POINTS = 10_000


@dataclass(frozen=True)
class Frontier:
    """Plans by rising budget. `knee`: the index of the one where more memory stops paying."""

    chain_name: str
    plans: tuple[Plan, ...]
    knee: int

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(peak bytes, step seconds) of each plan."""
        return tuple((plan.certificate.peak_bytes, plan.certificate.step_s) for plan in self.plans)


def plan_frontier(chain: Chain, budgets: int | Sequence[int] = 24, **options: object) -> Frontier:
    """Plan `chain` for `budgets` (that many between the two ends, each by the same factor larger; or these, in bytes).

    `options` go to `plan_chain`. `BudgetExceeded` when a budget given is too small.

    >>> from gpuckpt.planning import Stage
    >>> chain = Chain(tuple(Stage(f"block {i}", 1.0, 2.0, (2 * i, 2 * i + 1), (2 * i,)) for i in range(4)), (100, 900) * 4)
    >>> plan_frontier(chain, [2000, 3000, 4000]).points
    ((1300, 15.0), (2100, 14.0), (4000, 12.0))
    """
    check_chain(chain)
    if isinstance(budgets, str | bytes) or not isinstance(budgets, Sequence):
        budgets = check_int(budgets, "budgets", 2, _MOST_POINTS)
        most = simulate(chain, keep_all(chain)).peak_bytes
        least = plan_chain(chain, most, **options).certificate.smallest_budget_bytes  # type: ignore[arg-type]
        if options.get("host_bytes") is not None:
            try:
                plan_chain(chain, least, **options)  # type: ignore[arg-type]
            except BudgetExceeded as error:  # with little room on the host that smallest budget may be out of reach
                least = error.need
        # Even steps of the ratio: time falls steeply at the small end, and the knee lies there.
        ratio = most / max(least, 1)
        budgets = [least, *(round(max(least, 1) * ratio ** (x / (budgets - 1))) for x in range(1, budgets - 1)), most]
    if not budgets:
        raise ValueError("budgets is empty; expected how many there shall be, or at least one in bytes")
    budgets = [check_int(each, "budgets", 0, 2**63 - 1) for each in budgets]
    plans = tuple(plan_chain(chain, budget, **options) for budget in sorted(set(budgets)))  # type: ignore[arg-type]
    points = [(plan.certificate.peak_bytes, plan.certificate.step_s) for plan in plans]
    return Frontier(chain.name, plans, _knee(points))


def _knee(points: Sequence[tuple[int, float]]) -> int:
    (left, top), (right, bottom) = points[0], points[-1]
    if right == left or top == bottom:
        return 0

    def below(point: tuple[int, float]) -> float:
        return (right - point[0]) / (right - left) - (point[1] - bottom) / (top - bottom)

    return max(range(len(points)), key=lambda i: below(points[i]))
