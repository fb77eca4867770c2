"""Chains cut over the ranks of a pipeline, a budget for each rank, and the schedule they run in, on paper.

In GPipe (Huang et al. 2019) every rank holds all micro-batches at once; in 1F1B (PipeDream-Flush, Narayanan et al. 2021) rank
i of p holds p - i; interleaved 1F1B gives each rank v chunks of the chain, p ranks apart, and holds
2 (p - i - 1) + (v - 1) p + 1 chunk activations. A plan for a rank has to fit (k - 1) micro-batches at rest and one at its peak.

The chain is that of one micro-batch on one rank of data and tensor parallelism: measure it there, the collectives included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf

from gpuckpt.checks import check_choice, check_int, check_number, shown
from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain, check_chain
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.planner import certify
from gpuckpt.planning.simulate import simulate
from gpuckpt.planning.solver import build_problem, min_peak_tree, solve
from gpuckpt.planning.strategies import keep_all
from gpuckpt.planning.tree import Node

__all__ = [
    "PipelinePlan",
    "RankPlan",
    "cut_chain",
    "fit_rank",
    "in_flight",
    "least_rank_trees",
    "plan_pipeline",
    "rank_peak",
    "step_seconds",
]

Tree = tuple[Node, ...]

SCHEDULES = ("gpipe", "1f1b", "interleaved")

# Bisections over the budget of one micro-batch: each halves what is left, 14 of them leave 1/16384 of a rank's budget.
_BISECTIONS = 14
_MOST_JOBS = 10**6


@dataclass(frozen=True)
class RankPlan:
    """One rank: its chunks of the chain as (first, last) stages, a plan for each, micro-batches held at once, and peak bytes."""

    chunks: tuple[tuple[int, int], ...]
    plans: tuple[Plan, ...]
    in_flight: int
    peak_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class PipelinePlan:
    """All ranks, and the seconds of one training step of `micro_batches` under `schedule`."""

    ranks: tuple[RankPlan, ...]
    schedule: str
    micro_batches: int
    step_s: float


def in_flight(schedule: str, ranks: int, rank: int, micro_batches: int, chunks: int = 1) -> int:
    """Micro-batches (for "interleaved": chunk activations) that a rank holds at once at the most.

    >>> [in_flight("1f1b", ranks=4, rank=rank, micro_batches=8) for rank in range(4)]
    [4, 3, 2, 1]
    """
    _check(schedule, ranks, micro_batches, chunks)
    check_int(rank, "rank", 0, ranks - 1)
    if schedule == "gpipe":
        return micro_batches
    if schedule == "1f1b":
        return min(micro_batches, ranks - rank)
    warm_up = 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
    return min(micro_batches * chunks, warm_up)


def cut_chain(chain: Chain, parts: int) -> tuple[tuple[int, int], ...]:
    """`parts` runs of stages as (first, last) such that the slowest takes as few seconds as possible.

    >>> from gpuckpt.planning import Stage
    >>> cut_chain(Chain(tuple(Stage(str(i), 1.0, 2.0) for i in range(6))), 3)
    ((0, 1), (2, 3), (4, 5))
    """
    check_chain(chain)
    if check_int(parts, "parts", 1) > len(chain):
        raise ValueError(f"parts is {shown(parts)}; the chain has {len(chain)} stages and a part has at least one")
    seconds = [stage.forward_s + stage.backward_s for stage in chain.stages]
    low, high = max(seconds), sum(seconds)
    cuts = _cut(seconds, parts, high)
    for _ in range(60):
        middle = (low + high) / 2
        trial = _cut(seconds, parts, middle)
        if len(trial) <= parts:
            cuts, high = trial, middle
        else:
            low = middle
    while len(cuts) < parts:  # zero-cost tails leave parts over: halve the longest run
        longest = max(range(len(cuts)), key=lambda x: cuts[x][1] - cuts[x][0])
        first, last = cuts[longest]
        cuts[longest : longest + 1] = [(first, (first + last) // 2), ((first + last) // 2 + 1, last)]
    return tuple(cuts)


def _cut(seconds: Sequence[float], parts: int, most_s: float) -> list[tuple[int, int]]:
    """As few runs as possible of at most `most_s` each."""
    cuts: list[tuple[int, int]] = []
    first, spent = 0, 0.0
    for i, cost in enumerate(seconds):
        if i > first and spent + cost > most_s * (1 + 1e-12):
            cuts.append((first, i - 1))
            first, spent = i, 0.0
        spent += cost
    cuts.append((first, len(seconds) - 1))
    return cuts


def plan_pipeline(
    chain: Chain, ranks: int, budget_bytes: int, micro_batches: int, *, schedule: str = "1f1b", chunks: int = 1
) -> PipelinePlan:
    """Cut `chain` (the costs of one micro-batch) over `ranks` and plan each within `budget_bytes` of held bytes.

    `chunks`: runs of stages per rank, for "interleaved". `BudgetExceeded` names the rank where nothing fits.

    >>> from gpuckpt.planning import Stage
    >>> chain = Chain(tuple(Stage(str(i), 1.0, 2.0, (i,)) for i in range(4)), (100,) * 4)
    >>> planned = plan_pipeline(chain, ranks=2, budget_bytes=400, micro_batches=4)
    >>> [(rank.chunks, rank.in_flight, rank.peak_bytes) for rank in planned.ranks], planned.step_s
    ([(((0, 1),), 2, 400), (((2, 3),), 1, 200)], 30.0)
    """
    _check(schedule, ranks, micro_batches, chunks)
    check_chain(chain)
    budget_bytes = check_int(budget_bytes, "budget_bytes", 0, 2**63 - 1)
    if ranks * chunks > len(chain):
        raise ValueError(
            f"ranks * chunks is {shown(ranks * chunks)}; expected at most one for each of {len(chain)} stages"
        )
    cuts = cut_chain(chain, ranks * chunks)
    planned = []
    for rank in range(ranks):
        own = cuts[rank::ranks]
        held = in_flight(schedule, ranks, rank, micro_batches, chunks)
        parts = [chain.part(first, last) for first, last in own]
        trees = fit_rank(parts, held, budget_bytes, f"rank {rank} of {ranks} ({schedule}, {held} in flight)")
        plans = tuple(certify(part, tree, budget_bytes, "pipeline") for part, tree in zip(parts, trees, strict=True))
        forward_s = sum(stage.forward_s for part in parts for stage in part.stages)
        step_s = sum(plan.certificate.step_s for plan in plans)
        peak_bytes = rank_peak(parts, trees, held)
        planned.append(RankPlan(own, plans, held, peak_bytes, forward_s, step_s - forward_s))
    step_s = step_seconds(
        [rank.forward_s for rank in planned], [rank.backward_s for rank in planned], micro_batches, schedule, chunks
    )
    return PipelinePlan(tuple(planned), schedule, micro_batches, step_s)


def fit_rank(parts: Sequence[Chain], held: int, budget_bytes: int, who: str, objective: str = "held") -> list[Tree]:
    """The fastest trees for a rank's chunks such that `held - 1` activations at rest and one at its peak fit, with "total" all
    else that is alive at that peak too. `BudgetExceeded` says that `who` does not fit."""
    trees: list[Tree] = [keep_all(part) for part in parts]
    if rank_peak(parts, trees, held, objective) <= budget_bytes:
        return trees
    problems = [build_problem(part, objective) for part in parts]
    least = least_rank_trees(parts, objective)
    need = rank_peak(parts, least, held, objective)
    best = least if need <= budget_bytes else None
    solutions = [solve(part, problem, budget_bytes) for part, problem in zip(parts, problems, strict=True)]
    low, high = 0, budget_bytes
    for _ in range(_BISECTIONS):
        middle = (low + high + 1) // 2
        slots = [min(middle // s.grid.slot_bytes, s.grid.slots) for s in solutions]
        if any(isinf(s.seconds_by_slots[m]) for s, m in zip(solutions, slots, strict=True)):
            low = middle
            continue
        trees = [s.tree(s.least_slots(m)) for s, m in zip(solutions, slots, strict=True)]
        peak_bytes = rank_peak(parts, trees, held, objective)
        need = min(need, peak_bytes)
        if peak_bytes <= budget_bytes:
            low, best = middle, trees
        else:
            high = middle
    if best is None:
        raise BudgetExceeded(
            need, budget_bytes, f"{who} fits no plan that was tried; more ranks or smaller micro-batches help"
        )
    return best


def least_rank_trees(parts: Sequence[Chain], objective: str = "held") -> list[Tree]:
    """Of each chunk the plan with the smallest peak: in closed form, and for "total", where that is a bound, from the tables."""
    trees = []
    for part in parts:
        problem = build_problem(part, objective)
        tree = min_peak_tree(part, problem)
        if objective == "total":
            solution = solve(part, problem, simulate(part, tree).total_peak_bytes)
            fitting = [m for m, seconds in enumerate(solution.seconds_by_slots) if not isinf(seconds)][:1]
            trials = [tree, *map(solution.tree, fitting)]
            tree = min(trials, key=lambda trial: simulate(part, trial).total_peak_bytes)
        trees.append(tree)
    return trees


def rank_peak(parts: Sequence[Chain], trees: Sequence[Tree], held: int, objective: str = "held") -> int:
    """Bytes of `held - 1` activations at rest, the largest chunk's, and one at its peak."""
    rest_bytes = peak_bytes = 0
    for part, tree in zip(parts, trees, strict=True):
        run = simulate(part, tree)
        # Forward records one step for each node of the top level.
        rest_bytes = max(rest_bytes, run.trace[len(tree) - 1][1])
        peak_bytes = max(peak_bytes, run.peak_bytes if objective == "held" else run.total_peak_bytes)
    return (held - 1) * rest_bytes + peak_bytes


def step_seconds(
    forward_s: Sequence[float], backward_s: Sequence[float], micro_batches: int, schedule: str, chunks: int = 1
) -> float:
    """Seconds of one training step, by playing the schedule out; transfers between ranks are free.

    `forward_s`, `backward_s`: of one micro-batch on each rank, all its chunks together. "interleaved" is the slowest rank's work
    and a fill of the pipeline by single chunks, the bound that its schedule reaches on equal ranks.

    >>> step_seconds([1.0, 1.0], [2.0, 2.0], micro_batches=4, schedule="1f1b")
    15.0
    """
    forward_s, backward_s = _seconds(forward_s, "forward_s"), _seconds(backward_s, "backward_s")
    if len(forward_s) != len(backward_s):
        raise ValueError(f"forward_s is of {len(forward_s)} ranks and backward_s of {len(backward_s)}")
    ranks = len(forward_s)
    _check(schedule, ranks, micro_batches, chunks)
    if schedule == "interleaved":
        slowest = max(f + b for f, b in zip(forward_s, backward_s, strict=True))
        return (micro_batches + (ranks - 1) / chunks) * slowest
    jobs = [_rank_jobs(schedule, ranks, rank, micro_batches) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}
    clocks, at = [0.0] * ranks, [0] * ranks
    left = sum(len(own) for own in jobs)
    while left:
        for rank in range(ranks):
            while at[rank] < len(jobs[rank]):
                kind, batch = jobs[rank][at[rank]]
                before = ("f", rank - 1, batch) if kind == "f" else ("b", rank + 1, batch)
                waits = 0 <= before[1] < ranks
                if waits and before not in done:
                    break
                start = max(clocks[rank], done[before] if waits else 0.0)
                clocks[rank] = start + (forward_s[rank] if kind == "f" else backward_s[rank])
                done[kind, rank, batch] = clocks[rank]
                at[rank] += 1
                left -= 1
    return max(clocks)


def _rank_jobs(schedule: str, ranks: int, rank: int, micro_batches: int) -> list[tuple[str, int]]:
    """Forwards and backwards of one rank in order."""
    ahead = in_flight(schedule, ranks, rank, micro_batches)
    jobs = [("f", batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        jobs.append(("b", batch))
        if batch + ahead < micro_batches:
            jobs.append(("f", batch + ahead))
    return jobs


def _check(schedule: str, ranks: int, micro_batches: int, chunks: int) -> None:
    check_choice(schedule, "schedule", SCHEDULES)
    check_int(ranks, "ranks", 1)
    check_int(micro_batches, "micro_batches", 1)
    check_int(chunks, "chunks", 1)
    if chunks > 1 and schedule != "interleaved":
        raise ValueError(f"schedule {schedule!r} has one chunk a rank; got chunks={shown(chunks)}")
    if ranks * micro_batches * chunks > _MOST_JOBS:  # which are played out one by one
        raise ValueError(
            f"ranks * micro_batches * chunks is {shown(ranks)} * {shown(micro_batches)} * {shown(chunks)}; expected at most "
            f"{_MOST_JOBS}"
        )


def _seconds(values: Sequence[float], name: str) -> list[float]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"{name} is {shown(values)}; expected the seconds of each rank in a list")
    return [check_number(value, name, 0.0, 1e15) for value in values]
