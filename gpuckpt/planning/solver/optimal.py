"""The optimal plan of a heterogeneous chain under a budget.

Dynamic programming over persistent schedules, "rotor": Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal
checkpointing for heterogeneous chains: how to train deep neural networks with limited memory" (2019). A persistent schedule
is exactly a tree of `Keep` and `Recompute`; here with several ways to keep a stage, storages shared across boundaries
counted once, shared extras, and stages that cannot be recomputed. Time: n^3 / 6 additions a slot, and about n^2 for a body
of n equal blocks.

Memory is counted in slots and every size rounded up, so no plan is ever over. When a common divisor of all sizes serves as
the slot the result is the optimum; else the slots reach beyond the budget, by what rounding wastes, and the simulator says
which of the plans found there still fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning.chain import Chain
from gpuckpt.planning.solver.dp_numpy import Tables
from gpuckpt.planning.solver.dp_numpy import fill_tables as fill_tables_plainly
from gpuckpt.planning.solver.problem import Problem
from gpuckpt.planning.solver.slots import Grid, Pieces, common_unit, make_grid, make_pieces
from gpuckpt.planning.solver.traceback import Traceback
from gpuckpt.planning.tree import Node, build_tree

__all__ = ["Solution", "solve"]

Tree = tuple[Node, ...]

# Above this many additions compiled code pays even when Numba has yet to be imported: NumPy does about 5e8 a second, and takes as
# long for a row of the tables as for so many, and for each of its options. It depends on the problem alone: ranks that plan each
# for themselves have to find the same.
_NUMPY_SUMS, _NUMPY_ROW, _NUMPY_OPTION = 200_000_000, 10_000, 5_000
# By default a grid may take this many additions (a tenth of a second compiled) and table bytes, with however many slots if that
# makes it exact, else with slots between these two. At 1,000 slots plans for 64 stages recompute up to 2% longer than need be.
_SUMS = 500_000_000
_TABLE_BYTES = 400_000_000
_LEAST_SLOTS = 500
_MOST_SLOTS = 16_384


@dataclass(frozen=True)
class Solution:
    """Tables that answer for every budget up to `grid.slots` slots."""

    chain: Chain
    problem: Problem
    grid: Grid
    pieces: Pieces
    tables: Tables
    exact: bool

    def least_slots(self, slots: int) -> int:
        """The fewest slots in which the least seconds of `slots` are reached."""
        return int(np.searchsorted(-self.seconds_by_slots, -self.seconds_by_slots[slots]))

    def tree(self, slots: int) -> Tree:
        """A plan with `seconds(slots)`."""
        return build_tree(Traceback(self.chain, self.problem, self.grid, self.pieces, self.tables).tokens(slots))

    @property
    def seconds_by_slots(self) -> NDArray[np.float32]:
        """Least seconds above plainly keeping for every number of slots; infinity when nothing fits."""
        return self.tables.top[0 if self.grid.extras else 1, 0, 0]


def solve(
    chain: Chain,
    problem: Problem,
    budget_bytes: int,
    *,
    slots: int | None = None,
    engine: str = "auto",
    optimistic: bool = False,
) -> Solution:
    """Fill the tables for budgets up to `budget_bytes` at least.

    Args:
        slots: how many slots of memory to plan in at most; None: as many as it needs to be exact where that is affordable, and
            else as many as are.
        engine: "numpy", "numba", or "auto", which spares short solves Numba's import.
        optimistic: round sizes down, which gives a lower bound on seconds and no plan to run.
    """
    pieces = make_pieces(problem)
    # No plan holds more than everything at once.
    everything = int(problem.option_bytes[0].max(axis=1).sum() + problem.input_bytes.sum()) + problem.extras_bytes
    useful_bytes = min(budget_bytes, everything + _largest_need(problem))
    unit = common_unit(problem) or 1
    exact_slots = useful_bytes // unit
    affordable = min(_SUMS // max(1, pieces.sums), _TABLE_BYTES // (8 * (pieces.rows + 2 * problem.n)))
    exact = exact_slots <= (max(_LEAST_SLOTS, affordable) if slots is None else slots)
    slots = min(max(_LEAST_SLOTS, affordable), _MOST_SLOTS) if slots is None else slots
    if exact:
        grid = make_grid(problem, unit, exact_slots)
    elif optimistic:
        grid = make_grid(problem, -(-useful_bytes // slots), slots, round_up=False)
    else:
        grid = make_grid(problem, _slot_bytes(problem, useful_bytes, slots), slots)
    row_sums = _NUMPY_ROW + problem.option_s.shape[1] * _NUMPY_OPTION
    fill = _engine(engine, pieces.sums * (grid.slots + 1) + pieces.rows * row_sums)
    return Solution(chain, problem, grid, pieces, fill(problem, grid, pieces), exact and problem.exact)


def _largest_need(problem: Problem) -> int:
    needs = max(int(problem.option_need.max()), int(problem.run_need.max()), int(problem.first_need.max()))
    return needs + int(problem.back_need.max()) + int(problem.gradient_bytes.max())


def _engine(engine: str, sums: int) -> Callable[[Problem, Grid, Pieces], Tables]:
    if engine not in ("auto", "numpy", "numba"):
        raise ValueError(f"engine is {engine!r}; expected 'auto', 'numpy' or 'numba'")
    if engine == "numpy" or (engine == "auto" and sums <= _NUMPY_SUMS):
        return fill_tables_plainly
    from gpuckpt.planning.solver.dp_numba import fill_tables

    return fill_tables


def _slot_bytes(problem: Problem, budget_bytes: int, slots: int) -> int:
    """A slot that wastes little, and such that `slots` of them reach beyond the budget by at least what rounding up wastes."""
    sizes = problem.option_bytes[0, :, 0]
    sizes = np.concatenate([sizes[sizes > 0], problem.input_bytes[problem.input_bytes > 0]])
    if not len(sizes):
        return -(-budget_bytes // slots)  # nothing is held, only needed for a moment
    candidates = [-(-int(budget_bytes * stretch) // slots) for stretch in np.linspace(1.0, 2.0, 101)]
    # Sizes that come up again and again often share a unit, and a few odd ones (an embedding's ids, a head) hide it.
    values, counts = np.unique(sizes, return_counts=True)
    unit = int(np.gcd.reduce(values[counts > 1])) if (counts > 1).any() else 0
    candidates += [unit // k for k in range(1, unit * slots // budget_bytes + 1) if unit % k == 0] if unit else []
    best, least = -(-2 * budget_bytes // slots), np.inf
    for slot in candidates:
        reach = slot * slots / budget_bytes
        inflation = float((-(-sizes // slot) * slot).sum() / sizes.sum())
        if inflation <= reach and inflation + 0.02 * reach < least:
            best, least = slot, inflation + 0.02 * reach
    return best
