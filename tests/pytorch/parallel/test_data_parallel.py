"""DistributedDataParallel around, inside of and after `fit`: gradients of the same wrapped model run plainly, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpuckpt
from gpuckpt import fit
from tests.pytorch.parallel.models import WIDTH, Block, batch, budget_between, same, tower, train
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks

WAYS = {
    "plain": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}


def every_order(rank: int, way: str) -> None:
    options = WAYS[way]
    unused = way in ("unused", "static")
    x = batch(rank)
    plain = train(DistributedDataParallel(tower(unused=unused), **options), x)
    cap = budget_between(lambda: tower(unused=unused), x)
    for order in ("outside", "before", "inside"):
        model = tower(unused=unused)
        if order == "before":
            fitted = fit(model, x, cap)
            wrapped = DistributedDataParallel(fitted.model, **options)
        else:
            wrapped = DistributedDataParallel(model, **options)
            fitted = fit(wrapped if order == "outside" else model, x, cap)
        assert same(train(wrapped, x), plain), order
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes, order
        assert fitted.plan.certificate.recompute_s > 0, order
        assert fitted.budget.used_bytes == 0, order
        assert not fitted.deviations, order


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_bytes(way: str) -> None:
    on_ranks(every_order, way)


def lengths_of_their_own(rank: int, way: str) -> None:
    """One rank alone meets new lengths and plans them: its forwards talk to the others exactly as often as plain ones."""
    batches = [batch(rank, 16), batch(rank, 16 + 8 * rank), batch(rank, 16), batch(rank, 16 + 12 * rank)]
    plain = train(DistributedDataParallel(tower(), **WAYS[way]), *batches, steps=4)
    cap = budget_between(tower, batch(rank, 28))
    wrapped = DistributedDataParallel(tower(), **WAYS[way])
    fitted = fit(wrapped, batches[0], cap)
    assert same(train(wrapped, *batches, steps=4), plain)
    assert not fitted.deviations
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("way", ["plain", "static"])
def test_a_rank_plans_new_lengths_alone(way: str) -> None:
    on_ranks(lengths_of_their_own, way)


def buffers(rank: int) -> None:
    """Buffers are sent from rank 0 in every forward: those that observing runs would be one too many."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 1))
    twin, x = copy.deepcopy(model), batch(rank)
    plain, ours = DistributedDataParallel(twin), DistributedDataParallel(model)
    if rank == 0:  # alone: nothing of it may wait for the other rank
        gpuckpt.measure(ours, x)
    fitted = fit(ours, x, budget_between(lambda: copy.deepcopy(model), x, 0.5))
    for _ in range(2):
        for wrapped in (plain, ours):
            wrapped.zero_grad()
            wrapped(x).square().mean().backward()
    assert same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
    assert same(list(ours.buffers()), list(plain.buffers()))
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_buffers_are_sent_as_often_as_plainly() -> None:
    on_ranks(buffers)


def wrapped_parts(rank: int, unused: bool) -> None:
    """Two wrapped halves that are checkpointed, or stages of a chain: the recompute runs them without their reducers."""

    def halves(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        parts = [nn.Sequential(Block(), Block()) for _ in range(2)]
        return nn.Sequential(*(DistributedDataParallel(part, find_unused_parameters=unused) for part in parts))

    x = batch(rank).requires_grad_()
    plain = halves()
    plain(x).square().mean().backward()
    given = x.grad.clone()

    model, x.grad = halves(), None
    budget = gpuckpt.CheckpointBudget("1MiB")
    gpuckpt.checkpoint(
        model[1], gpuckpt.checkpoint(model[0], x, budget=budget), budget=budget
    ).square().mean().backward()
    assert same([x.grad, *(p.grad for p in model.parameters())], [given, *(p.grad for p in plain.parameters())])

    model, x.grad = halves(), None
    fitted = fit(model, x, "1MiB", strategy="every")
    model(x).square().mean().backward()
    assert same([x.grad, *(p.grad for p in model.parameters())], [given, *(p.grad for p in plain.parameters())])
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


@pytest.mark.parametrize("unused", [False, True])
def test_wrapped_parts_of_a_model(unused: bool) -> None:
    on_ranks(wrapped_parts, unused)


def accumulation(rank: int) -> None:
    x, cap = batch(rank), None
    found = []
    for ours in (False, True):
        wrapped = DistributedDataParallel(tower())
        if ours:
            cap = budget_between(tower, x)
            fit(wrapped, x, cap)
        with wrapped.no_sync():
            wrapped(x).backward()
        wrapped(2 * x).backward()
        found.append([p.grad for p in wrapped.parameters()])
    assert same(*found)


def test_gradients_are_accumulated_under_no_sync() -> None:
    on_ranks(accumulation)


class Attributes(nn.Module):
    """Blocks by attribute, two deep, as in a model that its author wrapped once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.body.first, self.body.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body.second(self.body.first(x)).square().mean()


def attributes(rank: int) -> None:
    x = batch(rank)
    plain = train(DistributedDataParallel(Attributes()), x)
    wrapped = DistributedDataParallel(Attributes())
    fitted = fit(wrapped, x, "1MiB", strategy="every")
    assert [stage.name for stage in fitted.chain.stages][1:3] == ["module.body.first", "module.body.second"]
    assert same(train(wrapped, x), plain)


def test_the_wrapper_is_no_level_of_its_own() -> None:
    on_ranks(attributes)
