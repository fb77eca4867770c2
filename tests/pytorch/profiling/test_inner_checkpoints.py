"""Fitted models that make checkpoints of their own: what those recompute is part of the promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, InvalidChain, checkpoint, fit, measure
from gpuckpt.nn import GatedMLP
from tests.pytorch.beside_plain import beside_plain

WIDTH = 16


def rows(count: int = 32) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


class Deep(nn.Module):
    """A part that saves much: (B, D) -> (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.dropout(self.linear(x).sin().sigmoid().tanh())
        return x


Call = Callable[..., Tensor]


def plainly(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x)


def twice(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, checkpoint(part, x))


def nested(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: part(x) + checkpoint(part, x.sin()), x)


def verified(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x, verify="bitwise")


CALLS: dict[str, Call] = {"plainly": plainly, "twice": twice, "nested": nested, "verified": verified}


class Block(nn.Module):
    """Checkpoints a part by hand, between others."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.up, self.part, self.down = nn.Linear(WIDTH, WIDTH), Deep(), nn.Linear(WIDTH, WIDTH)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x + self.down(self.call(self.part, self.up(x).relu()).sigmoid()))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [None, 3.0, 8.0])
def test_in_blocks(name: str, hold: str, share: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(CALLS[name]) for _ in range(5)])
    fitted = beside_plain(model, rows(), share=share, fit_options={"hold": hold})
    assert not fitted.deviations
    assert any(stage.again_bytes for stage in fitted.chain.stages)


def test_in_some_blocks_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(plainly) if n % 2 else nn.Sequential(Deep()) for n in range(6)])
    for share in (None, 0.9, 1.5):
        assert not beside_plain(model, rows(), share=share).deviations


class Outside(nn.Module):
    """Checkpoints code that lies before, between or after its blocks."""

    def __init__(self, *where: str, call: Call = plainly, skips: bool = False) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(WIDTH, WIDTH), Deep()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.where, self.call, self.skips = where, call, skips

    def at(self, place: str, x: Tensor) -> Tensor:
        return self.call(self.part, x) if place in self.where else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("before", self.first(x))
        skip = x
        for block in self.blocks:
            x = self.at("between", block(x))
        return self.at("after", x * skip if self.skips else x)


@pytest.mark.parametrize("where", ["before", "between", "after", "all"])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("share", [None, 4.0, 8.0])
def test_outside_of_the_blocks(where: str, skips: bool, share: float | None) -> None:
    torch.manual_seed(0)
    model = Outside(*(("before", "between", "after") if where == "all" else (where,)), skips=skips)
    # What is reached by a skip as well is promised for both ways.
    fitted = beside_plain(model, rows(), share=share, exact=not skips)
    assert not fitted.deviations


def test_blocks_that_are_all_checkpointed_by_hand_are_refused() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Deep() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x)
            return x

    with pytest.raises(InvalidChain, match=r"runs Deep and .* inside gpuckpt.checkpoint.* call them without it"):
        fit(ByHand(), rows(), "1MiB")


class Loose(nn.Module):
    """Has much code that is no module's between its blocks."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.by_hand = by_hand

    def between(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x.sin().sigmoid().tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = checkpoint(self.between, x) if self.by_hand else self.between(x)
        return x


def test_loose_code_takes_less_when_it_is_checkpointed_by_hand() -> None:
    least = [fit(Loose(by_hand), rows(), "1GiB").plan.certificate.smallest_budget_bytes for by_hand in (False, True)]
    assert least[1] < 0.4 * least[0]
    assert not beside_plain(Loose(True), rows(), share=None).deviations


class Multiplies(nn.Module):
    """Lets go of its input first in backward, which the block before still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Deep()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x.sigmoid()).tanh() * x.cos() * x


@pytest.mark.parametrize("share", [None, 2.0, 8.0])
def test_what_the_block_before_holds_stays(share: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Multiplies() for _ in range(4)])
    # Nobody else holds the input of the first.
    assert not beside_plain(model, rows(), share=share, exact=False).deviations


def test_a_budget_of_its_own_is_charged_there() -> None:
    other = CheckpointBudget("1GiB", device="cpu")

    def aside(part: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(part, x, budget=other)

    torch.manual_seed(0)
    model = nn.Sequential(*[Block(aside) for _ in range(4)])
    chain = measure(model, rows())
    assert not any(stage.again_bytes for stage in chain.stages)
    beside_plain(model, rows(), share=4.0)
    assert other.peak_bytes > 0
    assert other.used_bytes == 0


def test_new_sizes_are_predicted_with_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(nested) for _ in range(4)])
    fitted = fit(model, rows(32), "1GiB", repeats=1)
    fitted.plan_for(rows(24))
    model(rows(40)).sum().backward()
    assert fitted.latest.predicted
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_what_makes_none_is_not_run_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("gpuckpt.pytorch.profiling.stage_timing._again_bytes", lambda *args: seen.append(args) or 0)
    chain = measure(nn.Sequential(*[nn.Sequential(Deep(), GatedMLP(WIDTH, 32)) for _ in range(3)]), rows())
    assert not seen
    assert not any(stage.again_bytes for stage in chain.stages)
