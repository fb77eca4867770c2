"""The classic checkpointing rules, each as a function from a chain to a tree.

`keep_all`, `every`, `every_nth`, `sqrt` (Chen, Xu, Zhang and Guestrin 2016), `uniform` (what `checkpoint_sequential` does: equal
runs, the last one kept), `greedy` (drop what frees the most bytes per second first), and `revolve`, the binomial schedule of
Griewank and Walther (2000), which needs the fewest forward steps for s snapshots on a chain of equal stages.

Stages that cannot be recomputed are kept wherever they are, and no frame reaches across them. The rules know nothing of a
budget; `plan_chain` searches their parameter for the fastest tree that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from gpuckpt.planning.chain import Chain
from gpuckpt.planning.simulate import simulate
from gpuckpt.planning.tree import Keep, Node, Recompute, Token, build_tree

__all__ = ["every", "every_nth", "greedy", "keep_all", "revolve", "revolve_steps", "sqrt", "uniform"]

Tree = tuple[Node, ...]


def keep_all(chain: Chain) -> Tree:
    """No recompute at all."""
    return tuple(Keep(i) for i in range(len(chain)))


def every(chain: Chain) -> Tree:
    """A frame around every stage."""
    return every_nth(chain, 1)


def every_nth(chain: Chain, n: int) -> Tree:
    """A checkpoint at every n-th stage: frames of `n` stages."""
    _at_least_one(n, "n")
    return _over_runs(chain, lambda first, last: _frames(first, last, n))


def sqrt(chain: Chain) -> Tree:
    """Frames of about sqrt(n) stages."""
    return every_nth(chain, max(1, math.isqrt(len(chain))))


def uniform(chain: Chain, segments: int) -> Tree:
    """`segments` runs as equal as whole stages allow, all in frames but the last of each recomputable run of stages."""
    _at_least_one(segments, "segments")

    def run(first: int, last: int) -> Iterator[Node]:
        length = last - first + 1
        size = max(1, length // segments)
        kept = last - (length - size * (min(segments, length) - 1)) + 1
        yield from _frames(first, kept - 1, size)
        yield from (Keep(i) for i in range(kept, last + 1))

    return _over_runs(chain, run)


def greedy(chain: Chain, budget_bytes: int) -> Tree:
    """One-stage frames, those that free the most bytes per second of recompute first, until the plan fits `budget_bytes`."""
    stages = chain.stages

    def freed_bytes(i: int) -> int:
        return chain.charge(stages[i].saves) - chain.charge(chain.frame_holds(i, i))

    def worth(i: int) -> float:
        return freed_bytes(i) / stages[i].forward_s if stages[i].forward_s else math.inf

    order = sorted((i for i, s in enumerate(stages) if s.recomputable and freed_bytes(i) > 0), key=worth, reverse=True)

    def tree(drops: int) -> Tree:
        dropped = set(order[:drops])
        return tuple(Recompute((Keep(i),)) if i in dropped else Keep(i) for i in range(len(stages)))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if simulate(chain, tree(middle)).peak_bytes <= budget_bytes:
            high = middle
        else:
            low = middle + 1
    return tree(low)


def revolve(chain: Chain, snapshots: int) -> Tree:
    """The binomial schedule on every recomputable run: at most `snapshots` inputs held at once, the run's own included."""
    _at_least_one(snapshots, "snapshots")
    return _over_runs(chain, lambda first, last: _binomial(first, last, snapshots))


def revolve_steps(steps: int, snapshots: int) -> int:
    """Forward steps of the binomial schedule, the one that saves for backward included: `(24, 4)` is 75."""
    repeats = 0
    while math.comb(snapshots + repeats, snapshots) < steps:
        repeats += 1
    return (repeats + 1) * steps - math.comb(snapshots + repeats, snapshots + 1)


def _binomial(first: int, last: int, snapshots: int) -> Iterator[Node]:
    # Depth can equal length, so the tree is written out as tokens from a stack, never by recursion.
    tokens: list[Token] = []
    stack: list[Token | tuple[int, int, int]] = [(first, last, snapshots)]
    while stack:
        job = stack.pop()
        if not isinstance(job, tuple):
            tokens.append(job)
            continue
        i, j, free = job
        parts: list[Token | tuple[int, int, int]] = []
        while i < j:
            middle = _split(j - i + 1, free)
            parts += ["(", (i, i + middle - 1, free), ")"]
            i, free = i + middle, free - 1
        stack += [Keep(j), *reversed(parts)]
    return iter(build_tree(tokens))


def _split(length: int, snapshots: int) -> int:
    """How many steps to advance before the next snapshot."""
    if snapshots == 1:
        return length - 1
    return min(range(1, length), key=lambda k: revolve_steps(k, snapshots) + revolve_steps(length - k, snapshots - 1))


def _over_runs(chain: Chain, rule: Callable[[int, int], Iterator[Node]]) -> Tree:
    nodes: list[Node] = []
    first = None
    for i, stage in enumerate((*chain.stages, None)):
        if stage is not None and stage.recomputable:
            first = i if first is None else first
            continue
        if first is not None:
            nodes.extend(rule(first, i - 1))
            first = None
        if stage is not None:
            nodes.append(Keep(i))
    return tuple(nodes)


def _frames(first: int, last: int, size: int) -> Iterator[Node]:
    for start in range(first, last + 1, size):
        yield Recompute(tuple(Keep(i) for i in range(start, min(start + size, last + 1))))


def _at_least_one(value: int, what: str) -> None:
    if value < 1:
        raise ValueError(f"{what} is {value}; expected at least 1")
