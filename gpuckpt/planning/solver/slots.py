"""A problem in slots of memory, and the numbering of the pieces of a chain.

Every size is rounded up to slots, so a plan that fits in slots fits in bytes; when the slot divides all sizes nothing is lost.
Pieces (i..j) that look alike share one row of the solver's tables: in a chain with a periodic body (an embedding, a thousand
equal blocks, a head) a piece inside the body is known by its phase and its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning.solver.min_peak import run_ends
from gpuckpt.planning.solver.problem import Problem

__all__ = ["Grid", "Pieces", "common_unit", "make_grid", "make_pieces"]

Ints = NDArray[np.int64]

_LONGEST_PERIOD = 16


def _block_size(n: int) -> int:
    """Starts, and ends, in a tile: what a tile reads of shorter pieces it uses that many times over.

    Long chains read from memory what shorter ones find in a cache, and can afford larger tiles; what a tile needs of its own
    pieces it sums one piece at a time.
    """
    return min(64, max(8, n // 20))


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
    """Which row of the tables holds piece i..j, and in what order the rows can be filled.

    The row is `near[i] + j - i`, or `far[i] + j - body_end - 1` when i is in the body and j beyond it. Rows are filled in
    tiles, a block of starts by a block of ends: what a tile needs of shorter pieces it reads once for many of its own.

    Attributes:
        near, far: (n,).
        body_start, body_end: first and last stage of the periodic body (start > end: none).
        rows: how many rows there are.
        run_end: (n,), the last stage a frame from i can reach; smaller than i when i cannot be in one.
        block_end: (n,), the first stage after i's block; blocks end where runs and the body do.
        tiles: (t, 4), first and last start, first and last end; every row is in one tile (in a tile with one block on both sides
            only pieces with i <= j count), ordered by level.
        level_start: (levels + 1,), where each level begins; tiles of one level do not need each other.
        sums: additions over all pieces, a measure of work.
    """

    near: Ints
    far: Ints
    body_start: int
    body_end: int
    rows: int
    run_end: Ints
    block_end: Ints
    tiles: Ints
    level_start: Ints
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
    run_end = np.minimum(run_ends(problem), n - 2)
    start, end, period = _periodic_body(problem, run_end)
    blocks = _blocks(run_end, start, end, period)
    near, far = np.zeros(n, np.int64), np.zeros(n, np.int64)
    rows = sums = 0
    for i in range(n):
        if run_end[i] < i:
            continue
        in_body = start <= i <= end
        last = min(end, int(run_end[i])) if in_body else int(run_end[i])
        if in_body and i >= start + period:
            near[i] = near[i - period]
        else:
            near[i] = rows
            rows += last - i + 1
            sums += (last - i) * (last - i + 1) // 2
        if in_body and run_end[i] > end:
            far[i] = rows
            rows += int(run_end[i]) - end
            sums += (int(run_end[i]) - i) * (int(run_end[i]) - end)
    tiles, level_start = _tiles(blocks, run_end, start, end, period)
    block_end = np.zeros(n, np.int64)
    for a, b in blocks:
        block_end[a : b + 1] = b + 1
    sums += int(np.maximum(run_end - np.arange(n) + 1, 0).sum())
    return Pieces(near, far, start, end, rows, run_end, block_end, tiles, level_start, sums)


def _blocks(run_end: Ints, start: int, end: int, period: int) -> list[tuple[int, int]]:
    """Blocks of stages that frames can cover, as (first, last): within one run, within the body or without, and aligned to its
    period, so that a piece moved back to the body's start spans no more blocks than before.
    """
    usual = _block_size(len(run_end))
    blocks: list[tuple[int, int]] = []
    i = 0
    while i < len(run_end):
        if run_end[i] < i:
            i += 1
            continue
        size = usual
        last = int(run_end[i])
        if i < start:
            last = min(last, start - 1)
        elif i <= end:
            last = min(last, end)
            size = period * -(-usual // period)
        blocks.append((i, min(last, i + size - 1)))
        i = blocks[-1][1] + 1
    return blocks


def _tiles(blocks: list[tuple[int, int]], run_end: Ints, start: int, end: int, period: int) -> tuple[Ints, Ints]:
    """Tiles by level, the number of blocks between their two; and where each level begins."""
    firsts = np.array([a for a, _ in blocks], np.int64)
    lasts = np.array([b for _, b in blocks], np.int64)
    parts: list[Ints] = []
    for x, (a, b) in enumerate(blocks):
        reach = int(np.searchsorted(firsts, run_end[a], side="right"))
        ends = np.arange(x, reach)
        if start < a <= end:
            ends = ends[firsts[ends] > end]  # nearer pieces are those from the body's start
        last_start = min(b, start + period - 1) if a == start else b
        if a == start:
            beyond = ends[firsts[ends] > end]
            parts.append(_tile_rows(x, beyond, a, b, firsts, lasts))
            ends = ends[firsts[ends] <= end]
        parts.append(_tile_rows(x, ends, a, last_start, firsts, lasts))
    table = np.concatenate(parts) if parts else np.zeros((0, 5), np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    levels = int(table[-1, 0]) + 1 if len(table) else 0
    return np.ascontiguousarray(table[:, 1:]), np.searchsorted(table[:, 0], np.arange(levels + 1))


def _tile_rows(x: int, ends: Ints, first: int, last: int, firsts: Ints, lasts: Ints) -> Ints:
    same = np.ones(len(ends), np.int64)
    return np.stack([ends - x, first * same, last * same, firsts[ends], lasts[ends]], axis=1)


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
        *problem.back_need.transpose(1, 0, 2).reshape(n, -1).T,
        *problem.option_covers.transpose(1, 0, 2).reshape(n, -1).T,
        *problem.option_s.T,
        problem.input_bytes,
        problem.first_need,
        problem.run_need,
        problem.gradient_bytes,
        problem.forward_s,
        problem.tail_s,
        np.where(np.isfinite(problem.input_away_s), problem.input_away_s, -1.0),
        problem.recomputable,
    ]
    table = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(n).astype(np.int64)
