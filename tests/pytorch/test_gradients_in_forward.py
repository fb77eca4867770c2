"""Models whose forward goes backward, or needs autograd in other ways: forces, penalties, hooks on activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import Layer

WIDTH = 16


def layers(count: int = 5) -> nn.Sequential:
    return nn.Sequential(*[Layer() for _ in range(count)])


class Forces(nn.Module):
    """An interatomic potential: the gradient of its energy is part of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.blocks(x).square().sum()
        return energy.reshape(1, 1), torch.autograd.grad(energy, x, create_graph=True)[0].square().sum().reshape(1, 1)


class Penalty(nn.Module):
    """A critic with a gradient penalty, which enables autograd itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers()

    def forward(self, x: Tensor) -> Tensor:
        score = self.blocks(x).mean()
        with torch.enable_grad():
            between = (x.detach() * 0.5).requires_grad_()
            slope = torch.autograd.grad(self.blocks(between).sum(), between, create_graph=True)[0]
        return score + (slope.norm(dim=-1) - 1).square().mean()


class Reversal(nn.Module):
    """A hook on an activation turns its gradient round."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers())

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2:
                x.register_hook(lambda gradient: -gradient)
        return x.square().mean()


class EnergyBlock(Layer):
    """Differentiates an energy of its own inside: nobody else's affair, and it can be recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x if x.requires_grad else x.detach().requires_grad_()
            slope = torch.autograd.grad(super().forward(inner).sin().sum(), inner, create_graph=True)[0]
        return x + slope


class OfEnergies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[EnergyBlock() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("build", [Forces, Penalty, Reversal, OfEnergies])
def test_gradients_are_those_of_the_plain_run(build: type[nn.Module], hold: str) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(8, WIDTH)
    plain = copy.deepcopy(model)
    fitted = gpuckpt.fit(model, x, "16MiB", hold=hold)
    for _ in range(2):
        for got, expected in zip(gradients(model, x), gradients(plain, x), strict=True):
            assert torch.equal(got, expected)
        assert fitted.budget.used_bytes == 0
        assert 0 < fitted.measured_peak_bytes <= fitted.promised_peak_bytes
    assert not fitted.deviations


@pytest.mark.parametrize("build", [Reversal, OfEnergies])
def test_stages_that_keep_to_themselves_are_recomputed(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    beside_plain(build(), torch.randn(8, WIDTH), share=None)


@pytest.mark.parametrize("build", [Forces, Penalty])
def test_stages_that_forward_goes_backward_through_are_kept(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(8, WIDTH)
    fitted = gpuckpt.fit(model, x, "16MiB")
    stages = [stage for stage in fitted.chain.stages if stage.name.startswith("blocks")]
    assert stages
    assert not all(stage.recomputable for stage in stages)
    least = fitted.plan.certificate.smallest_budget_bytes
    fitted.unfit()
    with pytest.raises(gpuckpt.BudgetExceeded):
        gpuckpt.fit(model, x, least - 1)


def test_a_forward_that_fails_says_why() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = layers()

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) @ torch.ones(3)

    with pytest.raises(RuntimeError, match="size mismatch"):
        gpuckpt.fit(Broken(), torch.randn(8, WIDTH), "1MiB")


class Functional(nn.Module):
    """Takes its gradients by torch.func, which has no hooks on saved tensors."""

    def __init__(self, derivative) -> None:
        super().__init__()
        self.blocks, self.score = layers(), nn.Linear(WIDTH, 1)
        self.derivative = derivative

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return (x * torch.vmap(self.derivative(lambda row: self.score(row).tanh().sum()))(x)).square().mean()


@pytest.mark.parametrize(
    "derivative",
    [torch.func.grad, torch.func.jacrev, lambda f: lambda row: torch.func.vjp(f, row)[1](torch.ones(()))[0]],
    ids=["grad", "jacrev", "vjp"],
)
def test_derivatives_by_torch_func_are_refused_by_name(derivative) -> None:
    model, x = Functional(derivative), torch.randn(8, WIDTH)
    expected = model(x)
    with pytest.raises(NotImplementedError, match=r"Functional calls torch\.func\.grad.*Use torch\.autograd\.grad"):
        gpuckpt.fit(model, x, "1MiB")
    assert gpuckpt.fitted(model) is None
    assert torch.equal(model(x), expected)
