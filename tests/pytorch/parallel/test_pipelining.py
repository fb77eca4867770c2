"""Stages of `torch.distributed.pipelining`: each under a budget of its own, with several micro-batches in flight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from gpuckpt import fit
from gpuckpt.planning.pipeline import in_flight
from tests.pytorch.parallel.models import WIDTH, Block, local, same
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
BATCHES, ROWS, BLOCKS = 6, 4, 3


class Part(nn.Module):
    """One stage's share of the blocks."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.blocks = nn.ModuleList(Block(hidden=48 if i % 2 else 64) for i in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean()


def a_step(part: nn.Module, schedule: str, number: int, stages: int, group: Any = None) -> list[torch.Tensor]:
    """Losses of the micro-batches (on the last stage), and gradients."""
    x = torch.randn(BATCHES * ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    stage = PipelineStage(part, number, stages, torch.device("cpu"), group=group)
    run = SCHEDULES[schedule](stage, BATCHES, loss_fn=loss_of)
    losses: list[torch.Tensor] = []
    for _ in range(2):
        part.zero_grad()
        given = {"target": torch.zeros_like(x), "losses": losses} if number == stages - 1 else {}
        run.step(*([x] if number == 0 else []), **given)
    return [*losses, *(local(parameter.grad) for parameter in part.parameters())]


def example(number: int) -> torch.Tensor:
    x = torch.ones(ROWS, WIDTH)
    return x.requires_grad_() if number else x  # what comes from the stage before goes back to it


def budget_of_one(number: int) -> int:
    certificate = fit(Part(number), example(number), "1MiB").plan.certificate
    least = certificate.smallest_budget_bytes
    return least + (certificate.peak_bytes - least) // 3


def piped(rank: int, schedule: str, stages: int) -> None:
    plain = a_step(Part(rank), schedule, rank, stages)
    live = in_flight(schedule, stages, rank, BATCHES)
    part = Part(rank)
    fitted = fit(part, example(rank), live * budget_of_one(rank), live=live)
    assert fitted.plan.certificate.recompute_s > 0
    assert same(a_step(part, schedule, rank, stages), plain)
    # Micro-batches are slices of one batch, which is charged once; the promise counts the first and the latest.
    shared_bytes = 4 * ROWS * WIDTH if rank == 0 and live > 1 else 0
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes - shared_bytes <= fitted.budget.max_bytes
    assert fitted.budget.used_bytes == 0
    assert not fitted.deviations


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_has_its_own_budget(schedule: str, stages: int) -> None:
    on_ranks(piped, schedule, stages, ranks=stages)


def sharded(rank: int) -> None:
    """Two stages, each on two ranks by FSDP2: the ranks of a stage plan together, and those of the other do not wait for them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    number = mesh["pp"].get_local_rank()

    def build() -> Part:
        part = Part(number)
        for block in part.blocks:
            fully_shard(block, mesh=mesh["dp"])
        return fully_shard(part, mesh=mesh["dp"])

    group = mesh["pp"].get_group()
    plain = a_step(build(), "1f1b", number, 2, group)
    live = in_flight("1f1b", 2, number, BATCHES)
    cap = live * budget_of_one(number)
    for order in ("before", "after"):
        part = build() if order == "after" else Part(number)
        fitted = fit(part, example(number), cap if rank % 2 else 2 * cap, live=live)
        if order == "before":
            for block in part.blocks:
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(part, mesh=mesh["dp"])
        assert same(a_step(part, "1f1b", number, 2, group), plain), order
        assert fitted.plan.certificate.recompute_s > 0
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes <= cap
        assert not fitted.deviations


@pytest.mark.slow
def test_stages_that_are_sharded() -> None:
    on_ranks(sharded, ranks=4, limit_s=120)
