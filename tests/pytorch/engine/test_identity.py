"""Arguments that are one tensor in forward are one tensor in the recompute, wherever they are held meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, checkpoint

WAYS = ["no budget", "account", "pool", "nested", "nested in account"]


def run(way: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if way == "no budget":
        return checkpoint(fn, *args, **kwargs)
    if way.startswith("nested"):

        def outer(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(fn, *args, **kwargs)

        return run("account" if "account" in way else "no budget", outer, *args, **kwargs)
    return checkpoint(fn, *args, budget=CheckpointBudget("1MiB", device="cpu", hold=way), **kwargs)


def inputs(leaf: bool) -> Tensor:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return x if leaf else x * 1.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("leaf", [True, False])
def test_self_attention_asks_whether_query_is_key(way: str, leaf: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    expected, got = [], []
    for found, call in ((expected, lambda *args: attention(*args)), (got, lambda *args: run(way, attention, *args))):
        x = inputs(leaf)
        out, _ = call(x, x, x)
        found += [out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])]
    assert all(map(torch.equal, got, expected))


def two(a: Tensor, b: Tensor) -> Tensor:
    return a.sin().exp() if a is b else (a.sin() * b).exp().cos()


def inside(a: Tensor, batch: dict[str, list[Tensor]]) -> Tensor:
    return two(a, batch["items"][1])


def in_an_object(a: Tensor, batch: SimpleNamespace) -> Tensor:
    return two(a, batch.x)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], tuple[Any, ...]]]] = {
    "two arguments": (two, lambda x: (x, x)),
    "in a dict of lists": (inside, lambda x: (x, {"items": [x + 1, x]})),
    "in an object": (in_an_object, lambda x: (x, SimpleNamespace(x=x))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_branch_is_taken_again(case: str, way: str) -> None:
    fn, arguments = CASES[case]
    x = inputs(leaf=False)
    (expected,) = torch.autograd.grad(fn(*arguments(x)).sum(), x)
    (got,) = torch.autograd.grad(run(way, fn, *arguments(x)).sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_that_are_two_stay_two(way: str) -> None:
    x = inputs(leaf=False)
    (got,) = torch.autograd.grad(run(way, two, x, x.view_as(x)).sum(), x)
    (expected,) = torch.autograd.grad(two(x, x.view_as(x)).sum(), x)
    assert torch.equal(got, expected)


def test_a_tensor_that_is_given_twice_is_held_once() -> None:
    budget = CheckpointBudget("1MiB", device="cpu", hold="pool")
    x = inputs(leaf=False)
    out = checkpoint(two, x, x, budget=budget)
    assert budget.used_bytes == x.nbytes
    out.sum().backward()
    assert budget.used_bytes == 0
