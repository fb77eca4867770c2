"""Ranges that write into buffers: running statistics and counters are bit for bit those of the plain run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from gpuckpt import CheckpointBudget
from gpuckpt.pytorch.graph import checkpoint_graph
from gpuckpt.segments import GraphCheckpointConfig, GraphSegment


class Counting(nn.Module):
    """Running statistics as modules (one of them cumulative) and as a function, and a counter that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm, self.mean_of_all = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = nn.functional.batch_norm(self.second(x), self.mean, self.var, training=True)
        x = self.mean_of_all(x).sin()
        return x * torch.add(self.count, x.new_ones(()), out=self.count)


class CountingInPlace(Counting):
    """For torch.export, which knows in-place operators and no `out=`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).tanh()
        x = nn.functional.batch_norm(self.second(x), self.mean, self.var, training=True)
        return x.sin() * self.count.add_(1)


def exported(model: nn.Module) -> GraphModule:
    return torch.export.export(model, (torch.ones(5, 4),)).module()


TRACERS: dict[str, tuple[type[Counting], Callable[[nn.Module], GraphModule]]] = {
    "symbolic_trace": (Counting, symbolic_trace),
    "export": (CountingInPlace, exported),
}


def steps(model: nn.Module, times: int = 3) -> dict[str, torch.Tensor]:
    """Some training steps; all parameters, buffers and gradients afterwards."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **grads}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_statistics_are_those_of_the_plain_run(tracer: str, pieces: int) -> None:
    make, trace = TRACERS[tracer]
    torch.manual_seed(0)
    model = make()
    plain = trace(copy.deepcopy(model))
    ours = trace(copy.deepcopy(model))
    last = len(ours.graph.nodes) - 1
    bounds = [last * k // pieces for k in range(pieces + 1)]
    segments = [GraphSegment(a, b - 1) for a, b in itertools.pairwise(bounds)]
    with CheckpointBudget("1MiB", device="cpu") as budget:
        found = steps(checkpoint_graph(ours, GraphCheckpointConfig(segments)))
    assert budget.used_bytes == 0
    expected = steps(plain)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert expected["norm.num_batches_tracked"] == 3


def test_a_range_that_is_run_again_twice_starts_from_the_same_buffers() -> None:
    """retain_graph makes a second backward recompute once more; the counter enters the gradient."""
    torch.manual_seed(0)
    model = Counting()
    plain, ours = symbolic_trace(copy.deepcopy(model)), symbolic_trace(copy.deepcopy(model))
    module = checkpoint_graph(ours, GraphCheckpointConfig([GraphSegment(0, len(ours.graph.nodes) - 1)]))
    x = torch.randn(5, 4)
    for m in (plain, module):
        y = m(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
    for (name, p), q in zip(plain.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(plain.named_buffers(), module.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_without_gradients_and_in_evaluation_nothing_is_copied_or_written() -> None:
    traced = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    module = checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(1, 2)]))
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():
        module(torch.randn(3, 4))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
