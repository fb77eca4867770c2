"""The whole autograd path through the real kernels, on CPU tensors in Triton's interpreter, beside torch and float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gpuckpt import functional
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.kernels import gated as gated_kernels
from gpuckpt.kernels import linear as linear_kernels
from gpuckpt.kernels import mlp as mlp_kernels
from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.pytorch.ops import _activations as activations
from gpuckpt.pytorch.ops._activations import ACTIVATIONS
from gpuckpt.pytorch.ops._operands import wants_copy
from tests.pytorch.ops.fused import OPS, LiveBytes, assert_as_good_as_torch, gradients
from tests.pytorch.ops.test_chunking import FORMULAS

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")
OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("GPUCKPT_BACKEND", "triton")


def check(op, *sizes, dtype=torch.float32, bias=True, layout=None, **options):
    """Ours against float64, no worse than torch; options go to ours alone, but the activation to both."""
    operands = op.draw(*sizes, dtype=dtype, bias=bias)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in operands]
    dy = torch.randn(operands[0].shape[0], op.shapes(*sizes)[-1][0], generator=torch.Generator().manual_seed(5)).to(
        dtype
    )
    dy = dy if layout is None else layout(dy)
    activation = options.pop("activation", "gelu")
    truth = gradients(op.plain, exact, dy.double(), activation=activation)
    torchs = gradients(op.plain, operands, dy, activation=activation)
    assert_as_good_as_torch(gradients(op.run, operands, dy, activation=activation, **options), truth, torchs)


@OP
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(op, activation, triton):
    check(op, 37, 21, 40, 18, activation=activation)


@OP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_16_bits(op, dtype, bias, triton):
    check(op, 37, 21, 40, 18, activation="silu", dtype=dtype, bias=bias)


@OP
def test_chunks(op, triton):
    check(op, 37, 21, 40, 18, chunk_rows=16)


@OP
@pytest.mark.parametrize("sizes", [(0, 7, 6, 4), (5, 0, 6, 4), (5, 7, 6, 0), (5, 7, 0, 4)])
def test_sizes_of_zero(op, sizes, triton):
    check(op, *sizes)


@OP
def test_gradient_of_zero_strides(op, triton):
    check(op, 37, 21, 40, 18, layout=lambda dy: dy[:1].expand_as(dy))
    check(op, 37, 21, 40, 18, layout=lambda dy: dy[:, :1].expand_as(dy))
    check(op, 37, 21, 40, 18, layout=lambda dy: dy.t().contiguous().t(), chunk_rows=7)


@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("op", ["mlp", "gated_mlp"])
def test_kernels_multiply_a_copy_of_an_expanded_gradient(op, chunk_rows, triton, monkeypatch):
    """`y.sum()` sends strides (0, 0): with them no operand of the launch could come through a descriptor."""
    module, name = (mlp_kernels, "mlp_recompute_bwd") if op == "mlp" else (gated_kernels, "gated_recompute_bwd")
    real, strides = getattr(module, name), []

    def launch(*args, **options):
        strides.append(args[3 if op == "mlp" else 5].stride())
        return real(*args, **options)

    monkeypatch.setattr(module, name, launch)
    check(OPS[op], 37, 21, 40, 24, layout=lambda dy: dy[:1, :1].expand_as(dy), chunk_rows=chunk_rows)
    assert set(strides) == {(24, 1)}


@pytest.mark.parametrize("width", [24, 19])
def test_gradients_with_whole_rows_are_not_copied(width, triton):
    assert not wants_copy(torch.empty(4, width))
    assert not wants_copy(torch.empty(8, width)[::2, :])
    assert wants_copy(torch.empty(width, 4).t())
    assert wants_copy(torch.empty(4, 1).expand(4, width))
    assert wants_copy(torch.empty(4, 27)[:, 1:25])
    assert not wants_copy(torch.empty(4, 27)[:, 1:20]), "rows of 19 end unaligned in a copy too"


def test_a_scaled_gradient_of_one_expanded_row_is_left_as_it_is(triton):
    x, *others = OPS["gated_mlp"].draw(6, 21, 40, 18, dtype=torch.float32)
    y = OPS["gated_mlp"].run(x, *others, activation="silu", down_multiplier=3.0, chunk_rows=1)
    dy = torch.ones(1, 18).expand(6, 18)
    torch.autograd.grad(y, x, dy)
    assert torch.equal(dy, torch.ones(6, 18))


@OP
def test_a_shape_is_learned_without_casting_a_weight(op, triton):
    operands = op.draw(64, 32, 48, 32, dtype=torch.float32)
    operands[0] = operands[0].detach().bfloat16()
    with LiveBytes() as live:
        FORMULAS[op.name](*operands, 64)
    assert live.peak_bytes == 0


@pytest.mark.parametrize("form", ["dual", "plain"])
def test_both_forms_of_the_mlp_backward(form, triton, monkeypatch):
    run = []
    dual = mlp_kernels.mlp_dual_bwd
    monkeypatch.setattr(mlp_kernels, "mlp_dual_bwd", lambda *args, **options: run.append(1) or dual(*args, **options))
    monkeypatch.setattr(mlp_kernels, "backward_form", lambda *shape: form)
    check(OPS["mlp"], 37, 21, 40, 18)
    assert bool(run) == (form == "dual")


@pytest.mark.parametrize("form", ["triple", "plain"])
def test_both_forms_of_the_gated_backward(form, triton, monkeypatch):
    run = []
    plain = gated_kernels.gated_plain_bwd
    monkeypatch.setattr(
        gated_kernels, "gated_plain_bwd", lambda *args, **options: run.append(1) or plain(*args, **options)
    )
    monkeypatch.setattr(gated_kernels, "backward_form", lambda *shape, gated: form)
    check(OPS["gated_mlp"], 37, 21, 40, 18)
    check(OPS["gated_mlp"], 37, 21, 40, 18, layout=lambda dy: dy[:1].expand_as(dy), chunk_rows=7)
    assert bool(run) == (form == "plain")


def test_residual(triton):
    x, w, b = OPS["linear"].draw(37, 21, 40, 18, dtype=torch.float32)
    residual = torch.randn(37, 18, requires_grad=True)
    y = functional.linear(x, w, b, activation="gelu", residual=residual)
    torch.testing.assert_close(y, OPS["linear"].plain(x, w, b, "gelu") + residual)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones(37, 18))


def test_dropout_has_the_same_bits_on_both_back_ends(monkeypatch):
    x, w, b = OPS["linear"].draw(37, 21, 40, 18, dtype=torch.float32)
    residual, dy = torch.randn(2, 37, 18).unbind()
    found = []
    for backend, chunk_rows in (("torch", None), ("triton", None), ("torch", 5), ("triton", 16)):
        monkeypatch.setenv("GPUCKPT_BACKEND", backend)
        torch.manual_seed(11)
        found.append(
            gradients(
                functional.linear,
                (x, w, b),
                dy,
                activation="gelu",
                residual=residual,
                dropout=0.4,
                chunk_rows=chunk_rows,
            )
        )
    kept = found[0][0] != residual
    assert 0.5 < kept.float().mean() < 0.7
    for others in found[1:]:
        assert torch.equal(others[0] != residual, kept)
        for got, expected in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, expected)


@OP
def test_saves_its_input_and_nothing_else(op, triton):
    x, *others = op.draw(dtype=torch.float32)
    others = [torch.nn.Parameter(t.detach()) for t in others]
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.run(x, *others, activation="gelu")
    (kept,) = (t for t in saved if not isinstance(t, torch.nn.Parameter))
    assert kept.data_ptr() == x.data_ptr()


def test_float64_is_refused_by_name(triton):
    x, w, b = OPS["linear"].draw()
    with pytest.raises(TypeError, match=r"kernels take float32, float16 or bfloat16; got torch\.float64"):
        functional.linear(x, w, b, activation="gelu")


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_a_model_of_two_blocks_trains_three_steps(activation, monkeypatch):
    """Losses and weights after each step, on the kernels and by torch, each beside a run in float64."""

    def train(backend, dtype):
        monkeypatch.setenv("GPUCKPT_BACKEND", backend)
        torch.manual_seed(0)
        model = Transformer(Config(layers=2, width=16, heads=2, context=8, activation=activation)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tokens = torch.randint(0, 256, (3, 2, 9))
        losses = []
        for batch in tokens:
            optimizer.zero_grad()
            loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(p.detach() for p in model.parameters())]

    truth = train("torch", torch.float64)
    torchs = train("torch", torch.float32)
    assert_as_good_as_torch(train("triton", torch.float32), truth, torchs)
    assert truth[0][0] != truth[0][2]


# Teeth: the checks above have to reject a faulty kernel.


def test_a_kernel_without_its_bias_is_caught(triton, monkeypatch):
    good = linear_kernels.linear_fwd
    monkeypatch.setattr(linear_kernels, "linear_fwd", lambda x, w, b, out, **options: good(x, w, None, out, **options))
    with pytest.raises(AssertionError, match="result 0: error"):
        check(OPS["linear"], 37, 21, 40, 18)


def test_a_recompute_without_its_bias_is_caught(triton, monkeypatch):
    good = linear_kernels.linear_recompute_bwd
    monkeypatch.setattr(
        linear_kernels, "linear_recompute_bwd", lambda x, w, b, *rest, **options: good(x, w, None, *rest, **options)
    )
    with pytest.raises(AssertionError, match="result 1: error"):
        check(OPS["linear"], 37, 21, 40, 18)


@pytest.mark.parametrize("wrong", ["gelu_tanh", "silu", "identity"])
def test_the_derivative_of_another_activation_is_caught(wrong, triton, monkeypatch):
    good = linear_kernels.linear_recompute_bwd
    monkeypatch.setattr(
        linear_kernels,
        "linear_recompute_bwd",
        lambda *args, activation, **options: good(*args, activation=wrong, **options),
    )
    with pytest.raises(AssertionError, match="result 1: error"):
        check(OPS["linear"], 37, 21, 40, 18)


@OP
@pytest.mark.parametrize("wrong", ["gelu_tanh", "silu", "identity"])
def test_the_derivative_of_another_activation_is_caught_by_torch_too(op, wrong, monkeypatch):
    table = activations._TABLE
    monkeypatch.setitem(table, "gelu", table["gelu"]._replace(grad=table[wrong].grad))
    with pytest.raises(AssertionError, match="result 1: error"):
        check(op, 37, 21, 40, 18)
