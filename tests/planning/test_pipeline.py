"""Pipelines: cuts, micro-batches in flight, schedules, and a budget for every rank."""

from __future__ import annotations

import random

import pytest

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import (
    Chain,
    Stage,
    cut_chain,
    in_flight,
    plan_pipeline,
    step_seconds,
)


def blocks(n: int) -> Chain:
    """n equal stages of 1 s forward and 2 s backward; each saves its input of 4 bytes and 12 of its own."""
    stages = (Stage(f"s{i}", 1, 2, (i, n + 1 + i), (i,), (), (i + 1,), 4) for i in range(n))
    return Chain(tuple(stages), (4,) * (n + 1) + (12,) * n)


def most_in_flight(schedule: str, ranks: int, rank: int, batches: int) -> int:
    """Counted from the order of forwards and backwards, played by hand for 1F1B and GPipe."""
    if schedule == "gpipe":
        order = [1] * batches + [-1] * batches
    else:
        ahead = min(batches, ranks - rank - 1)
        order = [1] * ahead + [1, -1] * (batches - ahead) + [-1] * ahead
    held = most = 0
    for change in order:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "batches"), [(1, 1), (4, 8), (4, 2), (8, 3)])
def test_micro_batches_in_flight(schedule: str, ranks: int, batches: int) -> None:
    for rank in range(ranks):
        assert in_flight(schedule, ranks, rank, batches) == most_in_flight(schedule, ranks, rank, batches)


def test_interleaved_holds_what_its_warm_up_runs_ahead() -> None:
    assert [in_flight("interleaved", 4, rank, 64, 2) for rank in range(4)] == [11, 9, 7, 5]
    assert in_flight("interleaved", 4, 0, 2, 2) == 4


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_ranks_take_the_textbook_time(schedule: str) -> None:
    # (m + p - 1) (forward + backward) on p equal ranks with m micro-batches.
    assert step_seconds([1.0] * 4, [2.0] * 4, 8, schedule) == pytest.approx((8 + 3) * 3.0)
    assert step_seconds([1.0] * 4, [2.0] * 4, 8, "interleaved", 2) == pytest.approx((8 + 3 / 2) * 3.0)


def test_cuts_balance_seconds() -> None:
    assert cut_chain(blocks(12), 4) == ((0, 2), (3, 5), (6, 8), (9, 11))
    for seed in range(50):
        rng = random.Random(seed)
        chain = Chain(tuple(Stage(f"s{i}", rng.randint(0, 9), 0) for i in range(9)))
        cuts = cut_chain(chain, 3)
        assert [first for first, _ in cuts] == [0, *(last + 1 for _, last in cuts[:-1])]
        assert cuts[-1][1] == 8
        seconds = [stage.forward_s for stage in chain.stages]
        best = min(
            max(sum(seconds[:a]), sum(seconds[a:b]), sum(seconds[b:])) for a in range(1, 8) for b in range(a + 1, 9)
        )
        assert max(sum(seconds[first : last + 1]) for first, last in cuts) == pytest.approx(best)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_every_rank_fits_and_the_first_recomputes_most(schedule: str, chunks: int) -> None:
    plan = plan_pipeline(blocks(32), 4, 400, 4, schedule=schedule, chunks=chunks)
    assert [rank.in_flight for rank in plan.ranks] == [in_flight(schedule, 4, r, 4, chunks) for r in range(4)]
    for rank in plan.ranks:
        assert rank.peak_bytes <= 400
        for (first, last), own in zip(rank.chunks, rank.plans, strict=True):
            own.check(blocks(32).part(first, last))
    assert plan.ranks[0].backward_s >= plan.ranks[-1].backward_s
    covered = sorted(cut for rank in plan.ranks for cut in rank.chunks)
    assert covered[0][0] == 0
    assert covered[-1][1] == 31


def test_a_pipeline_that_cannot_fit_names_the_rank() -> None:
    with pytest.raises(BudgetExceeded, match="rank 0 of 4") as caught:
        plan_pipeline(blocks(32), 4, 20, 8)
    assert caught.value.need > 20


@pytest.mark.parametrize(
    "arguments",
    [
        {"schedule": "zigzag"},
        {"micro_batches": 0},
        {"ranks": 0},
        {"chunks": 2},
        {"ranks": 99},
    ],
)
def test_pipelines_that_make_no_sense_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments)) if "ranks" not in arguments else "ranks|parts"):
        plan_pipeline(**{"chain": blocks(8), "ranks": 2, "budget_bytes": 400, "micro_batches": 2, **arguments})


def test_a_thousand_layers_on_64_ranks() -> None:
    plan = plan_pipeline(blocks(1000), 64, 9000, 128)
    assert len(plan.ranks) == 64
    assert max(rank.peak_bytes for rank in plan.ranks) <= 9000
    assert any(rank.plans[0].certificate.recompute_s > 0 for rank in plan.ranks)
    assert plan.ranks[-1].plans[0].certificate.recompute_s == 0
