"""Ranges in a profile, and GPUCKPT_TRACE."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import gpuckpt
from tests.pytorch.steps import batch, blocks


@pytest.fixture
def fitted() -> gpuckpt.Fitted:
    return gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)


def ran(fitted: gpuckpt.Fitted) -> collections.Counter[str]:
    """How often each of our ranges is in the profile of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fitted(batch()).square().sum().backward()
    return collections.Counter(event.name for event in profile.events() if event.name.startswith("gpuckpt/"))


def test_a_profile_shows_each_stage_in_forward_and_in_each_recompute(fitted: gpuckpt.Fitted) -> None:
    counted = [block.tally.count for block in fitted.model]
    found = ran(fitted)
    runs = [block.tally.count - before for block, before in zip(fitted.model, counted, strict=True)]
    assert max(runs) > 1
    assert sum(found.values()) == sum(runs)
    names = [fitted.chain.stages.index(stage) for stage in fitted.chain.stages if stage.name.isdigit()]
    for number, count in zip(names, runs, strict=True):
        assert found[f"gpuckpt/forward/stage{number}"] == 1
        assert found[f"gpuckpt/recompute/stage{number}"] == count - 1


def test_what_a_recompute_runs_lies_inside_of_its_range(fitted: gpuckpt.Fitted) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fitted(batch()).square().sum().backward()
    events = profile.events()
    ranges = [e.time_range for e in events if e.name.startswith("gpuckpt/")]
    norms = [e.time_range for e in events if e.name == "aten::native_layer_norm"]
    assert len(norms) == len(ranges)
    assert all(any(r.start <= n.start <= n.end <= r.end for r in ranges) for n in norms)


def test_nothing_is_marked_where_nothing_profiles(fitted: gpuckpt.Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("gpuckpt.pytorch.trace.record_function", never)
    fitted(batch()).square().sum().backward()


@pytest.mark.parametrize("setting", ["1", "0", ""])
def test_a_trace_says_once_what_becomes_of_each_stage(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUCKPT_TRACE", setting)
    fitted = gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)
    for _ in range(2):
        fitted(batch()).sum().backward()
    told = capsys.readouterr().err.splitlines()
    if setting != "1":
        assert told == []
        return
    stages = fitted.report().stages
    assert len(told) == len(stages)
    for line, stage in zip(told, stages, strict=True):
        assert line.startswith(
            f"gpuckpt: Sequential stage{stage.number} {stage.name}: {stage.fate}, runs {stage.runs} times"
        )
