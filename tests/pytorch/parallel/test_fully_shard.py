"""FSDP2 (`fully_shard`) before and after `fit`, and around `checkpoint`: bit for bit the same sharded model run plainly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gpuckpt
from gpuckpt import fit
from gpuckpt.errors import StateModified
from tests.pytorch.parallel.models import ROWS, WIDTH, Block, Tower, batch, budget_between, local, same, tower, train
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks

POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gathered": {"reshard_after_forward": False},
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "mixed outputs": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)},
}


WAYS: dict[str, Callable[[Tower], list[Any]]] = {
    "blocks": lambda model: [*model.blocks, model.head],
    "root": lambda model: [],
    "some": lambda model: [model.blocks[1], model.blocks[2].up, model.blocks[5]],
    "groups": lambda model: [[model.stem, model.head], [model.blocks[0], model.blocks[1]]],
    "prefetched": lambda model: list(model.blocks),
}
"""What is sharded by itself, or in groups; the rest is gathered with the root."""


def shard(model: Tower, way: str = "blocks", **options: Any) -> Tower:
    parts = WAYS[way](model)
    for part in parts:
        fully_shard(part, **options)
    fully_shard(model, **options)
    if way == "prefetched":
        for part, after in itertools.pairwise(parts):
            part.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([part])
    return model


def every_order(rank: int, way: str, policy: str) -> None:
    options, x = POLICIES[policy], batch(rank)
    plain = train(shard(tower(), way, **options), x)
    cap = budget_between(tower, x, 0.2)
    for order, strategy in (("before", "optimal"), ("after", "optimal"), ("after", "every")):
        model = tower()
        if order == "after":
            shard(model, way, **options)
        fitted = fit(model, x, cap if strategy == "optimal" else 2 * cap, strategy=strategy)
        if order == "before":
            shard(model, way, **options)
        assert same(train(model, x), plain), (order, strategy)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
        assert fitted.plan.certificate.recompute_s > 0
        assert fitted.budget.used_bytes == 0
        assert not fitted.deviations


@pytest.mark.parametrize(
    ("way", "policy"),
    [
        ("blocks", "plain"),
        ("blocks", "mixed"),
        ("some", "mixed"),
        pytest.param("root", "plain", marks=pytest.mark.slow),
        pytest.param("blocks", "gathered", marks=pytest.mark.slow),
        pytest.param("blocks", "mixed outputs", marks=pytest.mark.slow),
        pytest.param("groups", "plain", marks=pytest.mark.slow),
        pytest.param("prefetched", "mixed", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_bytes(way: str, policy: str) -> None:
    on_ranks(every_order, way, policy)


def measured_once(rank: int) -> None:
    model, x = shard(tower()), batch(rank)
    fitted = fit(model, x, budget_between(tower, x))
    planned = fitted.latest
    train(model, x)
    assert fitted.latest is planned


def test_gathering_is_no_change_of_the_model() -> None:
    on_ranks(measured_once)


def leaves_no_trace(rank: int) -> None:
    """A fit that is refused, or one of a part: parameters are sharded as before, and the model can still be anything's part."""
    x = batch(rank)
    plain = train(shard(tower()), x)
    model = shard(tower())
    names = {name: type(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(gpuckpt.BudgetExceeded):
        fit(model, x, 100)
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == names
    gpuckpt.measure(model.blocks[0], torch.ones(ROWS, WIDTH))  # a part, before the whole has run: not the root of all
    fit(model, x, "1MiB").unfit()
    assert same(train(model, x), plain)
    gpuckpt.measure(model, x)  # after a step
    assert same(train(model, x), train(_trained(x), x))


def _trained(x: torch.Tensor) -> Tower:
    model = shard(tower())
    train(model, x)
    return model


def test_measuring_leaves_no_trace() -> None:
    on_ranks(leaves_no_trace)


def stage_names(rank: int) -> None:
    """Gathering is no work that a stage does: the same stages are found as in the plain model."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(*(Block(hidden=256) for _ in range(2))) for _ in range(3)))
    x = batch(rank, 4)
    plain = [stage.name for stage in gpuckpt.measure(model, x).stages]
    for part in model:
        fully_shard(part)
    fully_shard(model)
    assert [stage.name for stage in gpuckpt.measure(model, x).stages] == plain
    assert "0.1" in plain


def test_the_same_stages_are_found() -> None:
    on_ranks(stage_names)


class Multiply(nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weight)


class GivenWeights(nn.Module):
    """Stages without parameters of their own, which are given those of the root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4))
        self.parts = nn.ModuleList(Multiply() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part, weight in zip(self.parts, self.weights, strict=True):
            x = part(x, weight)
        return x.square().mean()


def given_weights(rank: int) -> None:
    x = batch(rank)
    plain = train(fully_shard(GivenWeights()), x)
    model = fully_shard(GivenWeights())
    fitted = fit(model, x, "1MiB", strategy="every")
    assert same(train(model, x), plain)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_sharded_parameters_as_arguments() -> None:
    on_ranks(given_weights)


def looked_at(rank: int) -> None:
    """Looking at what a node saved runs the block up to there: its forward is over all the same."""
    model = nn.Sequential(*(fully_shard(Block()) for _ in range(2)))
    fully_shard(model)
    model(batch(rank)).sum().backward()
    out = gpuckpt.checkpoint(model[1], batch(rank).requires_grad_(), budget=gpuckpt.CheckpointBudget("1MiB"))
    nodes = [out.grad_fn]
    while not hasattr(nodes[0], "_saved_mat1"):
        nodes = [after for after, _ in nodes[0].next_functions if after is not None] + nodes[1:]
    assert nodes[0]._saved_mat1.shape == (ROWS, 64)
    state = model[1]._get_fsdp_state()
    assert state._training_state == type(state._training_state).IDLE
    assert state._state_ctx.iter_forward_root is None
    out.sum().backward()


def test_a_block_that_is_run_up_to_a_tensor() -> None:
    on_ranks(looked_at)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), tower()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(self.first(x)) * self.scale).sum()


def inside_a_forward(rank: int) -> None:
    """The part that is fitted is sharded afterwards, together with what is around it: it is measured again in the middle of the
    outer forward."""
    x = batch(rank)
    found = []
    for ours in (False, True):
        model = Outer()
        if ours:
            given = model.first(x).detach().requires_grad_()
            fitted = fit(model.inner, given, budget_between(tower, given))
        shard(model.inner)
        fully_shard(model)
        found.append(train(model, x))
    assert same(*found)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes


def test_measured_in_the_middle_of_a_forward() -> None:
    on_ranks(inside_a_forward)


class Counting(Block):
    """Writes a buffer in forward, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def buffers(rank: int) -> None:
    x, found = batch(rank), []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(Counting() for _ in range(4)))
        for block in model:
            fully_shard(block)
        fully_shard(model)
        if ours:
            fit(model, x, "1MiB", strategy="every")
        for _ in range(3):
            model.zero_grad()
            model(x).square().mean().backward()
        found.append([*map(local, (p.grad for p in model.parameters())), *model.buffers()])
    assert same(*found)


def test_buffers_that_a_sharded_block_writes() -> None:
    on_ranks(buffers)


def stepped_between(rank: int) -> None:
    x = batch(rank)
    for wrap in ("fit", "checkpoint"):
        model = nn.Sequential(*(fully_shard(Block()) for _ in range(3)))
        fully_shard(model)
        budget = gpuckpt.CheckpointBudget("1MiB")
        if wrap == "fit":
            fit(model, x, budget, strategy="every")
            out = model(x)
        else:
            out = gpuckpt.checkpoint(model, x.requires_grad_(), budget=budget)
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.mul_(2)
        with pytest.raises(StateModified, match="sharded parameter"):
            out.square().mean().backward()
        del out
        assert budget.used_bytes == 0


def test_parameters_that_are_changed_before_backward() -> None:
    on_ranks(stepped_between)


def checkpointed(rank: int, mixed: bool) -> None:
    """Blocks one by one, two at a time, one in another, and with the wrapper around the checkpoint."""
    x = batch(rank).requires_grad_()
    options = POLICIES["mixed" if mixed else "plain"]

    def run(how: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        blocks = nn.Sequential(*(Block() for _ in range(4)))
        for block in blocks:
            fully_shard(block, **options)
        budget = gpuckpt.CheckpointBudget("1MiB")
        x.grad = None

        def call(part: Any, x: torch.Tensor) -> torch.Tensor:
            return gpuckpt.checkpoint(part, x, budget=budget)

        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = blocks

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if how == "plain":
                    return blocks(x)
                if how == "each":
                    for block in blocks:
                        x = call(block, x)
                    return x
                if how == "pairs":
                    return call(lambda x: blocks[3](blocks[2](x)), call(lambda x: blocks[1](blocks[0](x)), x))
                return call(lambda x: call(blocks[3], call(lambda x: blocks[2](blocks[1](x)), blocks[0](x))), x)

        model = fully_shard(Root(), **options)
        for _ in range(2):
            model(x).square().mean().backward()
        assert budget.used_bytes == 0
        assert how == "plain" or budget.peak_bytes
        return [x.grad, *(local(p.grad) for p in model.parameters())]

    plain = run("plain")
    for how in ("each", "pairs", "nested"):
        assert same(run(how), plain), how


@pytest.mark.parametrize("mixed", [False, True])
def test_under_checkpoint(mixed: bool) -> None:
    on_ranks(checkpointed, mixed)


def accumulation(rank: int) -> None:
    x, found = batch(rank), []
    for ours in (False, True):
        model = shard(tower())
        if ours:
            fitted = fit(model, x, budget_between(tower, x))
        model.set_requires_gradient_sync(False)
        model(x).backward()
        if ours:
            gpuckpt.measure(fitted.unfit(), x)  # while gradients wait to be reduced
            fitted = fit(model, x, fitted.budget)
        model.set_requires_gradient_sync(True)
        model(2 * x).backward()
        found.append([local(p.grad) for p in model.parameters()])
    assert same(*found)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_gradients_that_are_accumulated_before_they_are_reduced() -> None:
    on_ranks(accumulation)


def lengths(rank: int) -> None:
    """What is as long as the example on one rank and shorter on the other runs under the plan of all, alone."""
    batches = [batch(rank, 16), batch(rank, 16 - 4 * rank), batch(rank, 8 + 8 * rank), batch(rank, 12)]
    plain = train(shard(tower()), *batches, steps=4)
    model = shard(tower())
    fitted = fit(model, batches[0], budget_between(tower, batches[0]), strategy="optimal")
    tree = fitted.plan.tree
    if rank == 0:  # seen by this rank alone: nothing that the others would have to measure with it
        model.blocks[2].register_forward_hook(lambda *_: None)
    assert same(train(model, *batches, steps=4), plain)
    assert fitted.plan.tree == tree
    assert not fitted.deviations
    assert fitted.budget.peak_bytes <= fitted.budget.max_bytes
    with pytest.raises(gpuckpt.BudgetExceeded, match="the largest that will come"):
        model(batch(rank, 256)).backward()
    assert fitted.budget.used_bytes == 0


def test_other_lengths_on_some_ranks() -> None:
    on_ranks(lengths)


def lengths_at_fit(rank: int) -> None:
    x = batch(rank, 8 + 8 * rank)
    plain = train(shard(tower()), x)
    cap = budget_between(tower, batch(rank, 16))
    model = shard(tower())
    fitted = fit(model, x, cap if rank else 100 * cap)
    assert same(train(model, x), plain)
    assert fitted.plan.certificate.recompute_s > 0
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= cap
    assert not fitted.deviations


def test_lengths_and_budgets_that_differ_at_fit() -> None:
    on_ranks(lengths_at_fit)


def share_of_the_first_batch(rank: int) -> int:
    """A share is of what this rank's first batch saves: the smallest is the budget that all plan for."""
    x = batch(rank, 8 + 8 * rank)
    plain = train(shard(tower()), x)
    model = shard(tower())
    fitted = fit(model, None, "60%")
    assert same(train(model, x), plain)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert not fitted.deviations
    return fitted.plan.budget_bytes if rank == 0 else fitted.measured_peak_bytes


def test_a_share_of_the_first_batch() -> None:
    smallest_bytes, most_bytes = on_ranks(share_of_the_first_batch)
    assert most_bytes <= smallest_bytes
