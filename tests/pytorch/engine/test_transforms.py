"""Forward-mode derivatives, vmap and other transforms of torch.func, around and inside of checkpoints and budgets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, checkpoint, fit

# torch compiles its own decompositions when it first needs one.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

WAYS = ["checkpoint", "account", "pool", "in account", "in pool"]


def run(way: str, fn: Callable[..., Any], *args: Any) -> Any:
    if way == "plain":
        return fn(*args)
    if way == "checkpoint":
        return checkpoint(fn, *args)
    budget = CheckpointBudget("1MiB", device="cpu", hold=way.removeprefix("in "))
    if way.startswith("in "):
        with budget:
            return fn(*args)
    return checkpoint(fn, *args, budget=budget)


class Case:
    """A small model, and what is asked of it; `how` is a way to call it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.x, self.t = torch.randn(5, 4), torch.randn(5, 4)

    def gradient(self, loss: Tensor) -> Tensor:
        self.model.zero_grad()
        loss.backward()
        grad = self.model[0].weight.grad
        assert grad is not None
        return grad.clone()

    # by hand

    def tangent(self, how: str) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(how, self.model, forward_ad.make_dual(self.x, self.t))).tangent.clone()

    def gradient_of_the_tangent(self, how: str) -> Tensor:
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(run(how, self.model, forward_ad.make_dual(self.x, self.t)))
            return self.gradient(out.tangent.square().sum() + out.primal.square().sum())

    # inside of what is checkpointed

    def vmap_inside(self, how: str) -> Tensor:
        return self.gradient(run(how, torch.func.vmap(self.model), self.x).square().sum())

    def jvp_inside(self, how: str) -> Tensor:
        return self.gradient(run(how, lambda x: torch.func.jvp(self.model, (x,), (self.t,))[1], self.x).square().sum())

    def batched_gradients(self, how: str) -> Tensor:
        out = run(how, self.model, self.x)
        return torch.autograd.grad(out, [*self.model.parameters()], torch.ones(3, 5, 4), is_grads_batched=True)[0]

    def jacobian(self, how: str) -> Any:
        return torch.autograd.functional.jacobian(lambda x: run(how, self.model, x), self.x)

    # around it

    def jvp(self, how: str) -> Tensor:
        return torch.func.jvp(lambda x: run(how, self.model, x), (self.x,), (self.t,))[1].detach()

    def gradient_of_jvp(self, how: str) -> Tensor:
        out = torch.func.jvp(lambda x: run(how, self.model, x), (self.x,), (self.t,))[1]
        return self.gradient(out.square().sum())

    def vmap(self, how: str) -> Tensor:
        return torch.func.vmap(lambda x: run(how, self.model, x))(self.x).detach()

    def gradient_of_vmap(self, how: str) -> Tensor:
        return self.gradient(torch.func.vmap(lambda x: run(how, self.model, x))(self.x).square().sum())

    def forward_jacobian(self, how: str) -> Any:
        return torch.func.jacfwd(lambda x: run(how, self.model, x))(self.x).detach()


DIRECT = ["tangent", "gradient_of_the_tangent", "vmap_inside", "jvp_inside", "batched_gradients", "jacobian"]
AROUND = ["jvp", "gradient_of_jvp", "vmap", "gradient_of_vmap", "forward_jacobian"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", DIRECT)
def test_derivatives_of_every_kind(what: str, way: str) -> None:
    assert torch.equal(getattr(Case(), what)(way), getattr(Case(), what)("plain"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", AROUND)
def test_inside_of_a_transform_a_checkpoint_is_a_plain_call_and_says_so(what: str, way: str) -> None:
    expected = getattr(Case(), what)("plain")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(getattr(Case(), what)(way), expected)
    ours = [str(warning.message) for warning in told if "is a plain call" in str(warning.message)]
    assert bool(ours) == (not way.startswith("in "))


def test_without_a_budget_also_where_torch_takes_no_hooks() -> None:
    case = Case()

    def loss(how: str) -> Callable[[Tensor], Tensor]:
        return lambda x: run(how, case.model, x).square().sum()

    expected = torch.func.grad(loss("plain"))(case.x)
    with pytest.warns(UserWarning, match="plain call"):
        assert torch.equal(torch.func.grad(loss("checkpoint"))(case.x), expected)
    for way in ("account", "pool"):
        with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad"):
            torch.func.grad(loss(way))(case.x)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_what_a_tangent_saves_is_charged_and_zeros_are_not(hold: str) -> None:
    case, budget = Case(), CheckpointBudget("1MiB", device="cpu", hold=hold)
    hidden_bytes = 5 * 8 * 4
    with budget, forward_ad.dual_level():
        out = case.model(forward_ad.make_dual(case.x, case.t))
        # x, its tangent, what tanh gives; and of the tangents two of that size.
        assert budget.used_bytes == case.x.nbytes + case.t.nbytes + 3 * hidden_bytes
    del out
    assert budget.used_bytes == 0


@pytest.mark.parametrize("what", ["jvp", "vmap"])
def test_a_fitted_model_inside_of_a_transform(what: str) -> None:
    expected = getattr(Case(), what)("plain")
    case = Case()
    fitted = fit(case.model, case.x, "1MiB")
    with pytest.warns(UserWarning, match="a fitted Sequential inside torch.func"):
        assert torch.equal(getattr(case, what)("plain"), expected)
    case.model(case.x).sum().backward()
    assert fitted.budget.used_bytes == 0
