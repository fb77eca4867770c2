"""The fused operations against plain autograd: every activation, dtype, layout and size; wrong shapes are refused."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch

from gpuckpt import functional
from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.ops._activations import ACTIVATIONS, GATED
from tests.pytorch.ops.fused import ACTS, OPS, assert_as_good_as_torch, gradients

OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def test_the_tests_know_every_activation():
    assert set(ACTS) == set(ACTIVATIONS)
    assert set(GATED.values()) <= set(ACTIVATIONS)


@OP
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_gradients_are_those_of_finite_differences(op, activation, chunk_rows):
    operands = op.draw(seed=3)

    def fn(*operands):
        return op.run(*operands, activation=activation, chunk_rows=chunk_rows)

    assert torch.autograd.gradcheck(fn, operands)


@OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_as_exact_as_torch_in_the_same_dtype(op, dtype, activation, bias):
    operands = op.draw(70, 33, 50, 20, dtype=dtype, bias=bias)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in operands]
    dy = torch.randn(70, 20, generator=torch.Generator().manual_seed(9)).to(dtype)
    truth = gradients(op.plain, exact, dy.double(), activation=activation)
    torchs = gradients(op.plain, operands, dy, activation=activation)
    assert_as_good_as_torch(gradients(op.run, operands, dy, activation=activation), truth, torchs)
    chunked = gradients(op.run, operands, dy, activation=activation, chunk_rows=16)
    assert_as_good_as_torch(chunked, truth, torchs)


@OP
@pytest.mark.parametrize("sizes", [(0, 7, 6, 4), (5, 0, 6, 4), (5, 7, 6, 0), (5, 7, 0, 4), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_sizes_of_zero_and_one(op, sizes):
    operands = op.draw(*sizes)
    dy = torch.ones(sizes[0], sizes[3], dtype=torch.float64)
    ours, plain = (gradients(fn, operands, dy, activation="gelu") for fn in (op.run, op.plain))
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)


@OP
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(op, lead):
    _, *others = op.draw()
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*lead, 4, dtype=torch.float64)
    ours, plain = (gradients(fn, [x, *others], dy, activation="silu") for fn in (op.run, op.plain))
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)


def _layouts(shape: tuple[int, ...]):
    """Tensors of one shape, each laid out differently."""
    t = torch.randn(shape, dtype=torch.float64)
    yield "dense", t
    yield "transposed", t.clone().transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((*shape[:-1], 3 * shape[-1]), float("nan"), dtype=torch.float64)
    wide[..., 1::3] = t
    yield "strided", wide[..., 1::3]
    yield "expanded", t[:1].expand(shape)
    yield "constant", t[(0,) * len(shape)].expand(shape)


@OP
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_layouts_of_input_and_gradient(op, chunk_rows):
    _, *others = op.draw()
    for (name_x, x), (name_dy, dy) in itertools.product(_layouts((5, 7)), _layouts((5, 4))):
        operands = [x.detach().requires_grad_(), *others]
        ours = gradients(op.run, operands, dy, activation="gelu", chunk_rows=chunk_rows)
        plain = gradients(op.plain, operands, dy, activation="gelu")
        for got, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, expected, msg=f"x {name_x}, dy {name_dy}")


@OP
def test_layouts_of_weights(op):
    x, *_ = op.draw()
    for layouts in zip(*(list(_layouts(shape)) for shape in op.shapes(5, 7, 6, 4)[1:]), strict=True):
        operands = [x, *(t.detach().requires_grad_() for _, t in layouts)]
        dy = torch.randn(5, 4, dtype=torch.float64)
        ours, plain = (gradients(fn, operands, dy, activation="silu") for fn in (op.run, op.plain))
        for got, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, expected, msg=layouts[0][0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_is_added_last(activation):
    x, w, b = OPS["linear"].draw()
    residual = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = functional.linear(x, w, b, activation=activation, residual=residual)
    torch.testing.assert_close(y, OPS["linear"].plain(x, w, b, activation) + residual)
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: functional.linear(x, w, b, activation=activation, residual=r), (x, w, b, residual)
    )


def test_residual_may_be_of_another_dtype():
    x, w, b = OPS["linear"].draw(dtype=torch.bfloat16)
    residual = torch.randn(5, 4, requires_grad=True)
    y = functional.linear(x, w, b, activation="relu", residual=residual)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert residual.grad.dtype == torch.float32
    assert torch.equal(residual.grad, torch.ones(5, 4))


def test_weights_may_be_of_another_dtype():
    for op in OPS.values():
        x, *others = op.draw(dtype=torch.float32)
        x = x.detach().bfloat16().requires_grad_()
        y = op.run(x, *others, activation="gelu")
        assert y.dtype == torch.bfloat16
        found = torch.autograd.grad(y.sum(), [x, *others])
        assert [t.dtype for t in found] == [torch.bfloat16, *(torch.float32 for _ in others)]


@pytest.mark.parametrize(("gate_multiplier", "down_multiplier"), [(1.5, 1.0), (1.0, 0.25), (0.7, 1.3)])
def test_multipliers_of_falcon_h1(gate_multiplier, down_multiplier):
    op = OPS["gated_mlp"]
    operands = op.draw()
    options = {"gate_multiplier": gate_multiplier, "down_multiplier": down_multiplier}
    dy = torch.randn(5, 4, dtype=torch.float64)
    for activation in ("silu", "sigmoid", "relu2"):
        plain = gradients(op.plain, operands, dy, activation=activation, **options)
        for chunk_rows in (None, 2):
            ours = gradients(op.run, operands, dy, activation=activation, chunk_rows=chunk_rows, **options)
            for got, expected in zip(ours, plain, strict=True):
                torch.testing.assert_close(got, expected)


def test_nan_is_not_hidden():
    for op in OPS.values():
        x, *others = op.draw()
        with torch.no_grad():
            x[2, 1] = float("nan")
        for activation in ACTIVATIONS:
            y, dx, *_ = gradients(op.run, [x, *others], torch.ones(5, 4, dtype=torch.float64), activation=activation)
            assert y[2].isnan().all()
            assert not y[[0, 1, 3, 4]].isnan().any()
            assert not dx[[0, 1, 3, 4]].isnan().any()


@OP
def test_wrong_shapes_are_refused_by_name(op):
    operands = op.draw()
    for index, (name, shape) in enumerate(zip(op.names, op.shapes(5, 7, 6, 4), strict=True)):
        # The rows of x are free, and so is the first dimension of the last weight where there is no bias.
        for axis in range(1 if name == "x" else 0, len(shape)):
            wrong = list(shape)
            wrong[axis] += 1
            changed = [*operands[:index], torch.zeros(wrong, dtype=torch.float64), *operands[index + 1 :]]
            with pytest.raises(DimMismatch, match=r"mismatch: expected \d+, got \d+"):
                op.run(*changed, activation="gelu")
        if len(shape) == 2 and name != "x":
            changed = [*operands[:index], torch.zeros(shape[-1]), *operands[index + 1 :]]
            with pytest.raises(DimMismatch):
                op.run(*changed, activation="gelu")


def test_wrong_arguments_are_refused():
    for op in OPS.values():
        x, *others = op.draw()
        with pytest.raises(ValueError, match="activation='swish': expected one of identity, relu"):
            op.run(x, *others, activation="swish")
        with pytest.raises(ValueError, match="expected a floating-point tensor"):
            op.run(torch.zeros(5, 7, dtype=torch.int64), *others, activation="gelu")
        with pytest.raises(ValueError, match="expected a floating-point tensor"):
            op.run(torch.zeros((), dtype=torch.float64), *others, activation="gelu")
        for options in ({"chunk_rows": 0}, {"scratch_bytes": 0}):
            with pytest.raises(ValueError, match="expected at least 1"):
                op.run(x, *others, activation="gelu", **options)
        with pytest.raises(ValueError, match="give one of them"):
            op.run(x, *others, activation="gelu", chunk_rows=3, scratch_bytes=100)
    x, w, b = OPS["linear"].draw()
    with pytest.raises(DimMismatch, match=r"residual of shape \(4, 5\)"):
        functional.linear(x, w, b, residual=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"dropout is 1.5; expected a number from 0 to 1"):
        functional.linear(x, w, b, dropout=1.5)


def test_one_order_of_arguments():
    """x, weights, what else is required, biases; then options by name, and those that all have come last, in one order."""
    kinds = []
    for name in ("linear", "mlp", "gated_mlp", "linear_cross_entropy"):
        parameters = inspect.signature(getattr(functional, name)).parameters.values()
        tensors = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        kinds.append(
            "".join(re.sub(r"^(w|b)\d$|^\w*_?(weight|bias)$", lambda m: (m[1] or m[2])[0], t) for t in tensors)
        )
        assert options[-3:] == ["norm", "chunk_rows", "scratch_bytes"], name
        assert all(p.default is None for p in parameters if p.name in tensors and p.name.startswith("b")), name
    assert kinds == ["xwb", "xwwbb", "xwwwbbb", "xwtargetb"]


def test_a_bias_in_the_place_of_a_weight_is_refused():
    x, w1, b1, w2, b2 = OPS["mlp"].draw()
    with pytest.raises(DimMismatch, match="number of dimensions of w2; weights come first, then biases"):
        functional.mlp(x, w1, b1, w2, b2)
    with pytest.raises(TypeError, match=r"w2: expected a tensor \(N, 6\), got None; weights come first, then biases"):
        functional.mlp(x, w1, None, w2)
