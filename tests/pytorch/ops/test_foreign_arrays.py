"""The fused operations on arrays of other libraries: the same numbers, the same library, the same memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from gpuckpt import functional
from gpuckpt.errors import DimMismatch, DLPackRefused
from gpuckpt.pytorch.ops import foreign_arrays
from tests.pytorch.ops.fused import OPS, gradients

OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
PUBLIC = {
    "linear": (functional.linear, (0, 1, 2)),
    "mlp": (functional.mlp, (0, 1, 3, 2, 4)),
    "gated_mlp": (functional.gated_mlp, (0, 1, 3, 5, 2, 4, 6)),
}


@pytest.fixture(params=["numpy", "cupy", "jax"])
def to_array(request, monkeypatch):
    """A function from host tensors to arrays of a library, and one back."""
    if request.param == "numpy":
        return torch.Tensor.numpy, torch.from_numpy
    if request.param == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        jax.config.update("jax_enable_x64", True)
        return lambda t: jax.numpy.asarray(t.numpy()), lambda a: torch.from_numpy(np.array(a))
    cupy = request.getfixturevalue("hostcuda").cupy

    # CuPy over host memory: torch sees no CUDA device, so host tensors stand in for torch's views of the blocks.
    def exchange(array, library):
        if isinstance(array, torch.Tensor):
            return cupy.asarray(array.numpy()) if library == "cupy" else array
        return torch.from_numpy(cupy.asnumpy(array))

    monkeypatch.setattr(foreign_arrays, "exchange", exchange)
    monkeypatch.setattr(foreign_arrays, "_stream_of", lambda library, array: contextlib.nullcontext())
    return lambda t: cupy.asarray(t.numpy()), lambda a: torch.from_numpy(cupy.asnumpy(a))


@OP
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(op, bias, to_array):
    there, back = to_array
    operands = op.draw(bias=bias)
    dy = torch.randn(5, 4, dtype=torch.float64)
    expected = gradients(op.plain, operands, dy, activation="gelu")
    fn, order = PUBLIC[op.name]
    arrays = [None if operands[i] is None else there(operands[i].detach()) for i in order]
    y = fn(*arrays, activation="gelu")
    assert type(y) is type(arrays[0])
    torch.testing.assert_close(back(y), expected[0])

    y, pull = functional.vjp(fn, *arrays, activation="gelu")
    found = pull(there(dy))
    assert len(found) == len(arrays)
    assert all((g is None) == (a is None) for g, a in zip(found, arrays, strict=True))
    by_operand = dict(zip(order, found, strict=True))
    ours = [by_operand[i] for i in range(len(order)) if by_operand[i] is not None]
    for got, want in zip([y, *ours], expected, strict=True):
        assert type(got) is type(arrays[0])
        torch.testing.assert_close(back(got), want)


def test_the_loss_on_arrays(to_array):
    there, back = to_array
    x, w = torch.randn(6, 8), torch.randn(11, 8)
    target = torch.randint(0, 11, (6,))
    expected = torch.nn.functional.cross_entropy(x @ w.t(), target, reduction="none")
    arrays = (there(x), there(w), there(target))
    torch.testing.assert_close(back(functional.linear_cross_entropy(*arrays, reduction="none")), expected)
    _, pull = functional.vjp(functional.linear_cross_entropy, *arrays, reduction="none")
    dx, dw, dtarget = pull(there(torch.ones(6)))
    assert dx.shape == (6, 8)
    assert dw.shape == (11, 8)
    assert dtarget is None


def test_nothing_is_copied_on_the_way_in():
    seen = []

    def operation(x, w):
        seen.extend((x.data_ptr(), w.data_ptr()))
        return x @ w

    x, w = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    y, _ = foreign_arrays.vjp(operation, x, w)
    assert seen == [a.__array_interface__["data"][0] for a in (x, w)]
    assert y.flags.owndata is False


def test_keyword_arrays_and_errors():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    y = functional.linear(x, w, residual=np.ones((2, 4), np.float32))
    assert np.array_equal(y, np.full((2, 4), 4.0))
    with pytest.raises(TypeError, match="arrays of one library, got numpy and torch"):
        functional.linear(x, torch.ones(4, 3))
    with pytest.raises(TypeError, match=r"x is .*; expected Tensor or array"):
        functional.linear([[1.0]], None)
    with pytest.raises(DimMismatch):
        functional.linear(x, w[:, :2])
    with pytest.raises(DLPackRefused):
        functional.linear(x.astype(">f4"), w)
    _, pull = functional.vjp(functional.linear, x, w)
    with pytest.raises(TypeError, match="numpy and torch"):
        pull(torch.ones(2, 4))


def test_torch_goes_through_untouched():
    x, w, b = OPS["linear"].draw()
    assert functional.linear(x, w, b).requires_grad
    y, pull = functional.vjp(functional.linear, x.detach(), w.detach(), None, activation="silu")
    dx, dw, db = pull(torch.ones_like(y))
    assert db is None
    expected = torch.autograd.grad(OPS["linear"].plain(x, w, None, "silu").sum(), (x, w))
    torch.testing.assert_close((dx, dw), expected)
    assert functional.linear.__doc__.startswith("dropout(act")
