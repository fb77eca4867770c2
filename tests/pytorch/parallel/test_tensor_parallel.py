"""Tensor parallelism by DTensor: bytes of this rank's part, and bit for bit the gradients of the same split model run plainly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gpuckpt
from gpuckpt import fit
from tests.pytorch.parallel.models import ROWS, WIDTH, Tower, batch, budget_between, same, tower, train
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks


def width(model: Tower, mesh: Any) -> Tower:
    """Megatron's split: the hidden width of every block over the ranks; plain tensors in between."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def sequence(model: Tower, mesh: Any) -> Tower:
    """Between the split widths the rows are split: blocks are given DTensors, and return them."""
    inputs = PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True)
    first = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False)
    parallelize_module(model, mesh, {"stem": first, "head": inputs})
    for block in model.blocks:
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        }
        parallelize_module(block, mesh, plan)
    return model


def width_and_shards(model: Tower, mesh: Any) -> Tower:
    """A mesh of two dimensions: widths over one, FSDP2 over the other."""
    width(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def every_order(rank: int, split: Callable[[Tower, Any], Tower], ranks: int) -> str:
    if ranks == 4:
        mesh, x = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), batch(rank // 2)
    else:
        mesh, x = init_device_mesh("cpu", (2,)), batch(0)
    plain = train(split(tower(), mesh), x)
    cap = budget_between(tower, x, 0.1)
    for order in ("before", "after"):
        model = tower()
        if order == "after":
            split(model, mesh)
        fitted = fit(model, x, cap if rank else 3 * cap)  # the smallest decides, through both dimensions of a mesh
        if order == "before":
            split(model, mesh)
        assert same(train(model, x), plain), order
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= cap
        assert fitted.plan.certificate.recompute_s > 0
        assert fitted.budget.used_bytes == 0
        assert not fitted.deviations
    return repr(fitted.plan.tree)


@pytest.mark.parametrize("split", [width, sequence])
def test_gradients_and_bytes(split: Callable[[Tower, Any], Tower]) -> None:
    first, second = on_ranks(every_order, split, 2)
    assert first == second


@pytest.mark.slow
def test_with_fsdp2_on_four_ranks() -> None:
    assert len(set(on_ranks(every_order, width_and_shards, 4, ranks=4, limit_s=120))) == 1


def local_bytes(rank: int) -> None:
    """What a budget holds of a checkpointed DTensor, and of what its recompute saves, is this rank's half."""
    mesh = init_device_mesh("cpu", (2,))
    block = width(tower(blocks=1), mesh).blocks[0]
    x = batch(0)
    charged = {}
    for name, given in (("plain", x), ("split", DTensor.from_local(x[: ROWS // 2].clone(), mesh, [Shard(0)]))):
        budget = gpuckpt.CheckpointBudget("1MiB")
        out = gpuckpt.checkpoint(torch.sin, given.requires_grad_() * 2, budget=budget)
        charged[name] = budget.used_bytes
        out.sum().backward()
        assert budget.used_bytes == 0
    assert charged == {"plain": 4 * ROWS * WIDTH, "split": 4 * ROWS * WIDTH // 2}

    budget = gpuckpt.CheckpointBudget("1MiB")
    with budget:
        out = block(batch(0))
    # x for the norm (and its two statistics), what the norm returns, and half of the hidden width before and after gelu
    assert budget.used_bytes == 4 * ROWS * (WIDTH + 2 + WIDTH + 32 + 32)
    del out


def test_bytes_are_local() -> None:
    on_ranks(local_bytes)


def checkpointed(rank: int, split: Callable[[Tower, Any], Tower]) -> None:
    mesh, x = init_device_mesh("cpu", (2,)), batch(0)
    plain = train(split(tower(), mesh), x)
    model, budget = split(tower(), mesh), gpuckpt.CheckpointBudget("1MiB")

    class Checkpointed(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return gpuckpt.checkpoint(self.block, x, budget=budget, verify="metadata")

    model.blocks = torch.nn.ModuleList(map(Checkpointed, model.blocks))
    assert same(train(model, x), plain)
    assert budget.used_bytes == 0 < budget.peak_bytes


@pytest.mark.parametrize("split", [width, sequence])
def test_under_checkpoint(split: Callable[[Tower, Any], Tower]) -> None:
    on_ranks(checkpointed, split)
