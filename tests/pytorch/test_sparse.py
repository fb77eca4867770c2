"""Sparse gradients and sparse tensors that are saved: fitted, checkpointed, measured and charged by their parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gpuckpt

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # said once in a process

WIDTH, NODES = 16, 24


class Embeds(nn.Module):
    """A table whose gradient is sparse, in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(10, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x + self.table(torch.arange(x.shape[0]) % 10)))


class Graph(nn.Module):
    """A layer of a graph network: the adjacency matrix is saved by the product."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.linear, self.layout = nn.Linear(WIDTH, WIDTH), layout

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        adjacency = torch.sparse_coo_tensor(edges, weights, (NODES, NODES)).coalesce()
        if self.layout is torch.sparse_csr:
            adjacency = adjacency.to_sparse_csr()
        return torch.tanh(self.linear(adjacency @ x))


class GraphNetwork(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Graph(layout) for _ in range(5))
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("edges", torch.randint(0, NODES, (2, 60), generator=generator))
        self.register_buffer("weights", torch.rand(60, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.edges, self.weights)
        return x


MODELS = {
    "embeddings": lambda: nn.Sequential(*[Embeds() for _ in range(6)]),
    "coo": lambda: GraphNetwork(torch.sparse_coo),
    "csr": lambda: GraphNetwork(torch.sparse_csr),
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.coalesce().to_dense() if p.grad.is_sparse else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [None, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_fitted(name: str, share: float | None, hold: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(NODES, WIDTH)
    plain = copy.deepcopy(model)
    probe = gpuckpt.fit(model, x, "16MiB", hold=hold)
    certificate = probe.plan.certificate
    probe.unfit()
    budget = certificate.smallest_budget_bytes if share is None else int(share * certificate.peak_bytes)
    assert certificate.smallest_budget_bytes <= 0.7 * certificate.peak_bytes
    # A sparse gradient keeps the indices that were saved, and under "pool" the block that they lie in, until it is dropped.
    kept_bytes = 6 * NODES * 8 if (name, hold) == ("embeddings", "pool") else 0
    fitted = gpuckpt.fit(model, x, budget + kept_bytes, hold=hold, strict=not kept_bytes)
    for _ in range(2):
        for got, expected in zip(gradients(model, x), gradients(plain, x), strict=True):
            assert torch.equal(got, expected)
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes + kept_bytes
        assert kept_bytes or fitted.measured_peak_bytes == fitted.promised_peak_bytes <= budget
        assert fitted.budget.used_bytes == kept_bytes
        model.zero_grad()
        assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(NODES, WIDTH)
    expected = gradients(model, x)
    model.zero_grad()
    with gpuckpt.CheckpointBudget("1MiB", device="cpu") as budget:
        loss = gpuckpt.checkpoint(model, x).square().sum()
    loss.backward()
    got = [p.grad.coalesce().to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
    assert all(map(torch.equal, got, expected))
    assert budget.used_bytes == 0
