"""Budgets that are a share of a plain step, and models that are fitted before there is a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import BudgetExceeded, CheckpointBudget, CheckpointError, fit, fitted, unfit
from tests.pytorch.beside_plain import plain_peak_bytes
from tests.pytorch.steps import Block, bits


def model(dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16, dropout) for _ in range(6)])


def rows(count: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count)).to(dtype)


def plain_bytes(m: nn.Module, x: Tensor) -> int:
    """What autograd saves in a plain forward, without a loss."""
    return plain_peak_bytes(m, (x,), {}, loss_of=lambda out: out)


def gradients(m: nn.Module, *batches: Tensor) -> list[bytes | None]:
    m.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    losses = [m(x).square().mean() for x in batches]
    sum(losses).backward()
    return bits([*losses, *(p.grad for p in m.parameters())])


# ---- no example


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_batch_is_the_example(dtype: torch.dtype) -> None:
    ours = model()
    fit(ours, None, "20KiB")
    ours.to(dtype)  # as a trainer does, after the user's own code
    plain = copy.deepcopy(unfit(model())).to(dtype)
    small = 8 if dtype is not torch.float64 else 4
    for _ in range(2):
        assert gradients(ours, rows(small, dtype)) == gradients(plain, rows(small, dtype))
        made = fitted(ours)
        assert made is not None
        assert made.measured_peak_bytes == made.promised_peak_bytes <= made.budget.max_bytes == 20 * 1024
    assert not made.deviations


def test_evaluation_before_training_is_no_example() -> None:
    ours = model()
    waiting = fit(ours, None, "1MiB")
    with torch.no_grad():
        ours(rows(64))
    for ask in (lambda: waiting.plan, lambda: waiting.budget, waiting.report, lambda: waiting.promised_peak_bytes):
        with pytest.raises(CheckpointError, match="nothing is planned yet: call the model"):
            ask()
    waiting.check_promise()
    assert gradients(ours, rows()) == gradients(model(), rows())
    assert len(waiting._maker.plans) == 1


def test_a_first_batch_that_does_not_fit_is_refused_and_a_smaller_one_runs() -> None:
    ours = model()
    waiting = fit(ours, None, "20KiB")
    with pytest.raises(BudgetExceeded) as refused:
        ours(rows(1000))
    assert refused.value.available == 20 * 1024 < refused.value.need
    assert gradients(ours, rows(8)) == gradients(model(), rows(8))
    assert waiting.measured_peak_bytes == waiting.promised_peak_bytes <= 20 * 1024


def test_blocks_that_are_changed_before_the_first_batch() -> None:
    def changed(m: nn.Sequential) -> nn.Sequential:
        torch.manual_seed(3)
        m.append(Block(16))
        m[0].dropout.p = 0.5
        return m

    ours = model()
    waiting = fit(ours, None, "30KiB")
    changed(ours)
    assert gradients(ours, rows()) == gradients(changed(model()), rows())
    assert waiting.measured_peak_bytes == waiting.promised_peak_bytes


def test_it_can_be_taken_back_before_the_first_batch() -> None:
    ours = model()
    waiting = fit(ours, None, "1MiB")
    assert fitted(ours) is waiting
    assert unfit(ours) is ours
    assert fitted(ours) is None
    assert gradients(ours, rows()) == gradients(model(), rows())
    with pytest.raises(CheckpointError):
        _ = waiting.plan


def test_plan_for_is_a_first_batch_as_well() -> None:
    waiting = fit(model(), None, "1MiB")
    assert waiting.plan_for(rows()).plan is waiting.plan


# ---- a share


@pytest.mark.parametrize("share", ["40%", " 62.5 % ", "100%"])
@pytest.mark.parametrize("options", [{}, {"hold": "pool"}, {"host_budget": "1MiB"}], ids=["account", "pool", "host"])
@pytest.mark.parametrize("waits", [False, True])
def test_a_share_is_of_what_a_plain_step_holds(share: str, options: dict[str, Any], waits: bool) -> None:
    ours = model()
    plain = plain_bytes(ours, rows())
    made = fit(ours, None if waits else rows(), share, **options)
    assert gradients(ours, rows()) == gradients(model(), rows())
    assert made.budget.max_bytes == int(float(share.strip(" %")) / 100 * plain)
    assert made.measured_peak_bytes == made.promised_peak_bytes <= made.budget.max_bytes
    assert made.budget.used_bytes == 0
    cap = made.budget.max_bytes
    assert gradients(ours, rows(16)) == gradients(model(), rows(16))
    assert made.budget.max_bytes == cap, "the first batch decides"


def test_a_share_of_two_forwards() -> None:
    ours = model()
    plain = plain_bytes(ours, rows())
    made = fit(ours, rows(), "50%", live=2)
    assert made.budget.max_bytes == plain
    assert gradients(ours, rows(), rows()) == gradients(model(), rows(), rows())
    assert made.budget.peak_bytes <= plain


def test_a_share_that_is_too_small_names_the_smallest_budget() -> None:
    ours = model()
    least = fit(ours, rows(), "100%").plan.certificate.smallest_budget_bytes
    with pytest.raises(BudgetExceeded) as refused:
        fit(model(), rows(), "1%")
    assert refused.value.need == least


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("0%", ValueError, "expected a share of what a plain step holds, above 0% and up to 100%"),
        ("140%", ValueError, "expected a share of what a plain step holds"),
        ("-5%", ValueError, "not a size in bytes"),
        ("40 percent", ValueError, "unknown unit|not a size"),
        (0.4, TypeError, "a size in bytes was expected"),
        (None, TypeError, "a size in bytes was expected"),
    ],
)
@pytest.mark.parametrize("example", [None, rows()], ids=["none", "example"])
def test_what_is_no_budget(budget: Any, error: type[Exception], words: str, example: Tensor | None) -> None:
    ours = model()
    with pytest.raises(error, match=words):
        fit(ours, example, budget)
    assert fitted(ours) is None


@pytest.mark.parametrize("host", ["nothing", True, CheckpointBudget(10, device="cpu")])
def test_a_host_budget_that_is_none_is_refused_before_there_is_a_batch(host: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        fit(model(), None, "1MiB", host_budget=host)
