"""The solver's tables, compiled: the recurrences of `_tables_numpy` on all cores, for chains of hundreds of stages and more.

Importing this module imports Numba (about half a second) and loads the compiled code from its cache, or compiles it once.
Pieces of one length do not depend on each other and run in parallel; where there are fewer of them than cores (a body of equal
blocks has one) the slots are split instead, since a sum over frames at m slots reads only m slots of shorter pieces. The
inner loops run along the slots, which are contiguous, and vectorise.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, njit, prange

from gpuckpt.planning._grid import Grid, Pieces
from gpuckpt.planning._problem import Problem
from gpuckpt.planning._tables_numpy import Tables

__all__ = ["fill_tables"]


def fill_tables(problem: Problem, grid: Grid, pieces: Pieces) -> Tables:
    """As `_tables_numpy.fill_tables`."""
    width = grid.slots + 1
    tables = Tables(np.empty((2, pieces.rows, width), np.float32), np.empty((2, 2, problem.n + 1, width), np.float32))
    option_s = problem.option_s.astype(np.float32)
    layout = (pieces.near, pieces.far, np.int64(pieces.body_start), np.int64(pieces.body_end))
    needs = (grid.option_need, grid.back_need, grid.first_need, grid.run_need, grid.gradient)
    _fill_pieces(
        tables.pieces,
        layout,
        (pieces.task_i, pieces.task_j, pieces.task_start),
        grid.option,
        option_s,
        problem.option_covers,
        grid.input,
        problem.forward_s,
        needs,
        get_num_threads(),
    )
    _fill_top(
        tables.pieces,
        tables.top,
        layout,
        pieces.run_end,
        grid.option,
        option_s,
        problem.option_covers,
        problem.option_extras,
        problem.uses_extras,
        grid.input,
        np.int64(grid.extras),
        problem.forward_s,
        needs,
        get_num_threads(),
    )
    return tables


@njit(inline="always")
def _row(layout, i, j):
    near, far, body_start, body_end = layout
    if body_start <= i <= body_end < j:
        return far[i] + j - body_end - 1
    return near[i] + j - i


@njit(inline="always")
def _sum_min(out, left, right, seconds, low, high):
    """out[m] = min(out[m], left[m] + seconds + right[m]) for m in low..high-1."""
    for m in range(low, high):
        value = (left[m] + seconds) + right[m]
        out[m] = value if value < out[m] else out[m]


@njit(inline="always")
def _shifted_min(out, values, seconds, charge, low):
    """out[m] = min(out[m], values[m - charge] + seconds) for m >= low >= charge."""
    for m in range(low, len(out)):
        value = values[m - charge] + seconds
        out[m] = value if value < out[m] else out[m]


@njit(cache=True, parallel=True, nogil=True)
def _fill_pieces(pieces, layout, tasks, option, option_s, covers, inputs, forward_s, needs, threads):
    task_i, task_j, task_start = tasks
    option_need, back_need, first_need, run_need, gradients = needs
    width = pieces.shape[2]
    nothing = np.zeros(width, np.float32)
    for length in range(len(task_start) - 1):
        start, count = task_start[length], task_start[length + 1] - task_start[length]
        chunks = 1 if count >= 2 * threads else threads
        chunk = (width + chunks - 1) // chunks
        for u in prange(count * chunks):
            i, j = task_i[start + u // chunks], task_j[start + u // chunks]
            m_start = (u % chunks) * chunk
            m_end = min(width, m_start + chunk)
            out = pieces[1, _row(layout, i, j)]
            out[m_start:m_end] = np.inf
            seconds = 0.0
            need = first_need[i]
            for k in range(i, j):
                seconds += forward_s[k]
                if k > i:
                    need = max(need, run_need[k])
                low = max(m_start, need + gradients[j])
                left, right = pieces[1, _row(layout, i, k)], pieces[0, _row(layout, k + 1, j)]
                _sum_min(out, left, right, np.float32(seconds), low, m_end)
        for u in prange(count):
            i, j = task_i[start + u], task_j[start + u]
            row = _row(layout, i, j)
            # pieces[1, row] holds the frames so far; the piece with its input not held reads them shifted, so it goes first.
            free = pieces[0, row]
            free[:] = np.inf
            _shifted_min(free, pieces[1, row], np.float32(0), inputs[i], inputs[i])
            for c in range(2):
                for o in range(option.shape[2]):
                    if option_s[i, o] == np.inf:
                        continue
                    charge = option[c, i, o]
                    low = charge + max(option_need[c, i, o] + gradients[j], back_need[i])
                    after = nothing
                    if j > i:
                        after = pieces[1 if covers[c, i, o] else 0, _row(layout, i + 1, j)]
                    _shifted_min(pieces[c, row], after, option_s[i, o], charge, low)


@njit(cache=True, parallel=True, nogil=True)
def _fill_top(
    pieces,
    top,
    layout,
    run_end,
    option,
    option_s,
    covers,
    option_extras,
    users,
    inputs,
    extras,
    forward_s,
    needs,
    threads,
):
    option_need, back_need, first_need, run_need, _ = needs
    n, width = len(run_end), top.shape[3]
    top[:, :, n] = 0
    frames = np.empty((3, width), np.float32)
    chunk = (width + threads - 1) // threads
    for i in range(n - 1, -1, -1):
        # frames[1]: extras held; frames[0]: not held, and not needed by the frame; frames[2]: held from this frame on.
        for u in prange(threads):
            m_start, m_end = u * chunk, min(width, (u + 1) * chunk)
            frames[:, m_start:m_end] = np.inf
            seconds = 0.0
            need = first_need[i]
            used = False
            for k in range(i, run_end[i] + 1):
                seconds += forward_s[k]
                used |= users[k]
                if k > i:
                    need = max(need, run_need[k])
                low = max(m_start, need)
                left = pieces[1, _row(layout, i, k)]
                _sum_min(frames[2 if used else 1], left, top[1, 0, k + 1], np.float32(seconds), low, m_end)
                if extras > 0 and not used:
                    _sum_min(frames[0], left, top[0, 0, k + 1], np.float32(seconds), low, m_end)
            for m in range(m_start, m_end):
                frames[1, m] = min(frames[1, m], frames[2, m])
        for e in range(0 if extras > 0 else 1, 2):
            if e == 0:
                _shifted_min(frames[0], frames[2], np.float32(0), extras, extras)
            for c in range(2):
                out = top[e, c, i]
                out[:] = np.inf
                taken = 0 if c == 1 else inputs[i]
                _shifted_min(out, frames[e], np.float32(0), taken, taken)
                for o in range(option.shape[2]):
                    if option_s[i, o] == np.inf:
                        continue
                    extra = extras if option_extras[i, o] and e == 0 else 0
                    charge = option[c, i, o] + extra
                    low = charge + max(option_need[c, i, o], back_need[i])
                    held = 1 if e == 1 or option_extras[i, o] else 0
                    after = top[held, 1 if covers[c, i, o] else 0, i + 1]
                    _shifted_min(out, after, option_s[i, o], charge, low)
