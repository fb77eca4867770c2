"""A norm before a fused operation: the gradients of plain autograd, and the raw input is all that is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck

from gpuckpt import CheckpointBudget, functional
from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.ops.norm import Norm, norm_bwd, norm_fwd
from tests.pytorch.ops.fused import ALL_OPS, OPS, assert_as_good_as_torch, gradients

OP = pytest.mark.parametrize("op", ALL_OPS.values(), ids=lambda op: op.name)
KIND = pytest.mark.parametrize("kind", ["rms", "layer"])


def plain_norm(x, kind, weight, bias, eps):
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def both(op, kind, operands, dy, *, weight=None, bias=None, eps=1e-3, **options):
    """(ours, plain): result and gradients of x, the other operands and the norm's parameters."""
    parameters = [t for t in (weight, bias) if t is not None]

    def ours(x, *rest):
        others = rest[: len(operands) - 1]
        return op.run(x, *others, activation="gelu", norm=Norm(kind, weight, bias, eps), **options)

    def plain(x, *rest):
        others = rest[: len(operands) - 1]
        return op.plain(plain_norm(x, kind, weight, bias, eps), *others, "gelu")

    return tuple(gradients(fn, [*operands, *parameters], dy) for fn in (ours, plain))


@OP
@KIND
@pytest.mark.parametrize("affine", ["none", "weight", "weight and bias"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_gradients(op, kind, affine, chunk_rows):
    operands = op.draw()
    weight = None if affine == "none" else torch.randn(7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if "bias" in affine else None
    dy = torch.randn_like(op.run(*operands))
    ours, plain = both(op, kind, operands, dy, weight=weight, bias=bias, chunk_rows=chunk_rows)
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)


@OP
@KIND
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_torch(op, kind, backend, dtype, monkeypatch):
    sizes = (37, 21, 40, 18)
    operands = op.draw(*sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(21, generator=generator).to(dtype).requires_grad_()
    y = op.run(*operands)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    wide = [t.detach().double().requires_grad_() for t in operands]
    _, truth = both(op, kind, wide, dy.double(), weight=weight.detach().double().requires_grad_())
    monkeypatch.setenv("GPUCKPT_BACKEND", backend)
    ours, torchs = both(op, kind, operands, dy, weight=weight)
    assert_as_good_as_torch(ours, truth, torchs)


@OP
@KIND
def test_the_raw_input_is_all_that_is_kept(op, kind):
    x, *others = op.draw()
    others = [nn.Parameter(t.detach()) for t in others]
    norm = Norm(kind, nn.Parameter(torch.ones(7, dtype=torch.float64)))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.run(x, *others, activation="gelu", norm=norm)
    # A loss keeps its targets besides.
    kept = [t for t in saved if not isinstance(t, nn.Parameter) and t.is_floating_point()]
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.data_ptr()}
    targets_bytes = sum(t.nbytes for t in saved if not t.is_floating_point())
    budget = CheckpointBudget(x.nbytes + targets_bytes, device="cpu")
    with budget:
        y = op.run(x.detach() * 2, *others, activation="gelu", norm=norm)
    assert budget.used_bytes == x.nbytes + targets_bytes
    y.sum().backward()


def test_modules_of_torch():
    x, w, b = OPS["linear"].draw(dtype=torch.float32)
    for module in (nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False), nn.RMSNorm(7), nn.RMSNorm(7, eps=0.1)):
        for p in module.parameters():
            nn.init.normal_(p)
        y = functional.linear(x, w, b, activation="silu", norm=Norm.of(module))
        torch.testing.assert_close(y, F.silu(F.linear(module(x), w, b)))
    with pytest.raises(ValueError, match="expected one over the last dimension alone"):
        Norm.of(nn.LayerNorm((5, 7)))


def test_what_does_not_fit_is_refused():
    x, w, b = OPS["linear"].draw()
    with pytest.raises(ValueError, match="norm of kind 'batch': expected one of rms, layer"):
        functional.linear(x, w, b, norm=Norm("batch"))
    with pytest.raises(ValueError, match="eps=0"):
        functional.linear(x, w, b, norm=Norm("rms", eps=0))
    with pytest.raises(DimMismatch, match="length of the norm's weight"):
        functional.linear(x, w, b, norm=Norm("rms", torch.ones(6)))


def test_opcheck_and_compile():
    x, w, b = OPS["linear"].draw(dtype=torch.float32)
    weight = torch.randn(7, requires_grad=True)
    assert set(opcheck(norm_fwd, (x, weight, None, "rms", 1e-5)).values()) == {"SUCCESS"}
    plain = (torch.randn(5, 7), x.detach(), weight.detach(), torch.ones(7), "layer", 1e-5, [True, False, True])
    assert set(opcheck(norm_bwd, plain).values()) == {"SUCCESS"}

    def step(x, w, b, weight):
        return functional.linear(x, w, b, activation="gelu", norm=Norm("layer", weight))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    dy = torch.randn(5, 4)
    for got, expected in zip(*(gradients(fn, (x, w, b, weight), dy) for fn in (compiled, step)), strict=True):
        torch.testing.assert_close(got, expected)
