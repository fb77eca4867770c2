"""Which options a stage is offered: sets of operations whose outputs to keep, such that little has to run again for few bytes.

One run of the stage has been noted, operation by operation: what each costs, which others it needs, what autograd saved of it.
Beginning with everything kept, what is cheapest to bring back for its bytes is dropped, again and again; the sets on the way that
no mixture of others beats are the options. Costs are counted, in floating point operations and in bytes moved, and not timed: all
ranks and all runs are offered the same, and the planner chooses by what the recompute of each was seen to take.

Where halves of the rest are much smaller than the whole, it is made again in two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gpuckpt.pytorch.engine.kept.flow import Flow

__all__ = ["Offer", "SavedSlot", "StageRun", "choose"]

_MOST_OPTIONS = 8
_MOST_TRIED = 40  # outputs that are weighed against each other; of more the cheapest are dropped unseen
_WORTH_HALVES = 0.8  # of what one recompute holds
_LITTLE_MORE = 1.15  # times what one recompute costs


@dataclass(frozen=True)
class SavedSlot:
    """A tensor that autograd saves: its number, its storages, and how many operations had run before."""

    number: int
    storages: tuple[int, ...]
    ran_before: int


@dataclass(frozen=True)
class StageRun:
    """A stage's run. `costs`: of each operation; `outputs`: of those that can be kept and may be, by number, the storages that
    keeping them holds; `slots`: what autograd saves that is not held anyway; `sizes`: bytes of storages."""

    flow: Flow
    costs: Sequence[float]
    outputs: dict[int, tuple[int, ...]]
    slots: Sequence[SavedSlot]
    sizes: dict[int, int]

    def cost(self, kept: Collection[int], slots: Sequence[SavedSlot]) -> float:
        """Of a recompute that brings back `slots`."""
        if not slots:
            return 0.0
        needed = self.flow.needed([slot.number for slot in slots], kept)
        return sum(self.costs[number] for number in needed)

    def held(self, kept: Collection[int]) -> set[int]:
        return {storage for number in kept for storage in self.outputs[number]}

    def remade(self, kept: Collection[int], slots: Sequence[SavedSlot]) -> set[int]:
        """Storages that are made again for `slots`."""
        return {storage for slot in slots for storage in slot.storages} - self.held(kept)

    def nbytes(self, storages: Collection[int]) -> int:
        return sum(self.sizes[storage] for storage in storages)


@dataclass(frozen=True)
class Offer:
    """An option: numbers of the operations whose outputs it keeps, the tensor before which its second half lies (0: none), and
    the storages that it makes again, first and then."""

    kept: frozenset[int]
    cut: int
    remade: frozenset[int]
    later: frozenset[int]


def choose(work: StageRun) -> list[Offer]:
    """The options of a stage, those that hold most first."""
    sets = [kept for kept in _dropping(work) if kept and work.remade(kept, work.slots)]
    points = [(work.nbytes(work.held(kept)), work.cost(kept, work.slots), kept) for kept in sets]
    return [choice for _, _, kept in _thinned(_hull(points)) for choice in _halved(work, kept)]


def _dropping(work: StageRun) -> list[frozenset[int]]:
    """From all outputs down to none, each time without the one that is cheapest to bring back for what it holds."""
    kept = frozenset(work.outputs)
    before = work.cost(kept, work.slots)

    def rate(number: int) -> tuple[float, int]:
        freed = work.nbytes(work.held(kept)) - work.nbytes(work.held(kept - {number}))
        return (work.cost(kept - {number}, work.slots) - before) / max(1, freed), -number

    if len(kept) > _MOST_TRIED:
        for number in sorted(kept, key=rate)[: len(kept) - _MOST_TRIED]:
            kept -= {number}
    found = [kept]
    while kept:
        before = work.cost(kept, work.slots)
        kept -= {min(kept, key=rate)}
        found.append(kept)
    return found


_Point = tuple[int, float, frozenset[int]]


def _hull(points: list[_Point]) -> list[_Point]:
    """Those that no mixture of two others beats, most bytes first."""
    hull: list[_Point] = []
    for point in sorted(points, key=lambda p: (-p[0], -p[1])):
        while hull and (hull[-1][1] >= point[1] or (len(hull) > 1 and _above(hull[-2], hull[-1], point))):
            hull.pop()
        hull.append(point)
    return hull


def _above(one: _Point, middle: _Point, other: _Point) -> bool:
    """Whether `middle` costs as much as a mixture of the two, or more."""
    return (middle[1] - one[1]) * (one[0] - other[0]) >= (other[1] - one[1]) * (one[0] - middle[0])


def _thinned(points: list[_Point]) -> list[_Point]:
    """At most so many: without those whose mixture of neighbours costs little more."""
    points = list(points)
    while len(points) > _MOST_OPTIONS:
        losses = []
        for one, middle, other in zip(points, points[1:], points[2:], strict=False):
            share = (one[0] - middle[0]) / (one[0] - other[0])
            losses.append(one[1] + share * (other[1] - one[1]) - middle[1])
        del points[1 + losses.index(min(losses))]
    return points


def _halved(work: StageRun, kept: frozenset[int]) -> list[Offer]:
    """Making the rest again at once, and in two halves where that holds less and costs little more."""
    whole, cost = work.remade(kept, work.slots), work.cost(kept, work.slots)
    least, at_once = _WORTH_HALVES * work.nbytes(whole), Offer(kept, 0, frozenset(whole), frozenset())
    found = [at_once]
    for before, slot in zip(work.slots, work.slots[1:], strict=False):
        if before.ran_before == slot.ran_before:
            continue  # saved by one operation
        first = [each for each in work.slots if each.number >= slot.number]
        later = [each for each in work.slots if each.number < slot.number]
        halves = work.remade(kept, first), work.remade(kept, later)
        most = max(map(work.nbytes, halves))
        if most >= least or not all(halves):
            continue
        if work.cost(kept, first) + work.cost(kept, later) <= _LITTLE_MORE * cost:
            least, found = most, [at_once, Offer(kept, slot.number, *map(frozenset, halves))]
    return found
