"""Back through the solver's tables, from a number of slots to the tree of choices that made its seconds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning.chain import Chain
from gpuckpt.planning.solver.dp_numpy import Tables
from gpuckpt.planning.solver.problem import Problem
from gpuckpt.planning.solver.slots import Grid, Pieces
from gpuckpt.planning.tree import SPILL, Keep, Token

__all__ = ["Traceback"]

# A frame whose content is still to be found: first and last stage, slots free.
_Job = tuple[int, int, int]


class Traceback:
    """Reads plans out of filled tables."""

    def __init__(self, chain: Chain, problem: Problem, grid: Grid, pieces: Pieces, tables: Tables) -> None:
        self.problem, self.grid, self.pieces, self.tables = problem, grid, pieces, tables
        self.names = [[option.name for option in stage.options] for stage in chain.stages]
        self.option_s = problem.option_s.astype(np.float32)

    def tokens(self, slots: int) -> Iterator[Token]:
        """The nodes of a plan within `slots`, in preorder."""
        # Frames nest as deep as the chain is long: jobs wait on a stack and are expanded in order.
        stack: list[Token | _Job] = list(reversed(self._top(slots)))
        while stack:
            job = stack.pop()
            if isinstance(job, tuple):
                stack.extend(reversed(self._content(*job)))
            else:
                yield job

    def _content(self, i: int, j: int, m: int) -> list[Token | _Job]:
        """What a frame over i..j does with m slots beyond its input."""
        parts: list[Token | _Job] = []
        rows, grid = self.tables.pieces, self.grid
        gradient = int(grid.gradient[j])
        c = 1
        while i <= j:
            option, best = -1, np.inf
            following = int(self.pieces.row(i + 1, j)) if i < j else -1
            for o, charge in self._options(i, c, m, gradient):
                seconds = float(self.option_s[i, o])
                if i < j:
                    seconds += float(rows[int(self.problem.option_covers[c, i, o]), following, m - charge])
                if seconds < best:
                    option, best = o, seconds
            free = m - (0 if c else int(grid.input[i]))
            if i < j and free >= 0:
                ends = np.arange(i, j)
                costs = rows[1, self.pieces.row(i, ends), free] + self.problem.again_s(i, j)
                costs = costs + rows[0, self.pieces.row(ends + 1, j), free]
                costs[self._needs(i, j) + gradient > free] = np.inf
                k = int(costs.argmin())
                if costs[k] < best:
                    parts += ["(", (i, i + k, free), ")"]
                    i, c, m = i + k + 1, 0, free
                    continue
            assert option >= 0, "the traceback left what fits"
            parts.append(Keep(i, self.names[i][option]))
            m -= int(grid.option[c, i, option])
            i, c = i + 1, int(self.problem.option_covers[c, i, option])
        return parts

    def _top(self, m: int) -> list[Token | _Job]:
        """What the top level does with m slots."""
        parts: list[Token | _Job] = []
        problem, grid, top = self.problem, self.grid, self.tables.top
        i, c, e = 0, 0, 0 if grid.extras else 1
        while i < problem.n:
            option, best = -1, np.inf
            for o, charge in self._options(i, c, m, 0):
                left = m - charge - self._extra(i, o, e)
                if left < 0 or not self._fits(i, o, c, m - self._extra(i, o, e), 0):
                    continue
                state = top[e or int(problem.option_extras[i, o]), int(problem.option_covers[c, i, o]), i + 1]
                seconds = float(self.option_s[i, o]) + float(state[left])
                if seconds < best:
                    option, best = o, seconds
            end = int(self.pieces.run_end[i])
            frame: tuple[int, int, int, str] | None = None
            for free, away_s, closing in self._inputs(i, c, m) if end >= i else ():
                ends = np.arange(i, end + 1)
                held = np.logical_or.accumulate(problem.uses_extras[i : end + 1]) | bool(e)
                frees = np.where(held, free - (0 if e else grid.extras), free)
                fits = (frees >= 0) & (self._needs(i, end + 1) <= frees)
                frees = np.maximum(frees, 0)
                costs = self.tables.pieces[1, self.pieces.row(i, ends), frees] + problem.again_s(i, end + 1)
                costs = np.where(fits, costs + top[held.astype(int), 0, ends + 1, frees], np.inf)
                costs = costs + away_s
                k = int(costs.argmin())
                if costs[k] < best:
                    best, frame = float(costs[k]), (k, int(frees[k]), int(held[k]), closing)
            if frame is not None:
                k, m, e, closing = frame
                parts += ["(", (i, i + k, m), closing]
                i, c = i + k + 1, 0
                continue
            assert option >= 0, "the traceback left what fits"
            parts.append(Keep(i, self.names[i][option]))
            m -= int(grid.option[c, i, option]) + self._extra(i, option, e)
            e = e or int(problem.option_extras[i, option])
            i, c = i + 1, int(problem.option_covers[c, i, option])
        return parts

    def _inputs(self, i: int, c: int, m: int) -> Iterator[tuple[int, float, str]]:
        """(slots left, seconds, the token that ends it) of the places where a frame from stage i may have its input."""
        free = m - (0 if c else int(self.grid.input[i]))
        if free >= 0:
            yield free, 0.0, ")"
        if not c and np.isfinite(self.problem.input_away_s[i]):
            yield m, float(np.float32(self.problem.input_away_s[i])), f"):{SPILL}"

    def _options(self, i: int, c: int, m: int, gradient: int) -> Iterator[tuple[int, int]]:
        """(option, slots it takes) of the ways to keep stage i that fit in m slots."""
        for o in range(self.option_s.shape[1]):
            if np.isfinite(self.option_s[i, o]) and self._fits(i, o, c, m, gradient):
                yield o, int(self.grid.option[c, i, o])

    def _fits(self, i: int, o: int, c: int, m: int, gradient: int) -> bool:
        need = max(int(self.grid.option_need[c, i, o]) + gradient, int(self.grid.back_need[c, i, o]))
        return m >= int(self.grid.option[c, i, o]) + need

    def _extra(self, i: int, o: int, e: int) -> int:
        """Slots of extras that keeping stage i holds for the first time."""
        return self.grid.extras if self.problem.option_extras[i, o] and not e else 0

    def _needs(self, i: int, j: int) -> NDArray[np.int64]:
        needs = self.grid.run_need[i:j].copy()
        needs[0] = self.grid.first_need[i]
        return np.maximum.accumulate(needs)
