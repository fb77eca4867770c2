"""What is measured as saved is what a budget holds: not what dies on the way, and not what it never charges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.pytorch.beside_plain import beside_plain

WIDTH = 16


class Block(nn.Module):
    def __init__(self, between=None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        if self.between is not None:
            self.between(x)
        for extra in more:
            x = x * extra.sigmoid()
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, in_blocks=None, between=None, at_the_end=None, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(in_blocks) for _ in range(blocks))
        self.between, self.at_the_end = between, at_the_end

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.between is not None:
                self.between(x)
        if self.at_the_end is not None:
            self.at_the_end(x)
        return x.square().mean()


def rows() -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))


def ranked(x: Tensor) -> None:
    """A router's choice: the scores are differentiable, and only the indices are used."""
    x.exp().topk(4).indices.sum()


def logged(x: Tensor) -> None:
    x.sigmoid().square().mean().item()


def dropped_in_steps(x: Tensor) -> None:
    a = x.tanh()
    b = a.exp()
    del a
    b.sin()


@pytest.mark.parametrize("where", ["in_blocks", "between", "at_the_end"])
@pytest.mark.parametrize("drop", [ranked, logged, dropped_in_steps])
@pytest.mark.parametrize("share", [None, 0.6])
def test_branches_whose_result_is_dropped(drop, where: str, share: float | None) -> None:
    # Between blocks nothing else is saved: what the branch holds on its way is promised for longer than it is there.
    beside_plain(Model(**{where: drop}), rows(), share=share, exact=where != "between")


def much(x: Tensor) -> None:
    """More on the way than is held in the end."""
    wide = x.repeat(1, 40)
    wide.exp().sin().cos()


@pytest.mark.parametrize("share", [None, 0.8, 1.0])
def test_a_dropped_branch_at_the_end_that_is_the_peak(share: float | None) -> None:
    beside_plain(Model(at_the_end=much), rows(), share=share)


@pytest.mark.parametrize("where", ["in_blocks", "between"])
@pytest.mark.parametrize("budget", [260_000, 400_000])
def test_a_dropped_branch_that_holds_most_is_never_promised_too_little(where: str, budget: int) -> None:
    beside_plain(Model(**{where: much}), rows(), budget=budget, exact=False)


class LeavesOfItsOwn(nn.Module):
    """Makes of its input, or of nothing, a leaf that is differentiated: autograd saves it, and it is nobody's activation."""

    def __init__(self, make, to_all: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.make, self.to_all = make, to_all

    def forward(self, x: Tensor) -> Tensor:
        leaf = self.make(x)
        assert leaf.is_leaf
        assert leaf.requires_grad
        x = leaf if not self.to_all else x + 1
        for block in self.blocks:
            x = block(x, leaf) if self.to_all else block(x)
        return x.square().mean()


def _view_of_the_input(x: Tensor) -> Tensor:
    return x[:, None].squeeze(1).requires_grad_()


def _copy_of_the_input(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _of_nothing(x: Tensor) -> Tensor:
    return torch.ones(x.shape, requires_grad=True)


@pytest.mark.parametrize("make", [_view_of_the_input, _copy_of_the_input, _of_nothing])
@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("share", [None, 0.6])
def test_leaves_that_a_forward_makes(make, to_all: bool, share: float | None) -> None:
    beside_plain(LeavesOfItsOwn(make, to_all), rows(), share=share)


class Recurrent(nn.Module):
    """A recurrence over sequences of several lengths: its kernels write into what they have saved, without a new version."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.out = kind(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        found, _ = nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True, total_length=x.shape[1])
        return x + self.out(found)


class Recurrences(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Recurrent(kind) for _ in range(4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, lengths)
        return x.square().mean()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_packed_sequences(kind: type[nn.RNNBase], hold: str, budget: int | None) -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 6, WIDTH), torch.tensor([6, 4, 2])
    options = {"hold": hold}
    assert not beside_plain(Recurrences(kind), x, lengths, share=None, budget=budget, fit_options=options).deviations
