"""Plain calls run in a node of our own, all others through torch's operators; both have the same bits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt import functional
from gpuckpt.pytorch.ops import _register, gated_mlp, linear, linear_cross_entropy, mlp, norm
from tests.pytorch.ops.fused import ALL_OPS, gradients

MODULES = {"linear": linear, "mlp": mlp, "gated_mlp": gated_mlp, "linear_cross_entropy": linear_cross_entropy}
ANY_OP = pytest.mark.parametrize("op", ALL_OPS.values(), ids=lambda op: op.name)


class Seen(TorchDispatchMode):
    """Changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    """Changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A subclass without a rule of its own."""


@pytest.fixture
def operators(monkeypatch):
    """Names of the operators that were called since."""
    called: list[str] = []
    for name, module in MODULES.items():
        for way in ("fwd", "bwd"):
            run = getattr(module.OP, way)

            def counted(*args, run=run, name=f"{name}_{way}"):
                called.append(name)
                return run(*args)

            monkeypatch.setattr(module.OP, way, counted)
    return called


@ANY_OP
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 2}], ids=str)
def test_the_same_bits_either_way(op, options, operators, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        operands = op.draw(dtype=dtype)
        dy = torch.randn_like(op.run(*operands, **options))
        direct = gradients(op.run, operands, dy, **options)
        assert not operators
        with monkeypatch.context() as patch:
            patch.setattr(_register, "is_plain_call", lambda args: False)
            by_operator = gradients(op.run, operands, dy, **options)
        assert operators == [f"{op.name}_fwd", f"{op.name}_bwd"]
        assert all(torch.equal(a, b) for a, b in zip(direct, by_operator, strict=True))
        operators.clear()


@ANY_OP
def test_views_hooks_and_partial_gradients_as_by_operator(op, operators):
    """x of three dimensions, and parameters of which some are frozen."""
    x, *others = op.draw(M=6)
    x3 = x.detach().reshape(2, 3, -1).requires_grad_()
    frozen = [t if index % 2 else t.detach() for index, t in enumerate(others)]
    y = op.run(x3, *frozen)
    found = torch.autograd.grad(y, [x3, *(t for t in frozen if t.requires_grad)], torch.ones_like(y))
    with Seen():
        y = op.run(x3, *frozen)
    expected = torch.autograd.grad(y, [x3, *(t for t in frozen if t.requires_grad)], torch.ones_like(y))
    assert operators == [f"{op.name}_fwd"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_has_the_same_bits_either_way(kind, operators, monkeypatch):
    x, w, b = ALL_OPS["linear"].draw(dtype=torch.float32)
    scale = torch.linspace(0.5, 1.5, 7).requires_grad_()
    shift = torch.linspace(-1.0, 1.0, 7).requires_grad_() if kind == "layer" else None
    wanted = [t for t in (x, w, b, scale, shift) if t is not None]
    normed = []
    run = norm.norm_fwd
    monkeypatch.setattr(norm, "norm_fwd", lambda *args: normed.append(1) or run(*args))

    def step():
        y = functional.linear(x, w, b, activation="gelu", norm=norm.Norm(kind, scale, shift))
        return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    direct = step()
    assert not normed
    with Seen():
        by_operator = step()
    assert len(normed) == 2, "forward, and again in backward"
    assert operators == ["linear_fwd", "linear_bwd"]
    assert all(torch.equal(a, b) for a, b in zip(direct, by_operator, strict=True))


@ANY_OP
def test_a_dispatch_mode_sees_the_operators(op, operators):
    operands = op.draw()
    with Seen():
        gradients(op.run, operands, torch.ones_like(op.run(*operands)))
    assert operators == [f"{op.name}_fwd"] * 2 + [f"{op.name}_bwd"]


@pytest.mark.parametrize("mode", [Function, lambda: torch.device("cpu")], ids=["own", "device"])
@ANY_OP
def test_a_function_mode_sees_the_operator(op, mode, operators):
    """Of forward: `torch.autograd.grad` is a function itself, within which torch has left the mode."""
    operands = op.draw()
    with mode():
        gradients(op.run, operands, torch.ones_like(op.run(*operands)))
    assert operators == [f"{op.name}_fwd"] * 2


def test_a_mode_around_backward_alone_sees_its_operator(operators):
    x, w, b = ALL_OPS["linear"].draw()
    y = functional.linear(x, w, b, activation="gelu")
    assert not operators
    with Seen():
        y.sum().backward()
    assert operators == ["linear_bwd"]


@pytest.mark.parametrize(
    ("x", "context"),
    [
        (torch.ones(4, 8).as_subclass(Own), contextlib.nullcontext),
        (torch.ones(4, 8, device="meta"), contextlib.nullcontext),
        (torch.ones(4, 8, dtype=torch.complex64).conj().imag, contextlib.nullcontext),
        (torch.ones(4, 8), torch.inference_mode),
    ],
    ids=["subclass", "meta", "negative bit", "inference"],
)
def test_tensors_that_torch_has_to_see_to_go_through_the_operators(x, context, operators):
    with context():
        x = x.clone() if torch.is_inference_mode_enabled() else x
        functional.linear(x, torch.ones(3, 8, device=x.device), activation="relu")
    assert operators == ["linear_fwd"]


def test_a_negative_view_has_its_own_values(operators):
    z = torch.randn(4, 8, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    w = torch.randn(3, 8)
    assert torch.equal(functional.linear(x, w), functional.linear(x.resolve_neg(), w))
    assert operators == ["linear_fwd"]
    w = torch.randn(3, 8, requires_grad=True)
    functional.linear(torch.randn(4, 8), w).backward(z[:, :3].conj().imag)
    assert operators == ["linear_fwd", "linear_bwd"]


def test_no_gradient_no_node(operators):
    x, w = torch.randn(4, 8), nn.Parameter(torch.randn(3, 8))
    with torch.no_grad():
        assert functional.linear(x, w).grad_fn is None
    assert functional.linear(x, w.detach()).grad_fn is None
    assert functional.linear(x, w).grad_fn is not None
    assert not operators


def test_a_derivative_of_the_gradient_is_refused_by_name(operators):
    x, w, b = ALL_OPS["linear"].draw()
    y = functional.linear(x, w, b, activation="gelu")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert operators == ["linear_bwd"]
    with pytest.raises(NotImplementedError, match=r"functional\.linear has no second derivative"):
        grad.sum().backward()
