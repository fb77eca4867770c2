"""Chains of sizes that were never measured, beside the measured chains of those sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import Chain, Stage, fit
from gpuckpt.pytorch.profiling.other_sizes import Observed, predict, without_sizes
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.profiling.signature import describe_call


def observed(law: Callable[..., int], *sizes: int, name: str = "a", random: tuple[str, ...] = ()) -> Observed:
    """A model that saves what `law` says of its sizes."""
    chain = Chain((Stage(name, 1.0, 2.0, (0,)),), (law(*sizes),))
    return Observed(sizes, Measured(chain, (), (0,), random))


def told(measured: list[Observed], *sizes: int) -> int | None:
    """The predicted size of the one storage, if it is."""
    found = predict(measured, sizes)
    return None if found is None else found.chain.storages[0]


LAWS: dict[str, Callable[[int, int], int]] = {
    "constant": lambda batch, length: 4096,
    "batch": lambda batch, length: 12 * batch,
    "activation": lambda batch, length: 256 * batch * length,
    "scores": lambda batch, length: 16 * batch * length * length,
    "mask": lambda batch, length: length * length,
    "contrast": lambda batch, length: 4 * batch * batch,
    "empty": lambda batch, length: 0,
}


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_products_follow_from_as_many_sizes_as_vary(law: Callable[[int, int], int]) -> None:
    measured = [observed(law, 2, 64), observed(law, 2, 48)]
    assert told(measured, 2, 80) == law(2, 80)
    measured.append(observed(law, 3, 64))
    assert told(measured, 7, 33) == law(7, 33)


def test_one_size_tells_nothing_of_others() -> None:
    law = LAWS["activation"]
    assert told([observed(law, 2, 64)], 2, 48) is None
    assert told([observed(law, 2, 64), observed(law, 2, 48)], 3, 64) is None, "the batch never varied"


OTHER: dict[str, Callable[[int], int]] = {
    "padded to 32": lambda length: 4 * (-(-length // 32) * 32),
    "with a class token": lambda length: 128 * (length + 1),
    "a tail that does not grow": lambda length: 12 * length * length + 100,
}


@pytest.mark.parametrize("law", OTHER.values(), ids=list(OTHER))
def test_other_laws_need_three_sizes(law: Callable[[int], int]) -> None:
    measured = [observed(law, 20), observed(law, 50)]
    assert told(measured, 70) is None
    measured.append(observed(law, 100))
    assert told(measured, 70) == law(70)


def test_what_follows_no_law_is_not_guessed() -> None:
    law = {20: 100, 50: 130, 90: 131}.__getitem__
    assert told([observed(law, 20), observed(law, 50), observed(law, 90)], 70) is None


def test_a_third_size_corrects_what_two_suggested() -> None:
    law = OTHER["padded to 32"]
    assert told([observed(law, 32), observed(law, 64)], 40) == 160, "two sizes look like a product"
    measured = [observed(law, 32), observed(law, 64), observed(law, 40)]
    assert told(measured, 50) == law(50), "the third tells"


def test_models_that_do_something_else_are_not_predicted() -> None:
    law = OTHER["with a class token"]
    alike = [observed(law, 20), observed(law, 50), observed(law, 90)]
    assert told(alike, 70) is not None
    for other in (observed(law, 60, name="b"), observed(law, 60, random=("a",))):
        assert told([*alike, other], 70) is None


def test_a_size_of_one_and_strides_are_part_of_the_kind() -> None:
    def kind(*tensors: Tensor) -> tuple[object, tuple[int, ...]]:
        return without_sizes(describe_call(tensors, {}, numbers=False))

    like, sizes = kind(torch.ones(2, 8, 4), torch.ones(2))
    assert sizes == (2, 8, 4, 2)
    assert kind(torch.ones(3, 16, 4), torch.ones(3)) == (like, (3, 16, 4, 3))
    for others in (
        (torch.ones(1, 8, 4), torch.ones(1)),
        (torch.ones(2, 4, 8).mT, torch.ones(2)),
        (torch.ones(2, 8, 4).half(), torch.ones(2)),
        (torch.ones(2, 8, 4), torch.ones(2, requires_grad=True)),
        (torch.ones(2, 8, 4), torch.ones(())),
        (torch.ones(2, 8, 4),),
    ):
        assert kind(*others)[0] != like


class Attends(nn.Module):
    """Attention whose scores are saved, with a class token and dropout: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.token = nn.Parameter(torch.ones(width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x, self.token.expand(len(x), 1, -1)], dim=1)
        query, key, value = self.project(tokens).chunk(3, dim=-1)
        return x + (self.dropout((query @ key.mT).softmax(-1)) @ value)[:, :-1]


class Convolves(nn.Module):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "attention": (Attends, [(2, 16, 8), (2, 20, 8), (3, 20, 8), (4, 30, 8)], [(2, 24, 8), (3, 17, 8), (7, 40, 8)]),
    "convolution": (Convolves, [(2, 8, 8, 8), (3, 8, 12, 12), (4, 8, 10, 10)], [(2, 8, 14, 14), (5, 8, 16, 16)]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_predicted_chain_is_the_measured_one(name: str) -> None:
    """To the byte: storages, and which stage holds which."""
    make, measured, asked = FAMILIES[name]
    torch.manual_seed(0)
    model = nn.Sequential(*[make() for _ in range(3)])
    fitted = fit(model, torch.randn(measured[0]), "1GiB", repeats=1)
    for sizes in measured:
        fitted.plan_for(torch.randn(sizes))
    for sizes in asked:
        x = torch.randn(sizes)
        predicted = fitted.plan_for(x)
        assert predicted.predicted
        fresh = fit(model, x, "1GiB", repeats=1).latest
        assert not fresh.predicted
        assert predicted.chain.storages == fresh.chain.storages
        for ours, theirs in zip(predicted.chain.stages, fresh.chain.stages, strict=True):
            assert (ours.name, ours.saves, ours.inputs, ours.extras) == (
                theirs.name,
                theirs.saves,
                theirs.inputs,
                theirs.extras,
            )
        assert predicted.plan.certificate.peak_bytes == fresh.plan.certificate.peak_bytes
        fitted = fit(model, torch.randn(measured[0]), "1GiB", repeats=1)
        for again in measured:
            fitted.plan_for(torch.randn(again))


class Recurs(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


def test_what_runs_once_for_each_position_is_measured() -> None:
    """A recurrence saves other tensors, not larger ones, with a longer input."""
    model = nn.Sequential(*[Recurs() for _ in range(3)])
    fitted = fit(model, torch.randn(2, 8, 8), "1GiB", repeats=1)
    for length in (12, 16, 20):
        assert not fitted.plan_for(torch.randn(2, length, 8)).predicted
