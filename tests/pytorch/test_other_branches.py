"""Blocks that do more in some steps than when they were measured: steps go on under the cap, and are planned for the most."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import BudgetExceeded, fit
from gpuckpt.planning import Keep, Recompute, simulate
from gpuckpt.pytorch.other_calls import at_most
from gpuckpt.pytorch.profiling.clock import WallClock
from gpuckpt.pytorch.profiling.measure import run_measured
from tests.pytorch.steps import HOLDS, Block, batch, gradients

WIDTH, ROWS, COUNT = 16, 32, 8


class Branches(nn.Module):
    """Blocks whose second half runs or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = Block(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.first(x))
        return self.second(x) if self.wanted(x) else x

    def wanted(self, x: Tensor) -> bool:
        return bool(torch.rand(()) < 0.5)


class ByPythonsNumbers(Branches):
    def wanted(self, x: Tensor) -> bool:
        return random.random() < 0.5


class ByContents(Branches):
    def wanted(self, x: Tensor) -> bool:
        return bool(x.sum() * 7 % 2 > 1)


class BySchedule(Branches):
    """The second halves come in when training has gone on for a while."""

    def wanted(self, x: Tensor) -> bool:
        return NOW.step > 2


class Now:
    step = 0


NOW = Now()
KINDS = [Branches, ByPythonsNumbers, ByContents, BySchedule]


def model_of(kind: Callable[[], Branches]) -> nn.Sequential:
    return nn.Sequential(*[kind() for _ in range(COUNT)])


def step(model: nn.Module, number: int) -> list[bytes | None]:
    random.seed(number)
    x = batch(ROWS) + number
    NOW.step = number
    return gradients(model, lambda: model(x).square().mean(), number)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_under_the_cap(kind, hold):
    """A step may still fail that is the first to do more; after that none does."""
    model = model_of(kind)
    plain = copy.deepcopy(model)
    random.seed(0)
    torch.manual_seed(0)
    NOW.step = 0
    # Of what all blocks hold that run whole: enough for the largest plan that recomputes all.
    whole = copy.deepcopy(model)
    for block in whole:
        block.wanted = lambda x: True
    budget = fit(whole, batch(ROWS), "100%", hold=hold).budget.max_bytes * 2 // 5
    fitted = fit(model, batch(ROWS), budget, hold=hold)
    failed, held = [], set()
    for number in range(12):
        try:
            ours = step(model, number)
        except BudgetExceeded:
            failed.append(number)
        else:
            assert ours == step(plain, number), number
        assert fitted.budget.used_bytes == 0
        assert fitted.budget.peak_bytes <= budget
        held.add(fitted.measured_peak_bytes)
    assert len(failed) <= 1
    assert len(held) > 1, "blocks did vary"
    assert fitted.promised_peak_bytes >= fitted.measured_peak_bytes
    late = [deviation for deviation in fitted.deviations[3:] if not deviation.on_host]
    assert not late, "once they are known to vary, what they may hold is promised"


def test_stages_are_recomputed_once_earlier_ones_hold_more_than_planned():
    """Kept as planned, the blocks would hold more than twice the budget."""
    NOW.step = 0
    model = model_of(BySchedule)
    fitted = fit(model, batch(ROWS), "100%")
    fitted = fit(model, batch(ROWS), int(1.7 * fitted.plan.certificate.peak_bytes))
    assert fitted.plan.certificate.recompute_s == 0
    plain = copy.deepcopy(model)
    assert step(model, 0) == step(plain, 0)
    assert step(model, 5) == step(plain, 5)
    assert len(fitted.deviations) <= 1  # told at the next forward
    assert fitted.promised_peak_bytes < fitted.measured_peak_bytes <= fitted.budget.max_bytes


def test_at_most_takes_for_each_block_the_one_that_holds_most():
    random.seed(1)
    model = model_of(ByPythonsNumbers)
    measured = run_measured(model, (batch(ROWS),), {}, 1, WallClock(), 1)
    whole = copy.deepcopy(model)
    for block in whole:
        block.wanted = lambda x: True
    expected = run_measured(whole, (batch(ROWS),), {}, 1, WallClock(), 1).chain
    found = at_most(measured).chain
    assert len({measured.chain.charge(stage.saves) for stage in measured.chain.stages[1:-1]}) > 1
    assert [stage.name for stage in found.stages] == [stage.name for stage in expected.stages]
    for tree in (
        [Keep(number) for number in range(len(found))],
        [Keep(0), Recompute(tuple(Keep(number) for number in range(1, COUNT))), Keep(COUNT), Keep(COUNT + 1)],
        [Keep(0), *(Recompute((Keep(number),)) for number in range(1, COUNT + 1)), Keep(COUNT + 1)],
    ):
        assert simulate(found, tree).peak_bytes == simulate(expected, tree).peak_bytes
