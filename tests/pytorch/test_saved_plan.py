"""`fit(plan=...)`: a plan from a file runs as it was saved, or is refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gpuckpt import CheckpointBudget, Plan, fit
from gpuckpt.errors import BudgetExceeded, InvalidPlan
from tests.pytorch.parallel.models import WIDTH, Block, Tower, batch, budget_between, same, tower, train


@pytest.fixture
def saved() -> str:
    return fit(tower(), batch(0), budget_between(tower, batch(0))).plan.to_json()


def test_it_runs_instead_of_planning(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tower(), batch(0))
    plan = Plan.from_json(saved)
    model = tower()
    monkeypatch.setattr("gpuckpt.pytorch.plan_maker.plan_chain", None)
    fitted = fit(model, batch(0), "1MiB", plan=plan)  # which would keep everything
    assert fitted.plan.tree == plan.tree
    assert fitted.plan.certificate.recompute_s > 0
    assert same(train(model, batch(0)), plain)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes == plan.certificate.peak_bytes


def test_other_lengths_are_planned(saved: str) -> None:
    model = tower()
    fitted = fit(model, batch(0), "1MiB", plan=Plan.from_json(saved))
    model(batch(0, 24)).backward()
    assert fitted.plan.certificate.recompute_s == 0
    model(batch(0)).backward()
    assert fitted.plan.certificate.recompute_s > 0


def test_it_outlives_changes_that_save_the_same(saved: str) -> None:
    model = tower()
    fitted = fit(model, batch(0), "1MiB", plan=Plan.from_json(saved))
    model.blocks[1].register_forward_hook(lambda *_: None)
    model(batch(0)).backward()
    assert fitted.plan.tree == Plan.from_json(saved).tree
    model.blocks[1] = nn.Identity()
    model(batch(0)).backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def narrow() -> Tower:
    model = tower()
    model.blocks[2] = Block(WIDTH, 40)
    return model


def renamed() -> nn.Module:
    model = tower()
    model.layers = model.blocks
    del model.blocks
    model.forward = lambda x: Tower.forward(with_blocks(model), x)
    return model


class with_blocks:
    def __init__(self, model: nn.Module) -> None:
        self.stem, self.blocks, self.head = model.stem, model.layers, model.head


@pytest.mark.parametrize(
    ("build", "rows", "reason"),
    [
        (lambda: tower(blocks=5), 16, "covers 8 stages, and 7 were measured"),
        (narrow, 16, "stages have other names or options, or save other bytes"),
        (tower, 15, r"these stages would hold \d+ bytes, and it promised"),
        (renamed, 16, "stages have other names"),
    ],
)
def test_a_plan_for_something_else_is_refused(saved: str, build, rows: int, reason: str) -> None:
    model = build()
    twin = copy.deepcopy(model) if build is not renamed else build()
    budget = CheckpointBudget("1MiB")
    with pytest.raises(InvalidPlan, match=reason):
        fit(model, batch(0, rows), budget, plan=Plan.from_json(saved))
    assert budget.used_bytes == 0
    assert same(train(model, batch(0, rows)), train(twin, batch(0, rows)))


def test_a_budget_that_is_too_small_for_it(saved: str) -> None:
    plan = Plan.from_json(saved)
    with pytest.raises(BudgetExceeded) as caught:
        fit(tower(), batch(0), plan.certificate.peak_bytes - 1, plan=plan)
    assert caught.value.need == plan.certificate.peak_bytes


def test_what_is_no_plan(saved: str) -> None:
    with pytest.raises(TypeError, match=r"Plan\.from_json"):
        fit(tower(), batch(0), "1MiB", plan=saved)  # type: ignore[arg-type]


def test_in_another_dtype(saved: str) -> None:
    with pytest.raises(InvalidPlan, match="would hold"):
        fit(tower().to(torch.bfloat16), batch(0).to(torch.bfloat16), "1MiB", plan=Plan.from_json(saved))
