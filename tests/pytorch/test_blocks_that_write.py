"""Blocks that write their buffers can be recomputed: each is updated once, and what it takes is promised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gpuckpt
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import Layer, Tally

WIDTH = 16


class Counter(Layer):
    """Counts tokens, as blocks with experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.tokens += x.shape[0]
        return x + self.down(torch.tanh(self.up(x))) * self.tokens[0].detach().sigmoid()


class MovingAverage(Counter):
    """Replaces its buffer rather than writing into it."""

    def forward(self, x: Tensor) -> Tensor:
        self.tokens = 0.9 * self.tokens + 0.1 * x.detach().mean()
        return x + self.down(torch.tanh(self.up(x))) * self.tokens[0]


class BatchNormed(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), norm(4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class OwnStatistics(nn.BatchNorm1d):
    """A norm with a forward of its own, to which momentum means nothing."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), 0.25)
            self.num_batches_tracked += 1
        return (x - self.running_mean) * self.weight + self.bias


def own_statistics() -> nn.Module:
    return BatchNormed(OwnStatistics)


def power_iteration() -> nn.Module:
    block = BatchNormed(nn.LayerNorm)
    parametrizations.spectral_norm(block.layers[0])
    return block


class InstanceNormed(Counter):
    """Its kernel saves the running statistics, though backward does not read them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x.view(-1, 4, WIDTH)).view_as(x))))


BLOCKS = {
    "InstanceNorm": InstanceNormed,
    "counter": Counter,
    "moving average": MovingAverage,
    "BatchNorm": BatchNormed,
    "own statistics": own_statistics,
    "power iteration": power_iteration,
}


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("name", BLOCKS)
def test_written_once_and_promised(name: str, hold: str, share: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[BLOCKS[name]() for _ in range(6)])
    # A stage outside of frames may refer to versions of its buffers, which "pool" copies.
    beside_plain(model, torch.randn(8, WIDTH), share=share, fit_options={"hold": hold})


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_recomputed_where_bytes_ask_for_it(name: str) -> None:
    torch.manual_seed(0)
    fitted = gpuckpt.fit(nn.Sequential(*[BLOCKS[name]() for _ in range(6)]), torch.randn(8, WIDTH), "16MiB")
    certificate = fitted.plan.certificate
    assert certificate.smallest_budget_bytes < 0.5 * certificate.peak_bytes


def test_under_checkpoint_copies_of_written_buffers_are_charged() -> None:
    block, x = Counter(), torch.randn(8, WIDTH)
    budget = gpuckpt.CheckpointBudget("1MiB", device="cpu")
    for _ in range(3):  # which buffers are written is learned in two forwards
        out = gpuckpt.checkpoint(block, x, budget=budget)
        held = budget.used_bytes
        out.sum().backward()
        assert budget.used_bytes == 0
    assert held == x.nbytes + block.tokens.nbytes
    assert block.tokens.tolist() == [24.0] * 4


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_recomputed_is_bitwise_the_same(name: str) -> None:
    torch.manual_seed(0)
    block, x = BLOCKS[name](), torch.randn(8, WIDTH, requires_grad=True)
    for _ in range(3):
        gpuckpt.checkpoint(block, x, verify="bitwise").sum().backward()


NORMED = {
    "1d": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "averaged": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH, momentum=None), nn.Linear(WIDTH, WIDTH)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Tanh()), nn.BatchNorm1d(WIDTH)),
    "without weights": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, WIDTH)),
    "evaluated": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH).eval()),
}


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
@pytest.mark.parametrize("strategy", ["optimal", "sqrt"])
def test_statistics_that_no_backward_reads_are_not_compared(make, strategy: str) -> None:
    """batch_norm saves its running statistics and updates them in the same kernel: a recompute saves the updated ones."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*[make() for _ in range(4)]), torch.randn(8, WIDTH)
    plain = copy.deepcopy(model)
    gpuckpt.fit(model, x, "1MiB" if strategy == "sqrt" else _smallest(plain, x), strategy=strategy, verify="bitwise")
    for _ in range(2):
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def _smallest(model: nn.Module, x: torch.Tensor) -> int:
    return gpuckpt.fit(copy.deepcopy(model), x, "16MiB").plan.certificate.smallest_budget_bytes


def test_beside_statistics_contents_are_compared_as_ever() -> None:
    norm, tally = nn.BatchNorm1d(WIDTH), Tally()

    def changing(x: Tensor) -> Tensor:
        tally.count += 1
        return norm(x * tally.count).sin()

    out = gpuckpt.checkpoint(changing, torch.randn(8, WIDTH), verify="bitwise")
    with pytest.raises(gpuckpt.RecomputeMismatch, match="contents differ"):
        out.sum().backward()
