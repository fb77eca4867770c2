"""hold="pool" copies what is saved as it is at that moment, also where tensors of one storage change one by one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from gpuckpt import CheckpointBudget, checkpoint
from gpuckpt.pytorch.engine.storage_index import index_of
from tests.pytorch.steps import HOLDS, bits

CELLS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def _gradients(module: nn.Module, x: torch.Tensor, run) -> list[bytes | None]:
    module.zero_grad(set_to_none=True)
    given = x.clone().requires_grad_()
    out = run(module, given)
    while not isinstance(out, torch.Tensor):
        out = out[0]
    out.square().sum().backward()
    return bits([given.grad, *(p.grad for p in module.parameters())])


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell, dtype, hold):
    torch.manual_seed(0)
    module = cell(4, 5).to(dtype)
    x = torch.randn(*((2, 4) if "Cell" in cell.__name__ else (3, 2, 4)), dtype=dtype)
    plain = _gradients(module, x, lambda m, x: m(x))
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)

    def held(module, x):
        with budget:
            return module(x)

    assert _gradients(module, x, held) == plain
    assert _gradients(module, x, lambda m, x: checkpoint(m, x, budget=budget)) == plain
    assert budget.used_bytes == 0


def _chunks(w):
    a, b = (w * 1).unsafe_chunk(2)  # autograd gives each a version counter of its own
    return a.exp_().sum() + b.exp_().sum()


def _splits(w):
    a, b, c = (w * 1).unsafe_split(2)
    return a.sigmoid_().sum() + (b.tanh_() * c.exp_()).sum()


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("function", [_chunks, _splits])
def test_parts_of_one_storage_that_count_versions_by_themselves(function, hold):
    w = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).requires_grad_()
    expected = torch.autograd.grad(function(w), w)
    with CheckpointBudget("1MiB", device="cpu", hold=hold) as budget:
        out = function(w)
    assert bits(torch.autograd.grad(out, w)) == bits(expected)
    del out
    assert budget.used_bytes == 0


def test_the_same_bytes_are_held_once():
    x = torch.linspace(0, 1, 1000)
    weights = [torch.ones(1000, requires_grad=True) for _ in range(3)]
    with CheckpointBudget("1MiB", device="cpu", hold="pool") as budget:
        out = sum((x * weight).sum() for weight in weights)
    assert budget.used_bytes == 4000
    del out


def test_bytes_that_change_without_a_new_version_are_copied_anew():
    x = torch.zeros(10)
    budget = CheckpointBudget("1MiB", device="cpu", hold="pool")
    first = index_of(budget).hold(x)
    x.data.add_(1)
    second = index_of(budget).hold(x)
    assert torch.equal(first.load(), torch.zeros(10))
    assert torch.equal(second.load(), torch.ones(10))
    assert budget.used_bytes == 80


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("how", ["backward", "load", "checkpoint"])
def test_a_budget_that_is_dropped_before_backward_leaves_its_bytes(how, hold):
    """Whoever still looks into a block keeps the memory, and not the address alone."""
    x = torch.linspace(-1, 1, 50_000).requires_grad_()
    expected = torch.autograd.grad((x * 2).exp().sin().sum(), x)
    budget = CheckpointBudget("4MiB", device="cpu", hold=hold)
    if how == "checkpoint":
        out = checkpoint(lambda x: (x * 2).exp().sin().sum(), x, budget=budget)
    else:
        with budget:
            out = (x * 2).exp().sin().sum()
    saved = budget.save(torch.full((50_000,), 3.0)).load() if how == "load" else None
    del budget
    gc.collect()
    rubbish = [torch.full((50_000,), float("nan")) for _ in range(20)]
    assert bits(torch.autograd.grad(out, x)) == bits(expected)
    assert saved is None or bool((saved == 3).all())
    del rubbish
