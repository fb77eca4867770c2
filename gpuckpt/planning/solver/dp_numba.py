"""The solver's tables, compiled: the recurrences of `dp_numpy` on all cores, for chains of hundreds of stages and more.

Importing this module imports Numba (about half a second) and loads the compiled code from its cache, or compiles it once.
Nothing here is `parallel=True`: Numba's threads would be those of OpenMP, which are torch's too, and starting them sets how many
torch uses. The threads are ours (`threads`), and the compiled code lets go of the interpreter's lock.

Pieces of one length do not depend on each other and run in parallel; where there are fewer of them than cores (a body of equal
blocks has one) the slots are split instead, since a sum over frames at m slots reads only m slots of shorter pieces.

The inner loops run along the slots of flat tables at unsigned offsets, four frames at a time: making a view of a row costs as
much as summing it, and a signed index keeps LLVM from vectorising.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numba import config, njit

from gpuckpt.planning.solver.compiled import compiled
from gpuckpt.planning.solver.dp_numpy import Tables
from gpuckpt.planning.solver.problem import Problem
from gpuckpt.planning.solver.slots import Grid, Pieces
from gpuckpt.planning.solver.threads import Team

__all__ = ["fill_tables"]

# Slots summed at a time. Shorter strips would keep more of a tile in a core's first cache, but what is read from memory comes
# fastest in long runs: 512 took two thirds of the time of 128.
_STRIP = 512
# Up to this many additions (a few milliseconds) one thread is as fast as two.
_SERIAL_SUMS = 20_000_000


def fill_tables(problem: Problem, grid: Grid, pieces: Pieces) -> Tables:
    """As `dp_numpy.fill_tables`."""
    width = grid.slots + 1
    tables = Tables(np.empty((2, pieces.rows, width), np.float32), np.empty((2, 2, problem.n + 1, width), np.float32))
    option_s, away_s = problem.option_s.astype(np.float32), problem.input_away_s.astype(np.float32)
    layout = (pieces.near, pieces.far, np.int64(pieces.body_start), np.int64(pieces.body_end), np.int64(width))
    needs = (grid.option_need, grid.back_need, grid.first_need, grid.run_need, grid.gradient)
    options = (grid.option, option_s, problem.option_covers, problem.option_extras)
    stage_s = (problem.forward_s, problem.tail_s)
    flat, top = tables.pieces.reshape(-1), tables.top.reshape(-1)
    # Not numba.get_num_threads(): asking it starts Numba's own threads.
    threads = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    with Team(threads if pieces.sums * width > _SERIAL_SUMS else 1) as team:
        for start, end in pairwise(pieces.level_start.tolist()):
            tiles = pieces.tiles[start:end]
            chunks = 1 if len(tiles) >= 2 * team.size else team.size
            team.run(_sum_tiles, flat, layout, pieces.block_end, tiles, chunks, stage_s, needs)
            team.run(_finish_tiles, flat, layout, pieces.block_end, tiles, options, grid.input, stage_s, needs)
        extras = np.int64(grid.extras)
        next_user = _start_top(top, problem.uses_extras, width)
        for first, end in _top_blocks(pieces):
            sizes = (flat.size, top.size)
            block = _top_block(layout, pieces.run_end, first, end, next_user, extras, stage_s, needs, *sizes)
            team.run(_sum_top, flat, top, width, block)
            args = (first, end, next_user, options, (grid.input, away_s), extras, stage_s, needs)
            _finish_block(flat, top, layout, block[0], *args)
    return tables


def _top_blocks(pieces: Pieces) -> Iterator[tuple[int, int]]:
    """Blocks of first stages as (first, last + 1), from the chain's end; a stage that no frame can cover is one of its own."""
    end = len(pieces.run_end)
    while end > 0:
        first = end - 1
        if pieces.run_end[first] >= first:
            while first > 0 and pieces.block_end[first - 1] == pieces.block_end[end - 1]:
                first -= 1
        yield first, end
        end = first


@njit(inline="always")
def _row(layout, i, j):
    """Where the row of piece i..j begins, within its half of the table."""
    near, far, body_start, body_end, width = layout
    if body_start <= i <= body_end < j:
        return (far[i] + j - body_end - 1) * width
    return (near[i] + j - i) * width


@compiled
def _sum_min(out, o, left, l, right, r, seconds, low, high):  # noqa: E741
    """out[o + m] = min(itself, left[l + m] + seconds + right[r + m]) for m in low..high-1."""
    o, l, r = np.uint64(o + low), np.uint64(l + low), np.uint64(r + low)  # noqa: E741
    for m in range(np.uint64(max(high - low, 0))):
        value = (left[l + m] + seconds) + right[r + m]
        best = out[o + m]
        out[o + m] = value if value < best else best


@compiled
def _sum_tile(out, outs, left, lefts, right, rights, seconds, lows, grads, firsts, lasts, m_start, m_end):
    """out[outs[a, b] + m] = min over k of left[lefts[a, k] + m] + seconds[a, k] + right[rights[b, k] + m], and itself.

    For every a and b over k in firsts[a, b]..lasts[a, b]-1, and m in m_start..m_end-1 from lows[a, k] + grads[b] on, which rises
    with k. Runs over the slots in strips, so that a strip of all rows of four k stays in a core's own cache.
    """
    n_a, n_b = outs.shape
    for strip in range(m_start, m_end, _STRIP):
        strip_end = min(m_end, strip + _STRIP)
        for k in range(0, lefts.shape[1], 4):
            for a in range(n_a):
                for b in range(n_b):
                    first, last = max(k, firsts[a, b]), min(k + 4, lasts[a, b])
                    if last - first < 4 or lows[a, k + 3] + grads[b] > strip:
                        for x in range(first, last):
                            low = max(strip, lows[a, x] + grads[b])
                            _sum_min(
                                out, outs[a, b], left, lefts[a, x], right, rights[b, x], seconds[a, x], low, strip_end
                            )
                        continue
                    l0, l1 = np.uint64(lefts[a, k] + strip), np.uint64(lefts[a, k + 1] + strip)
                    l2, l3 = np.uint64(lefts[a, k + 2] + strip), np.uint64(lefts[a, k + 3] + strip)
                    r0, r1 = np.uint64(rights[b, k] + strip), np.uint64(rights[b, k + 1] + strip)
                    r2, r3 = np.uint64(rights[b, k + 2] + strip), np.uint64(rights[b, k + 3] + strip)
                    s0, s1, s2, s3 = seconds[a, k], seconds[a, k + 1], seconds[a, k + 2], seconds[a, k + 3]
                    to = np.uint64(outs[a, b] + strip)
                    for m in range(np.uint64(strip_end - strip)):
                        w = (left[l0 + m] + s0) + right[r0 + m]
                        x = (left[l1 + m] + s1) + right[r1 + m]
                        y = (left[l2 + m] + s2) + right[r2 + m]
                        z = (left[l3 + m] + s3) + right[r3 + m]
                        w = w if w < x else x
                        y = y if y < z else z
                        w = w if w < y else y
                        best = out[to + m]
                        out[to + m] = w if w < best else best


@compiled
def _shifted_min(out, o, values, v, seconds, charge, low, width):
    """out[o + m] = min(itself, values[v + m - charge] + seconds) for m in low..width-1, low >= charge."""
    o, v = np.uint64(o + low), np.uint64(v + low - charge)
    for m in range(np.uint64(max(width - low, 0))):
        value = values[v + m] + seconds
        best = out[o + m]
        out[o + m] = value if value < best else best


@compiled
def _frame_costs(i, first, last, stage_s, first_need, run_need, seconds, lows):
    """Fill in, for frames i..k with k in first..last-1, the seconds of their recompute and the slots it needs."""
    forward_s, tail_s = stage_s
    spent, need = 0.0, first_need[i]
    for k in range(i, last):
        spent += forward_s[k]
        need = need if k == i else max(need, run_need[k])
        if k >= first:
            seconds[k - first], lows[k - first] = spent - tail_s[k], need


@compiled
def _sum_tiles(flat, layout, block_end, tiles, chunks, stage_s, needs, share, shares):
    """What tiles of one level take from pieces that are done: frames that end in blocks strictly between the tile's two.

    The slots of each tile are cut into `chunks`; this does every `shares`-th of all chunks, from `share` on.
    """
    _, _, first_need, run_need, gradients = needs
    width = layout[4]
    half = len(flat) // 2  # rows whose input is held are in the second half
    chunk = (width + chunks - 1) // chunks
    for u in range(share, len(tiles) * chunks, shares):
        i_first, i_last, j_first, j_last = tiles[u // chunks]
        m_start, m_end = (u % chunks) * chunk, min(width, (u % chunks + 1) * chunk)
        n_i, n_j = i_last - i_first + 1, j_last - j_first + 1
        outs = np.empty((n_i, n_j), np.int64)
        for a in range(n_i):
            for b in range(n_j):
                outs[a, b] = -1
                if i_first + a <= j_first + b:
                    outs[a, b] = half + _row(layout, i_first + a, j_first + b)
                    flat[outs[a, b] + m_start : outs[a, b] + m_end] = np.inf
        k_first = block_end[i_first] - 1
        n_k = j_first - k_first
        if n_k <= 0:
            continue
        lefts, lows = np.empty((n_i, n_k), np.int64), np.empty((n_i, n_k), np.int64)
        seconds, rights = np.empty((n_i, n_k), np.float32), np.empty((n_j, n_k), np.int64)
        for a in range(n_i):
            _frame_costs(i_first + a, k_first, j_first, stage_s, first_need, run_need, seconds[a], lows[a])
            for k in range(k_first, j_first):
                lefts[a, k - k_first] = half + _row(layout, i_first + a, k)
        for b in range(n_j):
            for k in range(k_first, j_first):
                rights[b, k - k_first] = _row(layout, k + 1, j_first + b)
        firsts, lasts = np.zeros((n_i, n_j), np.int64), np.full((n_i, n_j), n_k, np.int64)
        grads = gradients[j_first : j_last + 1]
        _sum_tile(flat, outs, flat, lefts, flat, rights, seconds, lows, grads, firsts, lasts, m_start, m_end)


@compiled
def _finish_tiles(flat, layout, block_end, tiles, options, inputs, stage_s, needs, share, shares):
    """`_finish_tile` for every `shares`-th tile of one level, from `share` on."""
    nothing = np.zeros(layout[4], np.float32)
    for u in range(share, len(tiles), shares):
        _finish_tile(flat, layout, block_end, tiles[u], options, inputs, stage_s, needs, nothing)


@compiled
def _finish_tile(flat, layout, block_end, tile, options, inputs, stage_s, needs, nothing):
    """Frames that end in the tile's own blocks, and the ways to keep the first stage, piece by piece."""
    option, option_s, covers, _ = options
    option_need, back_need, first_need, run_need, gradients = needs
    forward_s, tail_s = stage_s
    i_first, i_last, j_first, j_last = tile
    width, half = layout[4], len(flat) // 2
    for j in range(j_first, j_last + 1):
        for i in range(min(i_last, j), i_first - 1, -1):
            row = _row(layout, i, j)
            spent, need = 0.0, first_need[i]
            for k in range(i, j):
                spent += forward_s[k]
                need = need if k == i else max(need, run_need[k])
                if k < block_end[i_first] - 1 or k >= j_first:
                    left, right = half + _row(layout, i, k), _row(layout, k + 1, j)
                    _sum_min(
                        flat,
                        half + row,
                        flat,
                        left,
                        flat,
                        right,
                        np.float32(spent - tail_s[k]),
                        need + gradients[j],
                        width,
                    )
            # The second half's row holds the frames so far; the first half's reads them shifted, so it goes first.
            flat[row : row + width] = np.inf
            _shifted_min(flat, row, flat, half + row, np.float32(0), inputs[i], inputs[i], width)
            for c in range(2):
                for o in range(option.shape[2]):
                    if option_s[i, o] == np.inf:
                        continue
                    charge = option[c, i, o]
                    low = charge + max(option_need[c, i, o] + gradients[j], back_need[c, i, o])
                    if j > i:
                        after = _row(layout, i + 1, j) + (half if covers[c, i, o] else 0)
                        _shifted_min(flat, c * half + row, flat, after, option_s[i, o], charge, low, width)
                    else:
                        _shifted_min(flat, c * half + row, nothing, 0, option_s[i, o], charge, low, width)


@compiled
def _start_top(top, users, width):
    """Zero beyond the last stage, and for each stage the next one from it on that uses extras."""
    n = len(users)
    state = (n + 1) * width  # row i of (extras held e, input held c) begins at (2 e + c) state + i width
    for x in range(4):
        top[x * state + n * width : (x + 1) * state] = 0
    next_user = np.full(n + 1, n, np.int64)
    for i in range(n - 1, -1, -1):
        next_user[i] = i if users[i] else next_user[i + 1]
    return next_user


@compiled
def _top_block(layout, run_end, i_first, i_end, next_user, extras, stage_s, needs, pieces_size, top_size):
    """The arguments of `_sum_tile` for top levels that start in stages i_first..i_end-1: see there.

    Three rows for each start: frames after which extras are held, because they were before (1) or from the frame on (2), and
    frames that leave them not held (0).
    """
    _, _, first_need, run_need, _ = needs
    width, half, state = layout[4], pieces_size // 2, top_size // 4
    n_i, k_first = i_end - i_first, i_end - 1
    n_k = max(run_end[i_first] - k_first + 1, 0)
    frames = np.full(n_i * 3 * width, np.inf, np.float32)
    outs = np.arange(n_i * 3).reshape(n_i, 3) * width
    lefts, lows = np.empty((n_i, n_k), np.int64), np.empty((n_i, n_k), np.int64)
    seconds, rights = np.empty((n_i, n_k), np.float32), np.empty((3, n_k), np.int64)
    firsts, lasts = np.zeros((n_i, 3), np.int64), np.full((n_i, 3), n_k, np.int64)
    for a in range(n_i):
        _frame_costs(i_first + a, k_first, k_first + n_k, stage_s, first_need, run_need, seconds[a], lows[a])
        for k in range(n_k):
            lefts[a, k] = half + _row(layout, i_first + a, k_first + k)
        split = min(n_k, max(0, next_user[i_first + a] - k_first))
        lasts[a, 0] = split if extras > 0 else 0
        lasts[a, 1] = split
        firsts[a, 2] = split
    for k in range(n_k):
        rights[0, k] = (k_first + k + 1) * width
        rights[1, k] = rights[2, k] = 2 * state + rights[0, k]
    return frames, outs, lefts, lows, seconds, rights, firsts, lasts


@compiled
def _sum_top(flat, top, width, block, share, shares):
    """Frames of a block that end in its last stage or beyond, in one share of the slots.

    The block's last start is complete then; the others miss the frames that end inside the block.
    """
    frames, outs, lefts, lows, seconds, rights, firsts, lasts = block
    chunk = (width + shares - 1) // shares
    m_start, m_end = share * chunk, min(width, (share + 1) * chunk)
    no_gradient = np.zeros(3, np.int64)
    _sum_tile(frames, outs, flat, lefts, top, rights, seconds, lows, no_gradient, firsts, lasts, m_start, m_end)


@compiled
def _finish_block(flat, top, layout, frames, i_first, i_end, next_user, options, inputs, extras, stage_s, needs):
    """`_finish_top` for every start of a block, the last one first."""
    for i in range(i_end - 1, i_first - 1, -1):
        own = (i - i_first) * 3 * layout[4]
        _finish_top(flat, top, layout, frames, own, i, i_end - 1, next_user[i], options, inputs, extras, stage_s, needs)


@compiled
def _finish_top(flat, top, layout, frames, own, i, k_end, user, options, inputs, extras, stage_s, needs):
    """Frames i..k with k < k_end, the ways to keep stage i, and the rows of the top level from i on."""
    option, option_s, covers, option_extras = options
    input_slots, away_s = inputs
    option_need, back_need, first_need, run_need, _ = needs
    forward_s, tail_s = stage_s
    width, half, state = layout[4], len(flat) // 2, len(top) // 4
    spent, need = 0.0, first_need[i]
    for k in range(i, k_end):
        spent += forward_s[k]
        need = need if k == i else max(need, run_need[k])
        left, right = half + _row(layout, i, k), (k + 1) * width
        to = own + (width if k < user else 2 * width)
        _sum_min(frames, to, flat, left, top, 2 * state + right, np.float32(spent - tail_s[k]), need, width)
        if extras > 0 and k < user:
            _sum_min(frames, own, flat, left, top, right, np.float32(spent - tail_s[k]), need, width)
    for m in range(width):
        frames[own + width + m] = min(frames[own + width + m], frames[own + 2 * width + m])
    for e in range(0 if extras > 0 else 1, 2):
        if e == 0:
            _shifted_min(frames, own, frames, own + 2 * width, np.float32(0), extras, extras, width)
        for c in range(2):
            out = (2 * e + c) * state + i * width
            top[out : out + width] = np.inf
            taken = 0 if c == 1 else input_slots[i]
            _shifted_min(top, out, frames, own + e * width, np.float32(0), taken, taken, width)
            if c == 0 and away_s[i] < np.inf:
                _shifted_min(top, out, frames, own + e * width, away_s[i], 0, 0, width)
            for o in range(option.shape[2]):
                if option_s[i, o] == np.inf:
                    continue
                extra = extras if option_extras[i, o] and e == 0 else 0
                charge = option[c, i, o] + extra
                low = charge + max(option_need[c, i, o], back_need[c, i, o])
                held = 1 if e == 1 or option_extras[i, o] else 0
                after = (2 * held + (1 if covers[c, i, o] else 0)) * state + (i + 1) * width
                _shifted_min(top, out, top, after, option_s[i, o], charge, low, width)
