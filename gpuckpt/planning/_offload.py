"""Plans that keep some of a step on the host, over a link that copies while stages run.

The solver adds seconds up, and knows nothing of a link that is busy or idle. So it is asked several times, with every second on
the link counted for a part of itself (its price) and with other stages allowed to use it, for plans of all sizes; what each of
them holds and takes the simulator says. The fastest that fits both memories is the plan. As the same plans are weighed under
every budget, more bytes never make a slower one, and those that only recompute or only offload are among them.

How far that can be from the optimum is proven: a step takes at least the seconds of its work C and at least those of its link L,
so at least (C + price * L) / (1 + price), whose least the solver knows for a chain that charges every byte once.

Not every tree is weighed, so that the smallest budget is that of the plans that are. The solver takes what is offloaded for gone
at once. The judge holds what the last stages send until forward is over: there a frame around one stage, which sends only when it
runs again, can do with a few bytes less, and is not found. Of 400 budgets of random chains of 2 to 4 stages 7 are refused so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpuckpt.planning import strategies
from gpuckpt.planning.chain import Chain, Stage
from gpuckpt.planning.simulate import Simulation, simulate
from gpuckpt.planning.solver import Problem, build_problem, solve
from gpuckpt.planning.tree import SPILL, Keep, Node, Recompute, tree_text

__all__ = ["Library", "library_of", "offloads", "without_offload"]

Tree = tuple[Node, ...]

# What a second on the link is counted for.
_PRICES = (0.0, 0.2, 1.0)
_ENDLESS = float("inf")
_SLOTS, _NO_CAP = 500, 1 << 62  # the solver itself ends where everything is held at once
# Plans that are read from one solve, and stages in all of them: one of 1,000 stages takes a tenth of a second.
_MOST_PLANS, _MOST_STAGES = 16, 1_000


@dataclass(frozen=True)
class _Bound:
    """Seconds that no step is faster than, by slots of `slot_bytes`."""

    slot_bytes: int
    step_s: NDArray[np.float64]


@dataclass(frozen=True)
class Library:
    """The plans of one chain that offload, each with what the simulator says of it."""

    trials: tuple[tuple[Tree, Simulation], ...]
    bounds: tuple[_Bound, ...]

    def least_s(self, budget_bytes: int) -> float:
        """Seconds that no step within `budget_bytes` is faster than."""
        return max(
            float(each.step_s[min(budget_bytes // each.slot_bytes, len(each.step_s) - 1)]) for each in self.bounds
        )


def offloads(chain: Chain) -> bool:
    """Whether anything of the chain may be on the host."""
    return any(s.input_moved_s is not None or any(v.spilled for v in s.variants) for s in chain.stages)


def without_offload(chain: Chain, stays: Callable[[int], bool] = lambda number: True) -> Chain:
    """The chain in which stages that `stays` names, by number, and frames that start with them have no option to offload."""
    stages = tuple(
        replace(stage, variants=tuple(v for v in stage.variants if not v.spilled), input_moved_s=None)
        if stays(number)
        else stage
        for number, stage in enumerate(chain.stages)
    )
    return replace(chain, stages=stages)


@lru_cache(maxsize=2)
def library_of(chain: Chain, objective: str, engine: str) -> Library:
    """The plans to weigh for a chain under any budget."""
    kept = simulate(chain, strategies.keep_all(chain))
    movable = [
        i for i, s in enumerate(chain.stages) if s.input_moved_s is not None or any(v.spilled for v in s.variants)
    ]
    count = max(4, min(_MOST_PLANS, _MOST_STAGES // len(chain)))
    whole = _moving_whole(chain)
    asked = [(each, price, 1, 1.0, _ENDLESS) for price in _PRICES for each in dict.fromkeys((chain, whole))]
    # A link that keeps up with some of them, and with that of them which crosses while these run.
    asked += [(whole, price, stride, 1.0, _ENDLESS) for stride in (2, 3) for price in (0.0, 0.3)]
    asked += [(chain, 0.0, stride, 1.0, 1.0) for stride in (1, 2, 3, 4)]
    asked += [
        (chain, 0.1, 1, share, _ENDLESS) for share in (0.125, 0.25, 0.5, 0.75)
    ]  # a host that has room for some of them
    # By their text: comparing deep trees recurses.
    trees: dict[str, Tree] = {tree_text(tree): tree for tree in _only_offloading(chain)}
    for each, price, stride, share, part in asked:
        # Of equal stages the earliest, whose bytes lie idle the longest; and the last one stays.
        allowed = set(movable[len(movable) % stride : round(share * len(movable)) : stride])
        some = without_offload(each, lambda i, allowed=allowed: i not in allowed)  # type: ignore[misc]
        some = _crossing(some, part * stride)
        problem = _priced(some, build_problem(some, objective), price)
        solution = solve(some, problem, _NO_CAP, slots=_SLOTS, engine=engine)
        for tree in map(solution.tree, _spread(solution.seconds_by_slots, count)):
            trees[tree_text(tree)] = tree
    trials = tuple((tree, simulate(chain, tree)) for tree in trees.values())
    return Library(trials, tuple(_bounds(chain, objective, engine, kept.step_s)))


def _moving_whole(chain: Chain) -> Chain:
    """The chain in which of what is offloaded nothing is made again."""
    stages = [replace(s, variants=tuple(v for v in s.variants if not (v.spilled and v.remade))) for s in chain.stages]
    return replace(chain, stages=tuple(stages))


def _crossing(chain: Chain, forwards: float) -> Chain:
    """The chain in which nothing is offloaded that takes the link longer, one way, than so many forwards of its stage."""

    if forwards == _ENDLESS:
        return chain

    def crosses(stage: Stage, seconds: float | None) -> bool:
        return seconds is not None and seconds <= forwards * stage.forward_s

    stages = [
        replace(
            stage,
            variants=tuple(v for v in stage.variants if not v.spilled or crosses(stage, v.moved_s)),
            input_moved_s=stage.input_moved_s if crosses(stage, stage.input_moved_s) else None,
        )
        for stage in chain.stages
    ]
    return replace(chain, stages=tuple(stages))


def _spread(seconds: NDArray[np.float32], count: int) -> Iterator[int]:
    """At most `count` numbers of slots, each the least for its seconds, from the fewest that do to the last that gains."""
    gains = np.flatnonzero(seconds < np.concatenate([[np.inf], seconds[:-1]]))
    for k in np.unique(np.linspace(0, len(gains) - 1, count).round()) if len(gains) else ():
        yield int(gains[int(k)])


def _only_offloading(chain: Chain) -> Iterator[Tree]:
    """Every stage that may spills what it saves, or is recomputed from an input on the host, but for the last few."""
    n = len(chain)
    for kept in [0, *(2**k for k in range(n.bit_length()))]:
        yield tuple(Keep(i, _spill_of(s) if i < n - kept else "keep") for i, s in enumerate(chain.stages))
        yield tuple(
            Recompute((Keep(i),), "keep" if s.input_moved_s is None else SPILL)
            if i < n - kept and s.recomputable
            else Keep(i)
            for i, s in enumerate(chain.stages)
        )


def _spill_of(stage: Stage) -> str:
    return next((variant.name for variant in stage.variants if variant.spilled and not variant.remade), "keep")


def _priced(chain: Chain, problem: Problem, price: float, proof: bool = False) -> Problem:
    """The problem in which a second on the link counts for `price`. `proof`: only for bytes that are sure to move: what others
    may hold stays here, and so may what the last two blocks save."""
    named = Counter(i for stage in chain.stages for i in _named(stage))
    seconds, away_s = problem.option_s.copy(), problem.input_away_s.copy()

    def moving(number: int, ids: Iterable[int], moved_s: float) -> float:
        if not proof:
            return moved_s
        ids = set(ids)
        later = sum(number < i for i in chain.blocks)
        own_bytes = sum(chain.storages[i] for i in ids if named[i] == 1) if later >= 2 else 0
        all_bytes = sum(chain.storages[i] for i in ids)
        return moved_s * own_bytes / all_bytes if all_bytes else 0.0

    for number, stage in enumerate(chain.stages):
        for o, option in enumerate(stage.options):
            seconds[number, o] += 2 * (price * moving(number, option.spilled, option.moved_s) - option.moved_s)
        if stage.input_moved_s is not None:
            away_s[number] = 2 * price * moving(number, stage.inputs, stage.input_moved_s)
    return replace(problem, option_s=seconds, input_away_s=away_s)


def _named(stage: Stage) -> set[int]:
    """Storages that a stage may hold; its output is held by who names it as an input."""
    return {
        *stage.saves,
        *stage.inputs,
        *stage.extras,
        *(i for v in stage.variants for i in v.ids),
    }


def _bounds(chain: Chain, objective: str, engine: str, kept_s: float) -> Iterator[_Bound]:
    problem = build_problem(chain, objective)
    if not problem.exact:
        free = _priced(chain, problem, 0.0).option_s
        yield _Bound(1, np.full(1, kept_s + float(np.nanmin(free, axis=1).sum())))
        return
    for price in _PRICES:
        priced = _priced(chain, problem, price, proof=True)
        solution = solve(chain, priced, _NO_CAP, slots=_SLOTS, engine=engine, optimistic=True)
        least_s = (kept_s + solution.seconds_by_slots.astype(np.float64)) / (1 + price)
        yield _Bound(solution.grid.slot_bytes, np.where(np.isfinite(least_s), least_s, kept_s))
