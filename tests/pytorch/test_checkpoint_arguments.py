"""What may be given to `checkpoint`, and what is refused before anything has run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import noop_context_fn

from gpuckpt import CheckpointBudget, checkpoint

WEIGHT = torch.full((3,), 2.0, requires_grad=True)


def x() -> Tensor:
    return torch.linspace(0.1, 1.0, 3).requires_grad_()


def squared(x: Tensor) -> Tensor:
    return x.sin().square()


@pytest.mark.parametrize("budget", [2, 0, "1MiB", 1.5, True, object(), CheckpointBudget])
def test_a_budget_that_is_none_is_refused(budget: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a CheckpointBudget, such as CheckpointBudget\('2GiB'\)"):
        checkpoint(squared, x(), budget=budget)


@pytest.mark.parametrize("fn", [None, 3, torch.ones(2), "squared"])
def test_what_cannot_be_called_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="expected something to call"):
        checkpoint(fn, x())


class TakesFn(nn.Module):
    def forward(self, x: Tensor, fn: str = "none", self_: int = 0) -> Tensor:
        return getattr(x, fn)().square() + self_


def test_arguments_of_any_name() -> None:
    for names in ({"fn": "sin"}, {"fn": "exp", "self_": 2}, {"x": x(), "fn": "cos"}):
        given = names if "x" in names else {"x": x(), **names}
        expected = TakesFn()(**given)
        out = checkpoint(TakesFn(), **given)
        assert torch.equal(out, expected)
        (got,) = torch.autograd.grad(out.sum(), given["x"])
        assert torch.equal(got, torch.autograd.grad(expected.sum(), given["x"])[0])


# ---- no arguments


def of_a_global() -> Tensor:
    return WEIGHT.sin().square()


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self) -> Tensor:
        return self.weight.sin().square()

    def method(self, weight: Tensor | None = None) -> Tensor:
        return self() if weight is None else weight.sin().square()


def _cases() -> dict[str, tuple[Any, Tensor]]:
    import functools

    module, w = Holds(), torch.full((3,), 2.0, requires_grad=True)

    def by_default(weight: Tensor = w) -> Tensor:
        return weight.sin().square()

    return {
        "module": (module, module.weight),
        "method": (module.method, module.weight),
        "closure": (lambda: w.sin().square(), w),
        "partial": (functools.partial(squared, w), w),
        "default": (by_default, w),
        "global": (of_a_global, WEIGHT),
    }


@pytest.mark.parametrize("hold", [None, "account", "pool"])
@pytest.mark.parametrize("case", _cases())
def test_functions_without_arguments(case: str, hold: str | None) -> None:
    fn, weight = _cases()[case]
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)
    (got,) = torch.autograd.grad(checkpoint(fn, budget=budget).sum(), weight)
    (expected,) = torch.autograd.grad(fn().sum(), weight)
    assert torch.equal(got, expected)
    assert budget is None or budget.used_bytes == 0


@pytest.mark.parametrize("fn", [lambda: torch.ones(1), lambda: 3])
def test_functions_that_reach_nothing_are_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="at least one input"):
        checkpoint(fn)


# ---- options of torch.utils.checkpoint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_reentrant": False},
        {"use_reentrant": True},
        {"preserve_rng_state": False},
        {"preserve_rng_state": True, "determinism_check": "default", "early_stop": False, "debug": False},
        {"early_stop": True, "context_fn": noop_context_fn},
    ],
)
def test_torchs_wrapper_with_our_checkpoint(options: dict[str, Any]) -> None:
    layer = nn.Linear(3, 3)
    (got,) = torch.autograd.grad(
        checkpoint_wrapper(layer, checkpoint_fn=checkpoint, **options)(x()).sum(), layer.weight
    )
    (expected,) = torch.autograd.grad(layer(x()).sum(), layer.weight)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("early_stop", 3), ("context_fn", lambda: None), ("determinism_check", "none"), ("debug", True)],
)
def test_options_that_ask_for_something_else_are_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}=.*option of torch.utils.checkpoint"):
        checkpoint(nn.Linear(3, 3), x(), **{name: value})


def test_a_function_that_takes_such_a_name_gets_it() -> None:
    def scaled(x: Tensor, debug: float, **more: Any) -> Tensor:
        return x.sin() * debug * more.get("early_stop", 1.0)

    given = x()
    for options in ({"debug": 3.0}, {"debug": 3.0, "early_stop": 2.0}):
        (got,) = torch.autograd.grad(checkpoint(scaled, given, **options).sum(), given)
        assert torch.equal(got, torch.autograd.grad(scaled(given, **options).sum(), given)[0])
    with pytest.raises(TypeError, match="missing"):
        checkpoint(scaled, given, determinism_check="default")
