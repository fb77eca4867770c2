"""Calls of modules in one run, and which of them can be stages: a path of calls that hand on a tensor, or any calls that do not
overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["SHARE", "Call", "covered", "disjoint_calls", "heaviest_path", "outermost"]

SHARE = 0.9  # of a call's work: calls inside of it that cover as much stand for it


@dataclass
class Call:
    """One call of a candidate module: where in the run it began and ended, by bytes produced; numbers of the tensors in and
    out; how many calls had begun when it ended; whether it did next to nothing."""

    module: nn.Module
    begin: int
    inputs: frozenset[int]
    end: int = -1
    outputs: frozenset[int] = frozenset()
    begun: int = 0
    idle: bool = False

    @property
    def work(self) -> int:
        return self.end - self.begin


def outermost(calls: Sequence[Call]) -> list[Call]:
    """Calls that are not part of others."""
    found: list[Call] = []
    begun = 0
    for number, call in enumerate(calls):
        if number >= begun:
            found.append(call)
            begun = call.begun
    return found


def covered(calls: Sequence[Call]) -> int:
    """How much work calls that do not overlap do."""
    return sum(call.work for call in calls)


def disjoint_calls(calls: list[Call]) -> list[Call]:
    """Calls that do not overlap in time and do the most work: of a call and those inside of it the inner ones, where there are
    two or more and they do nearly all of it."""
    order = sorted(range(len(calls)), key=lambda number: (calls[number].begin, -calls[number].end, number))
    inside: dict[int, list[int]] = {-1: [], **{number: [] for number in order}}
    around: list[int] = []
    for number in order:
        while around and not (calls[around[-1]].end > calls[number].begin and number < calls[around[-1]].begun):
            around.pop()
        inside[around[-1] if around else -1].append(number)
        around.append(number)

    chosen: dict[int, list[int]] = {}
    for number in [*reversed(order), -1]:  # inner calls come after those around them
        inner = [found for child in inside[number] for found in chosen[child]]
        if number >= 0:
            call = calls[number]
            enough = len(inner) > 1 and covered([calls[n] for n in inner]) >= SHARE * call.work
            inner = inner if enough else [number]
        chosen[number] = inner
    return [calls[number] for number in chosen[-1] if calls[number].work and not calls[number].idle]


def heaviest_path(calls: list[Call]) -> list[Call]:
    """The run of calls, each beginning after the one before ended and receiving one of its outputs, that covers the most
    work; among equals, the one with the most calls (inner blocks rather than the stages around them). Idle calls link others, and
    are left out."""
    producers: dict[int, list[int]] = {}
    # A call that does no work ends where it begins, and where it returns what it was given (a dropout that is off) it would
    # follow itself, or what is around it: among equal positions the order in which calls began decides.
    order = sorted(range(len(calls)), key=lambda number: (calls[number].begin, -calls[number].end, number))
    rank = {number: place for place, number in enumerate(order)}
    best, before = [(0, 0)] * len(calls), [-1] * len(calls)
    waiting = sorted(range(len(calls)), key=lambda number: (calls[number].end, rank[number]))
    ended = 0
    for number in order:
        call = calls[number]
        while ended < len(waiting):
            done = waiting[ended]
            if calls[done].end > call.begin or rank[done] >= rank[number] or calls[done].begun > number:
                break
            for output in calls[done].outputs:
                producers.setdefault(output, []).append(done)
            ended += 1
        previous = max(
            (done for tensor in call.inputs for done in producers.get(tensor, ())),
            key=lambda done: best[done],
            default=-1,
        )
        covered, count = best[previous] if previous >= 0 else (0, 0)
        best[number] = (covered + call.work, count + 1)
        before[number] = previous
    number = max(range(len(calls)), key=lambda n: best[n], default=-1)
    path = []
    while number >= 0:
        if not calls[number].idle:
            path.append(calls[number])
        number = before[number]
    return path[::-1]
