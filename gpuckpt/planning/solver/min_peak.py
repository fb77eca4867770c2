"""The plan with the smallest peak of all, in closed form.

Inside a frame over stages i..j nothing beats running everything again from the input for every backward: it holds the input
and what the one stage at hand saves. So a frame's content needs max(saves of i beyond its input, saves of i+1, ..., of j),
and no schedule can do with less, since each stage's saves are held at some moment together with that input. What is left is
where the frames of the top level begin, one pass from the last stage to the first.

Exact for held bytes when the problem charges every byte once; for total bytes it is a budget that suffices, not always the
smallest, because a later gradient in flight can be smaller than the stage's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning.chain import Chain
from gpuckpt.planning.solver.problem import Problem
from gpuckpt.planning.tree import Keep, Node, Token, build_tree

__all__ = ["min_peak_tree", "run_ends"]

_NEVER = np.iinfo(np.int64).max // 4


def min_peak_tree(chain: Chain, problem: Problem) -> tuple[Node, ...]:
    """The tree with the smallest peak that any plan of the chain can have."""
    n = problem.n
    usable = np.isfinite(problem.option_s)
    # Peak while one stage is kept inside a frame, [input not held yet, held], and the option that makes it smallest.
    gradient, back = problem.gradient_bytes[None, :, None], problem.back_need
    alone = problem.option_bytes + np.maximum(problem.option_need + gradient, back)
    alone = np.where(usable[None], alone, _NEVER)
    choice, alone = alone.argmin(axis=2), alone.min(axis=2)
    top = np.where(usable[None], problem.option_bytes + np.maximum(problem.option_need, back), _NEVER)

    # best[e][c][i]: peak of the top level from stage i on; c: input held, e: extras held. step: its first choice.
    best = np.zeros((2, 2, n + 1), np.int64)
    step = np.zeros((2, 2, n), np.int64)
    run_end = run_ends(problem)
    states = (0, 1) if problem.extras_bytes else (1,)
    for i in range(n - 1, -1, -1):
        end = min(int(run_end[i]), n - 1) if problem.recomputable[i] else -1
        inner = _content_peaks(problem, alone, i, end) if end >= i else None
        for e in states:
            frames = None
            if inner is not None:
                frames = _frame_peaks(problem, best, i, end, e, inner)
            for c in (0, 1):
                peak, first = _NEVER, 0
                for o in np.flatnonzero(usable[i]):
                    adds = problem.extras_bytes if problem.option_extras[i, o] and not e else 0
                    after = best[e or int(problem.option_extras[i, o]), int(problem.option_covers[c, i, o]), i + 1]
                    held = int(problem.option_bytes[c, i, o])
                    candidate = adds + max(int(top[c, i, o]), held + int(after))
                    if candidate < peak:
                        peak, first = candidate, -1 - int(o)
                if frames is not None:
                    candidates = frames + (0 if c else problem.input_bytes[i])
                    k = int(candidates.argmin())
                    if candidates[k] < peak:
                        peak, first = int(candidates[k]), i + k
                best[e, c, i], step[e, c, i] = peak, first
    start = 0 if problem.extras_bytes else 1
    return _tree(chain, problem, step, choice, start)


def run_ends(problem: Problem) -> NDArray[np.int64]:
    """For each stage the last stage of the run of recomputable ones that it starts or is in."""
    ends = np.empty(problem.n, np.int64)
    end = problem.n - 1
    for i in range(problem.n - 1, -1, -1):
        if not problem.recomputable[i]:
            end = i - 1
        ends[i] = end
    return ends


def _content_peaks(problem: Problem, alone: NDArray[np.int64], i: int, end: int) -> NDArray[np.int64]:
    """Peak inside a frame over i..k beyond its input, for k = i..end."""
    peaks = alone[0, i : end + 1].copy()
    peaks[0] = alone[1, i]
    if end > i:
        running = problem.run_need[i:end].copy()
        running[0] = problem.first_need[i]
        np.maximum.accumulate(running, out=running)
        np.maximum(peaks[1:], running + problem.gradient_bytes[i + 1 : end + 1], out=peaks[1:])
    return np.maximum.accumulate(peaks, out=peaks)


def _frame_peaks(
    problem: Problem, best: NDArray[np.int64], i: int, end: int, e: int, inner: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Peak of a top level that starts with a frame over i..k, beyond the frame's input, for k = i..end."""
    running = problem.run_need[i : end + 1].copy()
    running[0] = problem.first_need[i]
    np.maximum.accumulate(running, out=running)
    within = np.maximum(inner, running)
    peaks = np.maximum(within, best[1, 0, i + 1 : end + 2])
    if not e:
        users = np.logical_or.accumulate(problem.uses_extras[i : end + 1])
        without = np.maximum(within, best[0, 0, i + 1 : end + 2])
        peaks = np.where(users, peaks + problem.extras_bytes, without)
    return peaks


def _tree(
    chain: Chain, problem: Problem, step: NDArray[np.int64], choice: NDArray[np.intp], e: int
) -> tuple[Node, ...]:
    tokens: list[Token] = []
    i, c = 0, 0
    while i < problem.n:
        first = int(step[e, c, i])
        if first < 0:
            option = -1 - first
            tokens.append(Keep(i, chain.stages[i].options[option].name))
            e = e or int(problem.option_extras[i, option])
            c = int(problem.option_covers[c, i, option])
            i += 1
            continue
        tokens += ["("] * (first - i + 1)
        for k in range(i, first + 1):
            tokens += [Keep(k, chain.stages[k].options[choice[int(k == i), k]].name), ")"]
        e = e or int(problem.uses_extras[i : first + 1].any())
        i, c = first + 1, 0
    return build_tree(tokens)
