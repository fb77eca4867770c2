"""A rank of a pipeline, whole step: its blocks' plan for one micro-batch, and those that it holds besides.

In 1F1B rank i of p holds p - i micro-batches at once: all but one at rest, between their forward and their backward, one at its
peak. The plan is the same for all, so that what rests follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.pipeline import fit_rank, least_rank_trees, rank_peak
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.planner import STRATEGIES, certify

__all__ = ["cut_blocks", "least_in_flight", "plan_in_flight"]

_ENDLESS = 1 << 62


def cut_blocks(chain: Chain, blocks: str, count: int, ranks: int) -> list[tuple[int, int]]:
    """Stages of each rank as (first, last): as many blocks each; what comes before them is the first rank's, what comes after the
    last one's. `blocks`: how names of their stages begin ("model.layers."); `count`: how many there are, which `ranks` divides.

    >>> from gpuckpt.planning import Stage
    >>> names = ["prefix", *(f"layers.{i}" for i in range(4)), "suffix"]
    >>> cut_blocks(Chain(tuple(Stage(name, 1.0, 2.0) for name in names)), "layers.", 4, 2)
    [(0, 2), (3, 5)]
    """
    each = count // ranks
    firsts = [0]
    for rank in range(1, ranks):
        name = f"{blocks}{rank * each}"
        own = (n for n, stage in enumerate(chain.stages) if stage.name == name or stage.name.startswith(f"{name}."))
        firsts.append(next(own))
    return list(zip(firsts, [first - 1 for first in (*firsts[1:], len(chain))], strict=True))


def plan_in_flight(chain: Chain, total: Chain, held: int, budget_bytes: int, strategy: str) -> Plan:
    """The fastest plan for `chain` such that `held` micro-batches, as `total` counts what is alive, stay within `budget_bytes`.
    Raises `BudgetExceeded`."""
    if strategy == "optimal":
        (tree,) = fit_rank([total], held, budget_bytes, "a rank of the pipeline", "total")
    else:
        tree = next(iter(STRATEGIES[strategy](total, budget_bytes)))
        if (need := rank_peak([total], [tree], held, "total")) > budget_bytes:
            raise BudgetExceeded(need, budget_bytes, f"the {strategy!r} plan of a rank of the pipeline takes that much")
    plan = certify(chain, tree, _ENDLESS, "pipeline")
    certificate = replace(
        plan.certificate,
        peak_bytes=rank_peak([chain], [tree], held),
        total_peak_bytes=rank_peak([total], [tree], held, "total"),
        smallest_budget_bytes=least_in_flight(total, held),
    )
    return replace(plan, certificate=certificate, budget_bytes=budget_bytes, objective="total")


def least_in_flight(total: Chain, held: int) -> int:
    """The fewest bytes that `held` micro-batches take under the plans that were tried."""
    return rank_peak([total], least_rank_trees([total], "total"), held, "total")
