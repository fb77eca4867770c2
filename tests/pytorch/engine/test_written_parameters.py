"""Parameters that a forward writes itself, behind autograd's back: averages, power iterations, weights that are clamped."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from gpuckpt import CheckpointBudget, StateModified, checkpoint, fit
from tests.pytorch.steps import HOLDS, Layer, batch, bits


class PowerIteration(Layer):
    """Spectral norm as in many GANs: its vector is a frozen parameter, which is set through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(normalize(torch.randn(64), dim=0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up.weight
        v = normalize(weight.data.t().mv(self.u.data), dim=0)
        self.u.data = normalize(weight.data.mv(v), dim=0)
        return x + self.down(torch.tanh(linear(x, weight / self.u.dot(weight.mv(v)))))


class Average(Layer):
    """The mean of what it was given, in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return super().forward(x - self.mean)


class AverageUnderNoGrad(Average):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
        return Layer.forward(self, x - self.mean)


class Clamped(Layer):
    """Clamped weights are the same when they are clamped again."""

    def forward(self, x: Tensor) -> Tensor:
        self.up.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class FirstBatch(Layer):
    """Trained parameters that the first batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.shift.data.copy_(-x.detach().mean(0))
            self.ready = True
        return super().forward(x + self.shift)


class Momentum(nn.Module):
    """A network and its moving average, which is part of the model and moves in each forward."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(*[Layer() for _ in range(count)])
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                old.data.mul_(0.7).add_(new.data, alpha=0.3)
            target = self.average(x + 0.1)
        return self.net(x) - target


class Decayed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.up.weight.data.mul_(0.99)
        return super().forward(x)


def row_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind() if kind is Momentum else nn.Sequential(*[kind() for _ in range(4)])


def trained(model: nn.Module, call: Callable[[Tensor], Tensor], steps: int = 4) -> list[bytes | None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: list[bytes | None] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = call(batch()).square().mean()
        loss.backward()
        found += bits([loss, *(p.grad for p in model.parameters())])
        optimizer.step()
    return found + bits(model.state_dict().values())


WRITING = [PowerIteration, Average, AverageUnderNoGrad, Clamped, FirstBatch, Momentum]


@pytest.mark.parametrize("hold", [None, *HOLDS])
@pytest.mark.parametrize("kind", WRITING)
def test_under_checkpoint_they_are_written_once(kind: type[nn.Module], hold: str | None) -> None:
    plain, model = row_of(kind), row_of(kind)
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)
    parts = list(model) if isinstance(model, nn.Sequential) else [model]

    def call(x: Tensor) -> Tensor:
        for part in parts:
            x = checkpoint(part, x, budget=budget)
        return x

    assert trained(model, call) == trained(plain, plain)
    assert budget is None or budget.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("share", ["60%", "100%"])
@pytest.mark.parametrize("kind", WRITING)
def test_in_a_fitted_model_they_are_written_once(kind: type[nn.Module], share: str, hold: str) -> None:
    plain, model = row_of(kind), row_of(kind)
    before = bits(model.state_dict().values())
    fitted = fit(model, batch(), share, hold=hold)
    assert bits(model.state_dict().values()) == before  # measuring has left no trace
    assert trained(model, model) == trained(plain, plain)
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_what_a_second_run_would_change_again_is_refused_by_name(way: str) -> None:
    model = row_of(Decayed)
    words = "parameter 'weight' of Linear is changed by the checkpointed work itself"
    if way == "fit":
        before = bits(model.parameters())
        with pytest.raises(StateModified, match=words):
            fit(model, batch(), "40%")
        assert bits(model.parameters()) == before
        return
    out = checkpoint(model, batch())
    after = bits(model.parameters())
    with pytest.raises(StateModified, match=words):
        out.sum().backward()
    assert bits(model.parameters()) == after
    assert all(parameter.grad is None for parameter in model.parameters())
