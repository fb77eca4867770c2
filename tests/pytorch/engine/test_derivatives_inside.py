"""Checkpointed work that differentiates inside, and work that keeps tensors of its forward."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, RecomputeMismatch, checkpoint
from tests.pytorch.steps import HOLDS, bits

BUDGETS = {
    "none": lambda: None,
    "account": lambda: CheckpointBudget("1MiB", device="cpu"),
    "pool": lambda: CheckpointBudget("1MiB", device="cpu", hold="pool"),
}
budgets = pytest.mark.parametrize("budget", BUDGETS)


def grad_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative, itself differentiable."""

    def derivative(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    return derivative


def sines(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


NESTED = {
    "grad(c(f))": lambda c, g: g(c(sines)),
    "grad(c(c(f)))": lambda c, g: g(c(c(sines))),
    "c(grad(f))": lambda c, g: c(g(sines)),
    "grad(c(grad(f)))": lambda c, g: g(c(g(sines))),
    "c(grad(grad(c(f))))": lambda c, g: c(g(g(c(sines)))),
    "grad(c(grad(c(f))))": lambda c, g: g(c(g(c(sines)))),
    "grad(c(grad(c(grad(c(f))))))": lambda c, g: g(c(g(c(g(c(sines)))))),
}


@budgets
@pytest.mark.parametrize("case", NESTED)
def test_derivatives_of_checkpoints_in_checkpoints(case, budget):
    held = BUDGETS[budget]()
    build = NESTED[case]
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    plain = build(lambda f: f, grad_of)(x)
    ours = build(lambda f: lambda x: checkpoint(f, x, budget=held), grad_of)(x)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    for_x = [torch.autograd.grad(y.sum(), x)[0] for y in (plain, ours)]
    torch.testing.assert_close(for_x[1], for_x[0], rtol=1e-14, atol=0)
    del ours
    assert held is None or held.used_bytes == 0


class Energy(nn.Module):
    """Forces from an energy: (N, 3) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


class Penalty(Energy):
    """A gradient penalty beside the value."""

    def forward(self, x: Tensor) -> Tensor:
        value = self.net(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return value + slope.square().sum()


class InnerStep(Energy):
    """One step of gradient descent on a copy of the weight, as MAML takes it."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.net
        weight = first.weight
        inner = nn.functional.linear(x, weight, first.bias).square().mean()
        weight = weight - 0.1 * torch.autograd.grad(inner, weight, create_graph=True)[0]
        return last(torch.tanh(nn.functional.linear(x, weight, first.bias)))


@budgets
@pytest.mark.parametrize("how", ["backward", "retained", "twice", "create_graph"])
@pytest.mark.parametrize("kind", [Energy, Penalty, InnerStep])
def test_modules_that_differentiate_inside(kind, how, budget):
    torch.manual_seed(0)
    module = kind().double()
    held = BUDGETS[budget]()

    def step(call: Callable[[Tensor], Tensor]) -> list[bytes | None]:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        module.zero_grad(set_to_none=True)
        loss = call(x).square().sum()
        if how == "create_graph":
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = slope.square().sum()
        if how in ("retained", "twice"):
            loss.backward(retain_graph=True)
        if how != "retained":
            loss.backward()
        return bits([x.grad, *(p.grad for p in module.parameters())])

    assert step(lambda x: checkpoint(module, x, budget=held)) == step(module)
    assert held is None or held.used_bytes == 0


class Deep(torch.autograd.Function):
    """Each backward runs another one inside, until x is used up."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_() - 1
        return ctx.x.detach()

    @staticmethod
    def backward(ctx, grad):
        if ctx.x >= 0:
            with torch.enable_grad():
                Deep.apply(ctx.x).sin().sum().backward()
        return grad


def test_more_nested_backwards_than_one_thread_takes():
    """Beyond 60 autograd goes on in another thread."""

    def work(x: Tensor) -> Tensor:
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(Deep.apply(y).sin().sum(), y)
        return (x * slope).sin()

    found = []
    for call in (work, lambda x: checkpoint(work, x)):
        x = torch.tensor(70.0, requires_grad=True)
        call(x).backward()
        found.append(x.grad)
    assert torch.equal(*found)


class Keeps(nn.Module):
    """Keeps a tensor of its forward, in one of the ways that models do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 20)
        self.how = how
        self.state: Tensor | None = None
        self.log: list[Tensor] = []
        if how == "hook":
            self.linear.register_forward_hook(lambda module, args, out: setattr(self, "state", out))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        if self.how == "attribute":
            self.state = h
        elif self.how == "list":
            self.log = [h, h * 2]
        elif self.how == "loss":
            self.state = h.square().mean()
        return torch.sin(h * 2)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("how", ["attribute", "list", "hook", "loss"])
def test_what_a_module_keeps_of_its_forward_keeps_no_bytes_of_the_recompute(how, hold):
    module = Keeps(how)
    plain = copy.deepcopy(module)
    if how == "hook":  # the copy's hook belongs to the original
        plain.linear._forward_hooks.clear()
    x = torch.linspace(0, 1, 60).reshape(3, 20)
    plain(x).sum().backward()
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    out = checkpoint(module, x, budget=budget).sum()
    out.backward()
    del out
    assert bits(p.grad for p in module.parameters()) == bits(p.grad for p in plain.parameters())
    # The loss of the first forward is the module's, with the tensor that its own backward needs, as in a plain run.
    assert budget.used_bytes == (240 if how == "loss" else 0)
    gone = weakref.ref(module)
    if how == "loss":
        module.state = None
    del module
    gc.collect()
    assert gone() is None
    assert budget.used_bytes == 0


def test_backward_through_what_a_recompute_left_behind_is_refused():
    made: SimpleQueue[Tensor] = SimpleQueue()  # a list would be put back after the recompute

    def work(x: Tensor) -> Tensor:
        h = torch.tanh(x * 3)
        made.put(h.square().mean())
        return torch.sin(h * 2)

    x = torch.ones(3, 20, requires_grad=True)
    checkpoint(work, x).sum().backward()
    assert made.qsize() == 2
    first = made.get()
    with pytest.raises(RecomputeMismatch, match="outlived the recompute"):
        made.get().backward()
    assert first.requires_grad


def test_a_recompute_puts_back_what_the_first_forward_kept():
    module = Keeps("loss")
    loss = checkpoint(module, torch.ones(3, 20)).sum()
    state = module.state
    loss.backward()
    assert module.state is state


@pytest.mark.parametrize("hold", HOLDS)
def test_an_auxiliary_loss_of_the_first_forward(hold):
    module = Keeps("loss")
    plain = copy.deepcopy(module)
    x = torch.linspace(0, 1, 60).reshape(3, 20)
    (plain(x).sum() + plain.state).backward()
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    loss = checkpoint(module, x, budget=budget).sum()
    (loss + module.state).backward()
    assert bits(p.grad for p in module.parameters()) == bits(p.grad for p in plain.parameters())
    del loss
    assert budget.used_bytes == 0
