"""The solver's tables in plain NumPy: no compiler, fast enough for chains of some dozens of stages.

The recurrences, for a piece i..j that runs forward again and then backward, with m slots free beyond what is held:

    held[i..j][m] = min over ways to keep i:        extra seconds + next[i+1..j][m - bytes]
                    min over frames i..k, k < j:    again i..k + held[i..k][m] + free[k+1..j][m]
    free[i..j][m] = the same with i's input not held yet: keeping costs its bytes too, and frames come after m - input

`again` is the forward of its stages without the tail of the last, before which the recompute stops. `next` is `held` where
keeping stage i leaves the next stage's input held, else `free`. A piece's last stage is always kept: a frame at the end of a
sub-plan is its content. The top level runs over pieces i..n-1 in the same way, with extras held or not; there a frame may have
its input on the host instead, which takes seconds and is charged nothing.
Seconds are those above plainly keeping, in float32; infinity is "does not fit".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning.solver.problem import Problem
from gpuckpt.planning.solver.slots import Grid, Pieces

__all__ = ["Tables", "fill_tables"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """Seconds in float32 for every number of slots.

    Attributes:
        pieces: (2, rows, slots + 1); [0] with the piece's input not held yet, [1] held.
        top: (2, 2, n + 1, slots + 1); by extras held, input held, first stage.
    """

    pieces: Floats
    top: Floats


def fill_tables(problem: Problem, grid: Grid, pieces: Pieces) -> Tables:
    """Solve every piece, shortest first, then the top level from its end."""
    width = grid.slots + 1
    tables = Tables(
        np.full((2, pieces.rows, width), np.inf, np.float32), np.full((2, 2, problem.n + 1, width), np.inf, np.float32)
    )
    nothing = np.zeros(width, np.float32)
    for i, j in _in_order(pieces):
        gradient = int(grid.gradient[j])
        frames = np.full(width, np.inf, np.float32)
        if j > i:
            ends = np.arange(i, j)
            costs = tables.pieces[1, pieces.row(i, ends)] + problem.again_s(i, j)[:, None]
            costs += tables.pieces[0, pieces.row(ends + 1, j)]
            _forbid(costs, _frame_needs(grid, i, j) + gradient)
            frames = costs.min(axis=0)
        row = int(pieces.row(i, j))
        following = pieces.row(i + 1, j) if j > i else None
        after = [nothing, nothing] if following is None else [tables.pieces[c, following] for c in (0, 1)]
        for c in (0, 1):
            out = tables.pieces[c, row]
            _shifted_min(out, frames, 0 if c else int(grid.input[i]))
            for o in np.flatnonzero(np.isfinite(problem.option_s[i])):
                charge = int(grid.option[c, i, o])
                need = charge + max(int(grid.option_need[c, i, o]) + gradient, int(grid.back_need[c, i, o]))
                seconds = np.float32(problem.option_s[i, o])
                _shifted_min(out, after[int(problem.option_covers[c, i, o])] + seconds, charge, need)
    _fill_top(problem, grid, pieces, tables)
    return tables


def _in_order(pieces: Pieces) -> Iterator[tuple[int, int]]:
    """Every piece that has a row of its own, after those it is made of."""
    for first_start, last_start, first_end, last_end in pieces.tiles.tolist():
        for j in range(first_end, last_end + 1):
            for i in range(min(last_start, j), first_start - 1, -1):
                yield i, j


def _fill_top(problem: Problem, grid: Grid, pieces: Pieces, tables: Tables) -> None:
    n, width = problem.n, grid.slots + 1
    tables.top[:, :, n] = 0
    states = (0, 1) if grid.extras else (1,)
    for i in range(n - 1, -1, -1):
        end = int(pieces.run_end[i])
        frames = [np.full(width, np.inf, np.float32) for _ in (0, 1)]
        if end >= i:
            ends = np.arange(i, end + 1)
            inside = tables.pieces[1, pieces.row(i, ends)] + problem.again_s(i, end + 1)[:, None]
            _forbid(inside, _frame_needs(grid, i, end + 1))
            costs = inside + tables.top[1, 0, i + 1 : end + 2]
            frames[1] = costs.min(axis=0)
            if grid.extras:
                users = np.logical_or.accumulate(problem.uses_extras[i : end + 1])
                without = (inside + tables.top[0, 0, i + 1 : end + 2])[~users]
                frames[0] = without.min(axis=0, initial=np.inf)
                _shifted_min(frames[0], costs[users].min(axis=0, initial=np.inf), grid.extras)
        for e in states:
            for c in (0, 1):
                out = tables.top[e, c, i]
                _shifted_min(out, frames[e], 0 if c else int(grid.input[i]))
                if not c and np.isfinite(problem.input_away_s[i]):
                    np.minimum(out, frames[e] + np.float32(problem.input_away_s[i]), out=out)
                for o in np.flatnonzero(np.isfinite(problem.option_s[i])):
                    uses = bool(problem.option_extras[i, o])
                    extra = grid.extras if uses and not e else 0
                    charge = int(grid.option[c, i, o])
                    need = charge + max(int(grid.option_need[c, i, o]), int(grid.back_need[c, i, o]))
                    after = tables.top[e or int(uses), int(problem.option_covers[c, i, o]), i + 1]
                    _shifted_min(out, after + np.float32(problem.option_s[i, o]), charge + extra, need + extra)


def _frame_needs(grid: Grid, i: int, j: int) -> NDArray[np.int64]:
    """Slots that running i..k forward in a frame needs beyond what is held, for k in i..j-1."""
    needs = grid.run_need[i:j].copy()
    needs[0] = grid.first_need[i]
    return np.maximum.accumulate(needs, out=needs)


def _forbid(costs: Floats, needs: NDArray[np.int64]) -> None:
    """Infinity wherever fewer slots are free than a row of `costs` needs."""
    if needs.any():
        costs[np.arange(costs.shape[1])[None, :] < needs[:, None]] = np.inf


def _shifted_min(out: Floats, values: Floats, charge: int, need: int = 0) -> None:
    """out[m] = min(out[m], values[m - charge]) for m >= max(charge, need)."""
    low = max(charge, need)
    if low < len(out):
        np.minimum(out[low:], values[low - charge : len(out) - charge], out=out[low:])
