"""`plan_chain`: a chain and a budget in, a certified plan out.

Whatever made the tree, the simulator has the last word: a plan leaves here only when its simulated peak fits the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from gpuckpt.checks import check_choice, check_int, shown
from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import strategies
from gpuckpt.planning._offload import library_of, offloads, without_offload
from gpuckpt.planning.chain import Chain, check_chain
from gpuckpt.planning.coverage import what_stands_in_the_way
from gpuckpt.planning.plan import Certificate, Plan
from gpuckpt.planning.simulate import Simulation, simulate
from gpuckpt.planning.solver import Problem, Solution, build_problem, min_peak_tree, solve
from gpuckpt.planning.tree import Node, nodes_of

__all__ = ["STRATEGIES", "certify", "plan_chain", "smallest_budget"]

Tree = tuple[Node, ...]
Trial = tuple[Tree, Simulation]

# Parameters worth trying on a long chain: every small one, then ever wider steps.
_MOST_PARAMETERS = 64
# How many of the plans beyond the budget's slots are put before the simulator, and how many stages all of them may have: one of
# 10,000 stages takes a second to read and to simulate.
_MOST_TRIALS = 12
_MOST_STAGES_TRIED = 40_000
_MOST_BUDGET_BYTES = 2**63 - 1
_MOST_SLOTS = 100_000
# A second solve proves how far an inexact one can be from the optimum; it has no more slots than this many additions allow.
_BOUND_SUMS = 1_000_000_000


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
"""Strategies other than "optimal", by name: each yields the trees it can offer; the fastest that fits wins."""


def plan_chain(
    chain: Chain,
    budget_bytes: int,
    strategy: str = "optimal",
    *,
    objective: str = "held",
    slots: int | None = None,
    engine: str = "auto",
    host_bytes: int | None = None,
) -> Plan:
    """The fastest plan `strategy` has for `chain` within `budget_bytes`.

    Args:
        chain: what the stages cost.
        budget_bytes: the cap.
        strategy: "optimal" or a name in `STRATEGIES`.
        objective: "held" (what a budget's ledger holds) or "total" (all bytes alive) has to fit.
        slots: memory resolution of the solver; None: as fine as a fraction of a second allows, exact where that is enough.
        engine: of the solver: "numpy", "numba", or "auto".
        host_bytes: what may be on the host at one time; None: as much as there is. Only "optimal" offloads. The certificate's
            smallest budget is that without this bound, and where a chain may offload that of the plans that were weighed.

    Raises:
        BudgetExceeded: nothing fits; `need` is the smallest budget that would do.
        TypeError, ValueError: an argument that makes no sense; `InvalidChain` for more than 20,000 stages.

    >>> from gpuckpt.planning import Stage, tree_text
    >>> chain = Chain(tuple(Stage(f"block {i}", 1.0, 2.0, (2 * i, 2 * i + 1), (2 * i,)) for i in range(4)), (100, 900) * 4)
    >>> plan = plan_chain(chain, 2500)
    >>> plan.certificate.peak_bytes, plan.certificate.recompute_s, plan.certificate.smallest_budget_bytes
    (2100, 2.0, 1100)
    >>> tree_text(plan.tree)
    '(0 1) 2 3'
    """
    check_chain(chain)
    budget_bytes = check_int(budget_bytes, "budget_bytes", 0, _MOST_BUDGET_BYTES)
    check_choice(objective, "objective", ("held", "total"))
    check_choice(strategy, "strategy", ("optimal", *STRATEGIES))
    check_choice(engine, "engine", ("auto", "numpy", "numba"))
    if slots is not None:
        slots = check_int(slots, "slots", 1, _MOST_SLOTS)
    if host_bytes is not None:
        host_bytes = check_int(host_bytes, "host_bytes", 0, _MOST_BUDGET_BYTES)
    if strategy == "optimal" and offloads(chain):
        return _plan_with_host(chain, budget_bytes, host_bytes, objective, slots, engine)
    search = _Search(chain, budget_bytes, objective, slots, engine)
    if strategy == "optimal":
        tree, simulation, gap, slot_bytes = search.optimal()
    else:
        tree, simulation = search.classic(strategy)
        gap, slot_bytes = None, 0
    return _plan(
        chain,
        tree,
        simulation,
        search.smallest_bytes,
        budget_bytes,
        strategy,
        objective,
        gap=gap,
        slot_bytes=slot_bytes,
    )


def smallest_budget(chain: Chain, objective: str = "held", *, engine: str = "auto") -> int:
    """Bytes of the smallest budget that any plan for `chain` fits in: the certificate's, without a plan to go with it.

    >>> from gpuckpt.planning import Stage
    >>> smallest_budget(Chain(tuple(Stage(str(i), 1.0, 2.0, (2 * i, 2 * i + 1), (2 * i,)) for i in range(4)), (100, 900) * 4))
    1100
    """
    check_chain(chain)
    check_choice(objective, "objective", ("held", "total"))
    check_choice(engine, "engine", ("auto", "numpy", "numba"))
    search = _Search(without_offload(chain), 0, objective, None, engine)
    offloading = library_of(chain, objective, engine).trials if offloads(chain) else ()
    return min([search.smallest_bytes, *(search.peak(simulation) for _, simulation in offloading)])


def certify(chain: Chain, tree: Iterable[Node], budget_bytes: int, strategy: str) -> Plan:
    """A plan for a tree made elsewhere, named after `strategy`, with the simulator's certificate.

    `InvalidPlan` when the tree is no plan for the chain, `BudgetExceeded` when it holds more than `budget_bytes`.

    >>> from gpuckpt.planning import Keep, Stage
    >>> certify(Chain((Stage("a", 1.0, 2.0, (0,)),), (100,)), [Keep(0)], 100, "by hand").certificate.peak_bytes
    100
    """
    check_chain(chain)
    budget_bytes = check_int(budget_bytes, "budget_bytes", 0, _MOST_BUDGET_BYTES)
    if not isinstance(strategy, str):
        raise TypeError(f"strategy is {shown(strategy)}; expected a name for the plan")
    nodes = nodes_of(tree)
    simulation = simulate(chain, nodes)
    if simulation.peak_bytes > budget_bytes:
        raise BudgetExceeded(simulation.peak_bytes, budget_bytes, f"the {strategy!r} plan of {chain.name!r} holds more")
    smallest = simulate(chain, min_peak_tree(chain, build_problem(chain))).peak_bytes
    return _plan(chain, nodes, simulation, smallest, budget_bytes, strategy, "held", gap=None, slot_bytes=0)


def _plan(
    chain: Chain,
    tree: Tree,
    simulation: Simulation,
    smallest_bytes: int,
    budget_bytes: int,
    strategy: str,
    objective: str,
    *,
    gap: float | None,
    slot_bytes: int,
) -> Plan:
    certificate = Certificate(
        peak_bytes=simulation.peak_bytes,
        peak_step=simulation.peak_step,
        total_peak_bytes=simulation.total_peak_bytes,
        recompute_s=simulation.recompute_s,
        step_s=simulation.step_s,
        smallest_budget_bytes=smallest_bytes,
        # Lifetimes nest, so a slab laid out beforehand is exactly the peak; but for what leaves and comes back while stages run,
        # of which there are two at a time, and for what is dropped in forward.
        layout_bytes=_layout_bytes(chain, tree, simulation, budget_bytes)
        + 2 * max((copy.nbytes for copy in simulation.transfers), default=0),
        gap=gap,
        slot_bytes=slot_bytes,
        host_peak_bytes=simulation.host_peak_bytes,
    )
    return Plan(tree, certificate, chain.fingerprint(), budget_bytes, strategy, objective)


def _layout_bytes(chain: Chain, tree: Tree, simulation: Simulation, budget_bytes: int) -> int:
    """The peak; where something is dropped in forward as far as the budget goes what the step takes if nothing were let go before
    its backward, and as much again of what is, for the gaps that it leaves."""
    dropped = [stage for stage in chain.stages if stage.dropped_in is not None]
    if not dropped:
        return simulation.peak_bytes
    staying = tuple(replace(stage, dropped_in=None) for stage in chain.stages)
    nested_bytes = simulate(replace(chain, stages=staying), tree).peak_bytes
    gaps_bytes = chain.charge([i for stage in dropped for i in (*stage.saves, *stage.inputs, *stage.extras)])
    return max(simulation.peak_bytes, min(nested_bytes + gaps_bytes, budget_bytes))


def _plan_with_host(
    chain: Chain, budget_bytes: int, host_bytes: int | None, objective: str, slots: int | None, engine: str
) -> Plan:
    """The fastest plan of those that only recompute and those that offload."""
    library = library_of(chain, objective, engine)
    search = _Search(without_offload(chain), budget_bytes, objective, slots, engine)
    slot_bytes = 0
    least_bytes = min(search.smallest_bytes, *(search.peak(simulation) for _, simulation in library.trials))
    with_room = [trial for trial in library.trials if host_bytes is None or trial[1].host_peak_bytes <= host_bytes]
    trials = [trial for trial in with_room if search.fits(trial[1])]
    if search.smallest_bytes <= budget_bytes:
        tree, simulation, _, slot_bytes = search.optimal()
        trials.append((tree, simulation))
    if not trials:
        need = min([search.smallest_bytes, *(search.peak(simulation) for _, simulation in with_room)])
        hint = what_stands_in_the_way(chain, search.smallest)
        if least_bytes < need:
            hint = f"with more than the {host_bytes} bytes of the host budget {least_bytes} would do; {hint}"
        raise BudgetExceeded(need, budget_bytes, f"no plan of chain {chain.name!r} holds less: {hint}")
    tree, simulation = min(trials, key=search.rank)
    gap = max(0.0, simulation.step_s / least_s - 1.0) if (least_s := library.least_s(budget_bytes)) > 0 else 0.0
    return _plan(
        chain, tree, simulation, least_bytes, budget_bytes, "optimal", objective, gap=gap, slot_bytes=slot_bytes
    )


class _Search:
    """One call of `plan_chain`."""

    def __init__(self, chain: Chain, budget_bytes: int, objective: str, slots: int | None, engine: str) -> None:
        self.chain, self.budget_bytes, self.objective = chain, budget_bytes, objective
        self.slots, self.engine = slots, engine
        self.problem: Problem = build_problem(chain, objective)
        self.smallest_tree = min_peak_tree(chain, self.problem)
        self.smallest = simulate(chain, self.smallest_tree)
        if objective == "total":
            self._search_smallest()
        self.smallest_bytes = self.peak(self.smallest)

    def peak(self, simulation: Simulation) -> int:
        return simulation.peak_bytes if self.objective == "held" else simulation.total_peak_bytes

    def fits(self, simulation: Simulation) -> bool:
        return self.peak(simulation) <= self.budget_bytes

    def classic(self, strategy: str) -> Trial:
        trials = [(tree, simulate(self.chain, tree)) for tree in STRATEGIES[strategy](self.chain, self.budget_bytes)]
        fitting = [trial for trial in trials if self.fits(trial[1])]
        if not fitting:
            need = min(self.peak(simulation) for _, simulation in trials)
            hint = (
                f"no {strategy!r} plan of chain {self.chain.name!r} holds less; 'optimal' needs {self.smallest_bytes}"
            )
            raise BudgetExceeded(need, self.budget_bytes, hint)
        return min(fitting, key=self.rank)

    def optimal(self) -> tuple[Tree, Simulation, float | None, int]:
        plain = strategies.keep_all(self.chain)
        kept = simulate(self.chain, plain)
        if self.fits(kept) and np.nanmin(self.problem.option_s) >= 0:
            return plain, kept, 0.0, 0
        solution = solve(self.chain, self.problem, self.budget_bytes, slots=self.slots, engine=self.engine)
        trials = list(self._read(solution))
        trials += [trial for trial in ((plain, kept), (self.smallest_tree, self.smallest)) if self.fits(trial[1])]
        if not trials:
            hint = (
                f"no plan of chain {self.chain.name!r} holds less: {what_stands_in_the_way(self.chain, self.smallest)}"
            )
            raise BudgetExceeded(self.smallest_bytes, self.budget_bytes, hint)
        tree, simulation = min(trials, key=self.rank)
        return tree, simulation, self._gap(solution, kept, simulation), solution.grid.slot_bytes

    def rank(self, trial: Trial) -> tuple[float, int, int]:
        """Least first: seconds; of equally many, in whatever order they were added, bytes on the host; then bytes held here."""
        simulation = trial[1]
        return float(f"{simulation.step_s:.12g}"), simulation.host_peak_bytes, self.peak(simulation)

    def _search_smallest(self) -> None:
        """For total bytes the closed form is an upper bound only: ask the tables."""
        solution = solve(self.chain, self.problem, self.peak(self.smallest), slots=self.slots, engine=self.engine)
        fitting = np.flatnonzero(np.isfinite(solution.seconds_by_slots))
        if len(fitting):
            tree = solution.tree(int(fitting[0]))
            simulation = simulate(self.chain, tree)
            if self.peak(simulation) < self.peak(self.smallest):
                self.smallest_tree, self.smallest = tree, simulation

    def _read(self, solution: Solution) -> Iterator[Trial]:
        """Plans that fit: the one within the budget's slots, and better ones beyond if rounding left room."""
        grid = solution.grid
        low, high = min(self.budget_bytes // grid.slot_bytes, grid.slots), grid.slots
        for _ in range(max(3, min(_MOST_TRIALS, _MOST_STAGES_TRIED // len(self.chain)))):
            if low > high:
                return
            middle = (low + high + 1) // 2 if solution.exact or low < high else low
            middle = low if not np.isfinite(solution.seconds_by_slots[low]) else middle
            if not np.isfinite(solution.seconds_by_slots[middle]):
                low = middle + 1
                continue
            least = solution.least_slots(middle)
            tree = solution.tree(least)
            simulation = simulate(self.chain, tree)
            if self.fits(simulation):
                yield tree, simulation
                low = middle + 1
            else:
                high = least - 1

    def _gap(self, solution: Solution, kept: Simulation, found: Simulation) -> float:
        if solution.exact:
            return 0.0
        least_s = kept.step_s
        if self.problem.exact:
            slots = min(solution.grid.slots, max(1, _BOUND_SUMS // max(1, solution.pieces.sums)))
            bound = solve(self.chain, self.problem, self.budget_bytes, slots=slots, engine=self.engine, optimistic=True)
            least_s += float(bound.seconds_by_slots[-1])
        else:  # where the problem charges bytes twice its optimum bounds nothing, and what no recompute takes does
            least_s += float(np.nanmin(self.problem.option_s, axis=1).sum())
        return max(0.0, found.step_s / least_s - 1.0) if least_s > 0 else 0.0
