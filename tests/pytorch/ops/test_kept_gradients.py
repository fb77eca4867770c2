"""`linear_cross_entropy` with its gradients formed in forward: when, with which bits, and what is held meanwhile."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import gpuckpt
from gpuckpt import CheckpointBudget
from gpuckpt.functional import Norm, linear_cross_entropy
from gpuckpt.pytorch.ops import _loss_chunks
from tests.pytorch.ops.test_linear_cross_entropy import backend, problem  # noqa: F401

M = 37


@pytest.fixture
def rows(monkeypatch):
    """How many rows of logits each computation made."""
    seen: list[int] = []
    logits = _loss_chunks._logits
    monkeypatch.setattr(_loss_chunks, "_logits", lambda x, *rest: seen.append(len(x)) or logits(x, *rest))
    return seen


def by_recompute():
    """What sends the loss the other way: hooks that may do anything with what is saved."""
    return saved_tensors_hooks(lambda t: t, lambda t: t)


def step(leaves, target, context, dy=None, **options):
    x, weight, bias = leaves
    with context:
        loss = linear_cross_entropy(x, weight, target, bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t is not None and t.requires_grad], dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_rows": 10}, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}], ids=str
)
def test_the_bits_are_those_of_the_recompute(backend, rows, dtype, reduction, options):  # noqa: F811
    leaves, target = problem(dtype=dtype)
    kept = step(leaves, target, contextlib.nullcontext(), reduction=reduction, **options)
    assert sum(rows) == M
    recomputed = step(leaves, target, by_recompute(), reduction=reduction, **options)
    assert sum(rows) == 3 * M
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_what_is_wanted_is_formed(wanted):
    leaves, target = problem()
    leaves = [t.detach().requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
    kept = step(leaves, target, contextlib.nullcontext())
    recomputed = step(leaves, target, by_recompute())
    assert len(kept) == 1 + sum(wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_a_factor_is_applied_in_full_precision():
    """0.7 is 0.69921875 in bfloat16: that error, a thousandth, would be in every element and in the same direction."""
    leaves, target = problem(dtype=torch.bfloat16)
    ones = step(leaves, target, contextlib.nullcontext())
    scaled = step(leaves, target, contextlib.nullcontext(), torch.tensor(0.7))
    for one, got in zip(ones[1:], scaled[1:], strict=True):
        assert torch.equal(got, (one.float() * 0.7).bfloat16())
    assert not torch.equal(scaled[1], ones[1] * torch.tensor(0.7).bfloat16())


def test_a_norm_and_autocast():
    (x, weight, _), target = problem()
    scale = torch.linspace(0.5, 1.5, 24).requires_grad_()
    found = []
    for context in (contextlib.nullcontext(), by_recompute()):
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_cross_entropy(x, weight, target, norm=Norm("rms", scale))
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, weight, scale))])
    assert [t.dtype for t in found[0]] == [torch.float32] * 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_backward_again_and_after_the_gradients_were_changed():
    leaves, target = problem()
    x, weight, bias = leaves
    loss = linear_cross_entropy(x, weight, target, bias)
    first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    copies = [t.clone() for t in first]
    for t in first:
        t.zero_()
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(copies, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_the_derivative_of_a_gradient_is_refused_by_name():
    (x, weight, bias), target = problem()
    loss = linear_cross_entropy(x, weight, target, bias)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    expected = step(((x, weight, bias)), target, contextlib.nullcontext())[1]
    assert torch.equal(grad, expected)
    with pytest.raises(NotImplementedError, match=r"functional\.linear_cross_entropy has no second derivative"):
        grad.sum().backward()


def test_a_budget_holds_the_gradients_and_is_empty_after_backward(rows):
    leaves, target = problem()
    x, weight, bias = leaves
    gradient_bytes = sum(t.nbytes for t in leaves)
    budget = CheckpointBudget(gradient_bytes, device="cpu")
    expected = step(leaves, target, by_recompute(), chunk_rows=10)
    rows.clear()
    with budget:
        loss = linear_cross_entropy(x, weight, target, bias, chunk_rows=10)
    assert sum(rows) == M
    assert budget.used_bytes == gradient_bytes
    got = torch.autograd.grad(loss, leaves)
    assert budget.used_bytes == 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


def _small():
    return CheckpointBudget(sum(t.nbytes for t in problem()[0]) - 1, device="cpu")


@pytest.mark.parametrize(
    ("context", "options", "dtype"),
    [
        (_small, {}, torch.float32),
        (lambda: CheckpointBudget("1MiB", device="cpu", hold="pool"), {}, torch.float32),
        (by_recompute, {}, torch.float32),
        (contextlib.nullcontext, {}, torch.float16),
        (contextlib.nullcontext, {"reduction": "none"}, torch.float32),
    ],
    ids=["no room", "pool", "hooks", "float16", "a loss for each row"],
)
def test_where_gradients_are_not_kept(rows, context, options, dtype):
    leaves, target = problem(dtype=dtype)
    dy = torch.ones(M) if options else None
    step(leaves, target, context(), dy, **options)
    assert sum(rows) == 2 * M


def test_not_where_a_weight_has_a_main_grad(rows):
    (x, weight, bias), target = problem()
    weight = nn.Parameter(weight.detach())
    weight.main_grad = torch.zeros_like(weight)
    linear_cross_entropy(x, weight, target, bias).backward(torch.tensor(0.5))
    assert sum(rows) == 2 * M
    assert weight.grad is None
    assert weight.main_grad.abs().sum() > 0


def test_not_inside_checkpointed_work(rows):
    """Whose forward is thrown away: to form gradients in it would be two GEMMs for nothing."""
    (x, weight, bias), target = problem()
    expected = step((x, weight, bias), target, contextlib.nullcontext())
    rows.clear()
    loss = gpuckpt.checkpoint(lambda x: linear_cross_entropy(x * 2 / 2, weight, target, bias), x)
    torch.autograd.grad(loss, (x, weight))
    assert sum(rows) == 2 * M
    torch.testing.assert_close(loss.detach(), expected[0])


def test_without_gradients_forward_is_all_there_is(rows, monkeypatch):
    monkeypatch.setattr(_loss_chunks, "_chunk_grad", None)
    leaves, target = problem()
    with torch.no_grad():
        linear_cross_entropy(*leaves[:2], target)
    linear_cross_entropy(*(t.detach() for t in leaves[:2]), target)
    assert sum(rows) == 2 * M
