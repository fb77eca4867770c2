"""Ranks that decide together: one plan where collectives meet inside of the model, and one refusal for all."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from gpuckpt import fit
from gpuckpt.errors import BudgetExceeded, CheckpointError, InvalidChain
from gpuckpt.planning import Chain, Stage, plan_chain, simulate
from gpuckpt.pytorch.parallel.agree import _plan_for_all
from tests.pytorch.parallel.models import batch, budget_between, same, tower, train
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks


class TensorParallel(nn.Module):
    """A block whose two halves of the hidden width are on two ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, hidden), nn.Linear(hidden, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(all_reduce(self.b(torch.tanh(self.a(x)))))


def split_over_ranks(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    return nn.Sequential(*[TensorParallel(64 if i % 2 else 48) for i in range(10)])


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def one_plan(rank: int) -> list[str]:
    x = batch(0)
    plain = gradients(split_over_ranks(rank), x)
    model = split_over_ranks(rank)
    probe = fit(model, x, "16MiB")
    least, most = probe.plan.certificate.smallest_budget_bytes, probe.plan.certificate.peak_bytes
    trees = []
    for share in (0.0, 0.2, 0.4, 0.6):
        cap = int(least + share * (most - least))
        fitted = fit(model, x, cap if rank == 0 else 2 * cap)
        assert same(gradients(model, x), plain)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= cap
        trees.append(repr(fitted.plan.tree))
    return trees


@needs_ranks
def test_one_plan_on_all_ranks() -> None:
    first, second = on_ranks(one_plan)
    assert first == second


def data_parallel(rank: int) -> nn.Module:
    return DistributedDataParallel(tower())


def bare(rank: int) -> nn.Module:
    return tower()


def refusals(rank: int, build: Any) -> list[str]:
    x = batch(0)
    model = build(rank)
    plain = train(copy.deepcopy(model) if build is bare else build(rank), x) if build is not split_over_ranks else None
    group = dist.group.WORLD if build is bare else None
    enough = fit(model, x, "1MiB", group=group)
    least = enough.plan.certificate.smallest_budget_bytes
    said = []
    for refusing in (0, 1):  # one of them has too little; on the other the plan that runs already stays
        with pytest.raises(BudgetExceeded) as caught:
            fit(model, x, least - 1 if rank == refusing else "1MiB", group=group)
        assert (caught.value.need, caught.value.available) == (least, least - 1)
        said.append(str(caught.value))
        assert enough.active
    enough.unfit()
    if plain is not None:
        assert same(train(model, x), plain)
    return said


@needs_ranks
@pytest.mark.parametrize("build", [split_over_ranks, data_parallel, bare])
def test_a_refusal_is_the_same_on_all_ranks(build: Any) -> None:
    first, second = on_ranks(refusals, build)
    assert first == second
    assert "ranks 0, 1 plan together" in first[0]


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 3:
            raise RuntimeError("the user's own")
        return x


def fails_on_one(rank: int) -> None:
    """Three refusals of one rank that the other would wait for in the constructor of DDP or in the first backward."""
    wrapped = DistributedDataParallel(nn.Sequential(tower().stem, Fails(), tower().blocks[0]))
    expected = (RuntimeError, "the user's own") if rank else (CheckpointError, "failed on rank 1.*the user's own")
    with pytest.raises(expected[0], match=expected[1]):
        fit(wrapped, batch(rank, 3 if rank else 4), "1MiB")
    model = nn.Sequential(tower().stem, nn.Dropout(0.5), tower().blocks[0], tower().blocks[1])
    model.train(rank == 1)
    with pytest.raises(InvalidChain, match=r"rank 1: .*draws random numbers"):
        fit(model, batch(rank), "1MiB", preserve_rng_state=False, group=dist.group.WORLD)
    with pytest.raises(InvalidChain, match="rank 1 measured 5 stages"):
        fit(nn.Sequential(*tower().blocks[: 2 + rank]), batch(rank), "1MiB", group=dist.group.WORLD)
    fit(wrapped, batch(rank), "1MiB")
    wrapped(batch(rank)).sum().backward()


@needs_ranks
def test_other_failures_are_told_to_all_ranks() -> None:
    on_ranks(fails_on_one)


def alone(rank: int) -> None:
    """Without a wrapper and collectives nobody is asked: one rank fits, or each another model."""
    if rank == 0:
        x = batch(0)
        fitted = fit(tower(), x, budget_between(tower, x))
        fitted(x).backward()


@needs_ranks
def test_a_model_of_its_own_is_planned_alone() -> None:
    on_ranks(alone)


def not_a_member(rank: int) -> None:
    mine = [dist.new_group([other]) for other in range(2)]
    fit(tower(), batch(0), "1MiB", group=mine[rank])
    with pytest.raises(TypeError, match="that this rank is a part of"):
        fit(tower(), batch(0), "1MiB", group=mine[1 - rank])


@needs_ranks
def test_a_group_without_this_rank_is_refused() -> None:
    on_ranks(not_a_member)


def sizes(rank: int) -> list[str]:
    """Plain DDP models of ranks that see other lengths: one tree at fit, and from then on each its own."""
    x = batch(rank, 16 + 16 * rank)
    plain = train(data_parallel(rank), x, batch(rank, 8 + 4 * rank))
    wrapped = data_parallel(rank)
    fitted = fit(wrapped, x, budget_between(tower, batch(0, 32)))
    tree = repr(fitted.plan.tree)
    assert same(train(wrapped, x, batch(rank, 8 + 4 * rank)), plain)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    return [tree]


@needs_ranks
def test_the_most_bytes_of_any_rank_decide() -> None:
    first, second = on_ranks(sizes)
    assert first == second


def blocks(saved: list[int], recomputable: bool = True) -> Chain:
    stages = [
        Stage(f"block {i}", 1.0, 2.0, (2 * i, 2 * i + 1), (2 * i,), recomputable=recomputable or i != 1)
        for i in range(len(saved))
    ]
    return Chain(tuple(stages), tuple(size for each in saved for size in (100, each)))


def test_the_plan_fits_every_rank() -> None:
    chains = {
        2: blocks([900, 100, 500, 500]),
        5: blocks([100, 900, 500, 500]),
        7: blocks([500] * 4, recomputable=False),
    }
    plan = _plan_for_all(chains, 2300, plan_chain)
    assert all(
        simulate(chain, plan.tree).peak_bytes <= plan.certificate.peak_bytes <= 2300 for chain in chains.values()
    )
    with pytest.raises(BudgetExceeded) as caught:
        _plan_for_all(chains, 300, plan_chain)
    assert caught.value.need >= max(
        plan_chain(chain, 1 << 20).certificate.smallest_budget_bytes for chain in chains.values()
    )


def test_ranks_that_save_other_storages() -> None:
    """A storage that one rank does not have at all: no sizes to compare, but a plan of one that the other can run."""
    first = blocks([500] * 4)
    stages = [replace(stage, saves=stage.saves[:1]) if i == 2 else stage for i, stage in enumerate(first.stages)]
    chains = {0: first, 1: replace(first, stages=tuple(stages))}
    plan = _plan_for_all(chains, 1400, plan_chain)
    assert max(simulate(chain, plan.tree).peak_bytes for chain in chains.values()) <= 1400
    with pytest.raises(BudgetExceeded):
        _plan_for_all(chains, 400, plan_chain)


def test_ranks_that_run_other_stages_are_refused_by_name() -> None:
    with pytest.raises(
        InvalidChain, match=r"rank 3 measured 3 stages, 'block 0' to 'block 2', where rank 1 measured 4"
    ):
        _plan_for_all({1: blocks([500] * 4), 3: blocks([500] * 3)}, 5000, plan_chain)
