"""Tensors inside of objects among a stage's arguments that it does not read: nobody keeps them, and nobody reads them unseen."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, Fitted, RecomputeMismatch, checkpoint, fit
from gpuckpt.pytorch.engine.unread import ReadWatch, stand_in
from tests.pytorch.steps import Layer, batch, gradients

WIDTH, COUNT = 16, 6


class Entries:
    """A cache with an entry for each layer."""

    def __init__(self) -> None:
        self.entries: list[Tensor] = []

    def add(self, entry: Tensor) -> None:
        self.entries.append(entry)


class Layered:
    """A cache of objects, as Hugging Face's are."""

    def __init__(self) -> None:
        self.layers: list[Entries] = []

    def add(self, entry: Tensor) -> None:
        self.layers.append(Entries())
        self.layers[-1].add(entry)

    @property
    def entries(self) -> list[Tensor]:
        return [layer.entries[0] for layer in self.layers]


class Windowed(Layered):
    """With a constant that every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((32, 1), 0.5)


class Named(UserDict):
    def add(self, entry: Tensor) -> None:
        self[f"layer {len(self)}"] = entry

    @property
    def entries(self) -> list[Tensor]:
        return list(self.values())


@dataclass
class Record:
    """What a model returns besides its output."""

    states: dict[int, Tensor] = field(default_factory=dict)

    def add(self, entry: Tensor) -> None:
        self.states[len(self.states)] = entry

    @property
    def entries(self) -> list[Tensor]:
        return list(self.states.values())


def nothing(x: Tensor, entries: list[Tensor]) -> Tensor:
    return x


def shapes(x: Tensor, entries: list[Tensor]) -> Tensor:
    return x * len(entries[0]) if entries else x


def values(x: Tensor, entries: list[Tensor]) -> Tensor:
    return x + entries[0].mean().tanh() if entries else x


def buffers(x: Tensor, entries: list[Tensor]) -> Tensor:
    """Below torch's functions: by its address."""
    return x * torch.from_dlpack(entries[0].detach()).mean() if entries else x


class Block(Layer):
    reads: Callable[[Tensor, list[Tensor]], Tensor] = staticmethod(nothing)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        x = self.reads(x, cache.entries)
        if isinstance(cache, Windowed):
            x = x * cache.scale
        cache.add(self.up(x))
        return super().forward(x)


class Model(nn.Module):
    """Blocks that leave an entry each in a cache; or in one each, so that nobody can keep another one's."""

    def __init__(self, cache: Callable[[], Any], shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(COUNT))
        self.cache, self.shared = cache, shared

    def forward(self, x: Tensor) -> Tensor:
        cache = self.cache()
        for block in self.blocks:
            x = block(x, cache if self.shared else self.cache())
        return x.square().mean()


def smallest(model: nn.Module, x: Tensor, **options: Any) -> int:
    return fit(copy.deepcopy(model), x, 1 << 40, **options).plan.certificate.smallest_budget_bytes


def check(fitted: Fitted, plain: nn.Module, x: Tensor) -> None:
    for seed in range(3):
        assert gradients(fitted.model, lambda: fitted(x), seed) == gradients(plain, lambda: plain(x), seed)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
        assert fitted.budget.used_bytes == 0
    assert not fitted.deviations


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("cache", [Entries, Layered, Windowed, Named, Record])
def test_entries_that_no_block_reads_are_not_kept(cache: Callable[[], Any], hold: str) -> None:
    model, x = Model(cache), batch(32)
    least_bytes = smallest(model, x, hold=hold)
    assert (
        least_bytes == smallest(Model(cache, shared=False), x, hold=hold) or cache is Windowed
    )  # a constant for each there
    for budget_bytes in (least_bytes, 3 * least_bytes):
        fitted = fit(copy.deepcopy(model), x, budget_bytes, hold=hold)
        assert fitted.plan.certificate.recompute_s > 0
        assert fitted.latest.measured.unread == {Block}
        check(fitted, model, x)
    check(fit(copy.deepcopy(model), x, least_bytes, hold=hold, host_budget="1MiB"), model, x)


@pytest.mark.parametrize("reads", [shapes, values, buffers])
def test_entries_of_which_anything_is_read_are_kept(
    reads: Callable[[Tensor, list[Tensor]], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "reads", staticmethod(reads))
    model, x = Model(Layered), batch(32)
    check(fit(copy.deepcopy(model), x, smallest(model, x)), model, x)


@pytest.mark.parametrize("cache", [Entries, Layered, Named, Record])
def test_an_entry_that_nothing_depends_on_keeps_no_bytes(cache: Callable[[], Any]) -> None:
    """Its graph leads to the frame, which was given the cache: neither may keep the other."""
    budget, x = CheckpointBudget("1MiB", device="cpu"), batch(32).requires_grad_()
    blocks = Model(cache).blocks
    with budget:
        found, h = cache(), x
        for block in blocks:
            h = checkpoint(block, h, found)
        h.sum().backward()
    assert budget.used_bytes > 0
    del found, h
    assert budget.used_bytes == 0


@pytest.mark.parametrize("way", ["a block", "a part"])
def test_entries_are_kept_for_compiled_blocks(way: str) -> None:
    model, x = Model(Layered), batch(32)
    for block in model.blocks:
        (block if way == "a block" else block.up).compile(backend="eager")
    fitted = fit(model, x, "56KiB")
    assert not fitted.latest.measured.unread
    fitted(x).backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_an_entry_that_is_read_later_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(Layered), batch(32)
    fitted = fit(model, x, smallest(model, x))
    for reads in (shapes, values):
        monkeypatch.setattr(Block, "reads", staticmethod(reads))
        with pytest.raises(
            RecomputeMismatch, match=r"entry of a cache\) which its class did not read .* use_cache=False"
        ):
            fitted(x).backward()
    monkeypatch.setattr(Block, "reads", staticmethod(nothing))
    check(fitted, copy.deepcopy(model), x)


@pytest.mark.parametrize(
    "work",
    [
        lambda t: t.shape,
        lambda t: t + 1,
        lambda t: t[0],
        lambda t: torch.cat([torch.ones(1), t]),
        lambda t: t.add_(1),
        lambda t: t.requires_grad,
        lambda t: t.numpy(),
        lambda t: torch.nn.functional.linear(torch.ones(1, t.numel()), t[None]),
    ],
)
def test_what_counts_as_reading(work: Callable[[Tensor], Any]) -> None:
    tensor, other = torch.ones(3), torch.ones(3)
    with ReadWatch([tensor]) as watch:
        work(other)
    assert not watch.read
    with ReadWatch([tensor]) as watch:
        work(tensor)
    assert watch.read
    with pytest.raises(RecomputeMismatch, match="entry of a cache"):
        work(stand_in())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripted_code_reads_as_well() -> None:
    twice = torch.jit.script(_twice)
    tensor = torch.ones(3)
    with ReadWatch([tensor]) as watch:
        twice(tensor)
    assert watch.read


def _twice(x: Tensor) -> Tensor:
    return x * 2
