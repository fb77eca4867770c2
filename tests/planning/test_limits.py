"""Limits and refusals of the planner's parts, at the very number where they begin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Keep, Recompute, Stage, Variant, pipeline, plan_frontier
from gpuckpt.planning.strategies import greedy, revolve, revolve_steps
from gpuckpt.planning.tables import text_table
from gpuckpt.planning.variants import with_spill

MOST = 1 << 60


def stage(*saves: int, **fields: object) -> Stage:
    return replace(Stage("block", 1.0, 2.0, saves, saves[:1]), **fields)


CHAIN = Chain(tuple(stage(2 * i, 2 * i + 1) for i in range(6)), (100, 900) * 6)


def test_all_storages_together_have_a_limit():
    assert Chain((stage(0, 1),), (MOST - 1, 1)).saved_bytes == MOST
    with pytest.raises(InvalidChain, match=rf"storages of {MOST + 1} bytes in all, in units; expected at most 2\^60"):
        Chain((stage(0, 1),), (MOST - 1, 2))
    with pytest.raises(InvalidChain, match="in units"):
        Chain((stage(0, 1),), (MOST - 1, 1), unit_bytes=64)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "1"])
def test_seconds_of_a_copy_are_seconds(wrong: object):
    Chain((stage(0, 1, variants=(Variant("away", (0,), 1.0, 2.0, (1,), moved_s=1.0),)),), (1, 1))
    with pytest.raises(InvalidChain, match="variant 'away': moved_s"):
        Chain((stage(0, 1, variants=(Variant("away", (0,), 1.0, 2.0, (1,), moved_s=wrong),)),), (1, 1))


def test_a_copy_takes_no_longer_than_the_pass_that_it_is_part_of():
    with pytest.raises(InvalidChain, match=r"moved_s is 1\.5, part of a forward of 1\.0 s"):
        Chain((stage(0, 1, variants=(Variant("away", (0,), 1.0, 2.0, (1,), moved_s=1.5),)),), (1, 1))


def test_what_cannot_run_again_and_what_holds_nothing_is_not_spilled():
    fixed, empty = stage(0, 1, recomputable=False, inputs=()), stage(2)
    spilled = with_spill(Chain((fixed, empty, stage(3, 4)), (5, 5, 0, 5, 5)), 1e9)
    assert [[option.name for option in each.options] for each in spilled.stages] == [
        ["keep"],
        ["keep"],
        ["keep", "spill"],
    ]


def test_greedy_drops_nothing_where_nothing_has_to_go():
    assert greedy(CHAIN, 6000) == tuple(map(Keep, range(6)))
    assert sum(isinstance(node, Recompute) for node in greedy(CHAIN, 5999)) == 1


def test_a_schedule_of_no_snapshots_is_refused():
    with pytest.raises(ValueError, match="snapshots"):
        revolve(CHAIN, 0)
    assert revolve(CHAIN, 1)
    assert [revolve_steps(steps, 4) for steps in (1, 2, 5, 24)] == [1, 3, 9, 75]


def test_a_frontier_has_two_ends():
    assert len(plan_frontier(CHAIN, 2).points) == 2
    with pytest.raises(ValueError, match="budgets"):
        plan_frontier(CHAIN, 1)


def test_the_largest_pipeline_that_is_played_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "_MOST_JOBS", 12)
    seconds = [1.0] * 3
    assert pipeline.step_seconds(seconds, seconds, 4, "1f1b") > 0
    with pytest.raises(ValueError, match=r"3 \* 5 \* 1; expected at most 12"):
        pipeline.step_seconds(seconds, seconds, 5, "1f1b")


@pytest.mark.parametrize(
    ("most", "body"),
    [
        (5, ["1", "2", "3", "4", "5"]),
        (4, ["1", "2", "... 1 more ...", "4", "5"]),
        (3, ["1", "... 2 more ...", "4", "5"]),
        (1, ["... 4 more ...", "5"]),
    ],
)
def test_the_middle_of_a_long_table_is_left_out(most: int, body: list[str]):
    lines = text_table([["n"], *([str(n)] for n in range(1, 6))], [False], most_rows=most)
    assert lines == ["n", *body]
