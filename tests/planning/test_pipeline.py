"""Pipelines, splits, options made from rates, and the frontier."""

from __future__ import annotations

import random

import pytest

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import (
    Chain,
    Keep,
    Stage,
    cut_chain,
    in_flight,
    plan_chain,
    plan_frontier,
    plan_pipeline,
    roofline_s,
    simulate,
    split_chain,
    step_seconds,
    with_spill,
)
from gpuckpt.report.frontier import draw_frontier


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


def test_splits_divide_bytes_and_seconds() -> None:
    chain = split_chain(blocks(4), data=2, tensor=2, whole=range(5), collective_s=0.5)
    assert chain.storages == (2,) * 5 + (3,) * 4
    assert chain.stages[0].forward_s == 0.25 + 0.5
    assert chain.stages[0].output_bytes == 2


def test_spilling_is_an_option_the_solver_uses() -> None:
    chain = with_spill(blocks(8), 16.0, overlap=0.5)
    assert [variant.name for variant in chain.stages[0].variants] == ["spill"]
    assert chain.stages[0].variants[0].forward_s == 1 + 0.5 * 16 / 16
    plan = plan_chain(chain, 80)
    assert plan.certificate.peak_bytes <= 80
    assert any(isinstance(node, Keep) and node.variant == "spill" for node in plan.tree)
    assert plan.certificate.step_s < plan_chain(blocks(8), 80).certificate.step_s


def test_a_host_that_is_too_small_for_all_takes_what_it_can() -> None:
    plain, chain = blocks(8), with_spill(blocks(8), 64.0, latency_s=0.01)
    spare = next(variant for variant in chain.stages[0].variants)
    assert spare.forward_s == pytest.approx(chain.stages[0].forward_s + 16 / 64 + 0.01 * len(spare.spilled))
    free = plan_chain(chain, 64)
    most = free.certificate.host_peak_bytes
    assert most > 0
    assert free.certificate.gap == 0.0
    seconds = []
    for host_bytes in range(0, most + 1, 8):
        plan = plan_chain(chain, 64, host_bytes=host_bytes)
        plan.check(chain)
        seen = simulate(chain, plan.tree)
        assert (seen.peak_bytes, seen.host_peak_bytes) == (
            plan.certificate.peak_bytes,
            plan.certificate.host_peak_bytes,
        )
        assert seen.peak_bytes <= 64
        assert seen.host_peak_bytes <= host_bytes
        gap = seen.step_s / free.certificate.step_s - 1
        assert plan.certificate.gap == pytest.approx(gap)
        seconds.append(seen.step_s)
    assert seconds[0] == plan_chain(plain, 64).certificate.step_s
    assert seconds[-1] == free.certificate.step_s
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 3
    with pytest.raises(ValueError, match="host_bytes is -1"):
        plan_chain(chain, 64, host_bytes=-1)


def test_a_device_and_a_host_that_are_both_too_small_are_refused_with_what_would_do() -> None:
    plain, chain = blocks(8), with_spill(blocks(8), 64.0)
    with pytest.raises(BudgetExceeded) as alone:
        plan_chain(plain, 18)
    assert plan_chain(chain, 18).certificate.host_peak_bytes > 10
    with pytest.raises(BudgetExceeded, match="the host budget is 10") as refused:
        plan_chain(chain, 18, host_bytes=10)
    assert refused.value.need == alone.value.need


def test_the_roofline_is_the_slower_of_the_two() -> None:
    assert roofline_s(100, 10, 50, 10) == 2.0
    assert roofline_s(100, 30, 50, 10, efficiency=0.5) == 6.0
    for bad in ((-1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 1, 2.0)):
        with pytest.raises(ValueError):
            roofline_s(*bad)


def test_the_frontier_falls_and_its_knee_lies_below_the_chord(tmp_path) -> None:
    frontier = plan_frontier(blocks(16), 10)
    peaks, seconds = zip(*frontier.points, strict=True)
    assert list(peaks) == sorted(peaks)
    assert list(seconds) == sorted(seconds, reverse=True)
    assert peaks[-1] == simulate(blocks(16), tuple(Keep(i) for i in range(16))).peak_bytes
    assert 0 < frontier.knee < len(frontier.plans) - 1
    picture = draw_frontier(frontier, tmp_path / "f.svg", others={"sqrt": plan_chain(blocks(16), 999, "sqrt")})
    assert "knee" in picture.read_text()
