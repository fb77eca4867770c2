"""A problem in slots of memory, and the numbering of the pieces of a chain.

Every size is rounded up to slots, so a plan that fits in slots fits in bytes; when the slot divides all sizes nothing is lost.
Pieces (i..j) that look alike share one row of the solver's tables: in a chain with a periodic body (an embedding, a thousand
equal blocks, a head) a piece inside the body is known by its phase and its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning._least import _run_ends
from gpuckpt.planning._problem import Problem

__all__ = ["Grid", "Pieces", "common_unit", "make_grid", "make_pieces"]

Ints = NDArray[np.int64]

_LONGEST_PERIOD = 16


def common_unit(problem: Problem) -> int:
    """The greatest number of bytes that divides every size in the problem; 0 when all are zero."""
    parts = (
        problem.option_bytes,
        problem.input_bytes,
        np.array([problem.extras_bytes]),
        problem.option_need,
        problem.back_need,
        problem.first_need,
        problem.run_need,
        problem.gradient_bytes,
    )
    return int(np.gcd.reduce([np.gcd.reduce(part, axis=None) for part in parts]))


@dataclass(frozen=True)
class Grid:
    """The problem in slots of `slot_bytes`, tables up to `slots` of them. Fields as in `Problem`."""

    slot_bytes: int
    slots: int
    option: Ints
    option_need: Ints
    back_need: Ints
    input: Ints
    extras: int
    first_need: Ints
    run_need: Ints
    gradient: Ints


def make_grid(problem: Problem, slot_bytes: int, slots: int, *, round_up: bool = True) -> Grid:
    """The problem with every size rounded up to slots of `slot_bytes`; down, for a lower bound, without `round_up`."""

    def slots_of(sizes: Ints) -> Ints:
        return -(-sizes // slot_bytes) if round_up else sizes // slot_bytes

    return Grid(
        slot_bytes,
        slots,
        slots_of(problem.option_bytes),
        slots_of(problem.option_need),
        slots_of(problem.back_need),
        slots_of(problem.input_bytes),
        int(slots_of(np.array(problem.extras_bytes))),
        slots_of(problem.first_need),
        slots_of(problem.run_need),
        slots_of(problem.gradient_bytes),
    )


@dataclass(frozen=True)
class Pieces:
    """Which row of the tables holds piece i..j: `near[i] + j - i`, or `far[i] + j - body_end - 1` when i is in the body and j
    beyond it.

    Attributes: `near`, `far`: (n,); `body_start`, `body_end`: the periodic body, both its own (start > end: none); `rows`: how
    many rows there are; `run_end`: (n,), the last stage a frame from i can reach; `task_i`, `task_j`: one piece per row, by
    length; `task_start`: (longest + 2,), where each length begins; `sums`: additions over all pieces, a measure of work.
    """

    near: Ints
    far: Ints
    body_start: int
    body_end: int
    rows: int
    run_end: Ints
    task_i: Ints
    task_j: Ints
    task_start: Ints
    sums: int

    def row(self, i: int | Ints, j: int | Ints) -> Ints:
        """Row of piece i..j, elementwise."""
        i, j = np.asarray(i), np.asarray(j)
        beyond = (i >= self.body_start) & (i <= self.body_end) & (j > self.body_end)
        return np.where(beyond, self.far[i] + j - self.body_end - 1, self.near[i] + j - i)


def make_pieces(problem: Problem) -> Pieces:
    """Number the pieces that frames can cover; the last stage of the chain is never inside one."""
    n = problem.n
    # A frame that ends the top level is never worth having: its content, kept there, costs a forward less.
    run_end = np.minimum(_run_ends(problem), n - 2)
    start, end, period = _periodic_body(problem, run_end)
    near, far = np.zeros(n, np.int64), np.zeros(n, np.int64)
    rows = 0
    firsts: list[int] = []
    lasts: list[tuple[int, int]] = []
    for i in range(n):
        if run_end[i] < i:
            continue
        in_body = start <= i <= end
        near_end = min(end, int(run_end[i])) if in_body else int(run_end[i])
        if in_body and i >= start + period:
            near[i] = near[i - period]
        else:
            near[i] = rows
            rows += near_end - i + 1
            firsts.append(i)
            lasts.append((i, near_end))
        if in_body and run_end[i] > end:
            far[i] = rows
            rows += int(run_end[i]) - end
            firsts.append(i)
            lasts.append((end + 1, int(run_end[i])))
    if firsts:
        task_i = np.concatenate([np.full(b - a + 1, i) for i, (a, b) in zip(firsts, lasts, strict=True)])
        task_j = np.concatenate([np.arange(a, b + 1) for a, b in lasts])
    else:
        task_i = task_j = np.zeros(0, np.int64)
    lengths = task_j - task_i
    order = np.argsort(lengths, kind="stable")
    longest = int(lengths.max(initial=-1))
    task_start = np.searchsorted(lengths[order], np.arange(longest + 2))
    top_sums = int(np.maximum(run_end - np.arange(n) + 1, 0).sum())
    return Pieces(
        near,
        far,
        start,
        end,
        rows,
        run_end,
        task_i[order],
        task_j[order],
        task_start,
        int(lengths.sum()) + top_sums,
    )


def _periodic_body(problem: Problem, run_end: Ints) -> tuple[int, int, int]:
    """First and last stage of the longest stretch that repeats, and its period; (n, -1, 1) when none is worth it."""
    n = problem.n
    kinds = _kinds(problem)
    best = (n, -1, 1)
    most_saved = 0
    for period in range(1, min(_LONGEST_PERIOD, n // 2) + 1):
        same = (kinds[:-period] == kinds[period:]) & (run_end[:-period] >= np.arange(period, n))
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        for a, b in zip(edges[::2], edges[1::2], strict=True):
            length = int(b - a) + period
            saved = length * length // 2 - period * length
            if length >= 3 * period and saved > most_saved:
                most_saved, best = saved, (int(a), int(b) - 1 + period, period)
    return best


def _kinds(problem: Problem) -> Ints:
    """A number for each stage, equal for stages that the recurrences cannot tell apart."""
    n = problem.n
    columns = [
        *problem.option_bytes.transpose(1, 0, 2).reshape(n, -1).T,
        *problem.option_need.transpose(1, 0, 2).reshape(n, -1).T,
        *problem.option_covers.transpose(1, 0, 2).reshape(n, -1).T,
        *problem.option_s.T,
        problem.input_bytes,
        problem.back_need,
        problem.first_need,
        problem.run_need,
        problem.gradient_bytes,
        problem.forward_s,
        problem.recomputable,
    ]
    table = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(n).astype(np.int64)
