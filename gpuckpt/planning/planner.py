"""`plan_chain`: a chain and a budget in, a certified plan out.

Whatever made the tree, the simulator has the last word: a plan leaves here only when its simulated peak fits the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import strategies
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.plan import Certificate, Node, Plan
from gpuckpt.planning.simulate import Simulation, simulate

__all__ = ["STRATEGIES", "plan_chain"]

Tree = tuple[Node, ...]

# Parameters worth trying on a long chain: every small one, then ever wider steps.
_MOST_PARAMETERS = 64


def _counts(chain: Chain) -> Iterator[int]:
    n = len(chain)
    if n <= _MOST_PARAMETERS:
        return iter(range(1, n + 1))
    ratio = n ** (1 / (_MOST_PARAMETERS - 1))
    return iter(sorted({round(ratio**i) for i in range(_MOST_PARAMETERS)}))


STRATEGIES: dict[str, Callable[[Chain, int], Iterable[Tree]]] = {
    "none": lambda chain, budget: [strategies.keep_all(chain)],
    "every": lambda chain, budget: [strategies.every(chain)],
    "every_nth": lambda chain, budget: (strategies.every_nth(chain, n) for n in _counts(chain)),
    "sqrt": lambda chain, budget: [strategies.sqrt(chain)],
    "uniform": lambda chain, budget: (strategies.uniform(chain, k) for k in _counts(chain)),
    "greedy": lambda chain, budget: [strategies.greedy(chain, budget)],
    "revolve": lambda chain, budget: (strategies.revolve(chain, s) for s in _counts(chain)),
}
"""Strategies beside "optimal", by name: each yields the trees it can offer; the fastest that fits wins."""


def plan_chain(chain: Chain, budget_bytes: int, strategy: str = "optimal") -> Plan:
    """The fastest plan `strategy` has for `chain` within `budget_bytes` held bytes.

    `BudgetExceeded` when none fits, with the smallest budget that would do.
    """
    if not isinstance(budget_bytes, Integral) or isinstance(budget_bytes, bool) or budget_bytes < 0:
        raise ValueError(f"budget_bytes is {budget_bytes!r}; expected an int of at least 0")
    names = list(STRATEGIES) if strategy == "optimal" else [strategy]
    trials = [(tree, simulate(chain, tree)) for name in names for tree in STRATEGIES[name](chain, budget_bytes)]
    smallest_bytes = min(s.peak_bytes for _, s in trials)
    fitting = [(tree, s) for tree, s in trials if s.peak_bytes <= budget_bytes]
    if not fitting:
        raise BudgetExceeded(smallest_bytes, budget_bytes, f"no {strategy!r} plan of chain {chain.name!r} holds less")
    tree, simulation = min(fitting, key=lambda trial: (trial[1].step_s, trial[1].peak_bytes))
    certificate = _certify(simulation, smallest_bytes)
    return Plan(tree, certificate, chain.fingerprint(), int(budget_bytes), strategy)


def _certify(simulation: Simulation, smallest_bytes: int) -> Certificate:
    return Certificate(
        peak_bytes=simulation.peak_bytes,
        peak_step=simulation.peak_step,
        total_peak_bytes=simulation.total_peak_bytes,
        recompute_s=simulation.recompute_s,
        step_s=simulation.step_s,
        smallest_budget_bytes=smallest_bytes,
        layout_bytes=simulation.peak_bytes,
    )
