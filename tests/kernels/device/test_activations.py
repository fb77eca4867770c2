"""Activations and derivatives against fp64, over a range that reaches every branch."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from gpuckpt.kernels.device.activations import ACTIVATIONS, activate, derivative
from gpuckpt.kernels.device.casts import INTERPRETED, narrow, widen
from gpuckpt.kernels.testing.reference import act_derivative_ref, act_ref

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these kernels run on CPU tensors, in Triton's interpreter")


@triton.jit
def pointwise_kernel(p_z, p_y, p_d, n, ACT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    z = tl.load(p_z + o, mask=o < n, other=0.0)
    tl.store(p_y + o, activate(z, ACT, DTYPE, True), mask=o < n)
    tl.store(p_d + o, derivative(z, ACT, DTYPE, True), mask=o < n)


@triton.jit
def rounding_kernel(p_v, p_out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    v = tl.load(p_v + o, mask=o < n, other=0.0)
    tl.store(p_out + o, narrow(v, p_out.dtype.element_ty, True), mask=o < n)


@triton.jit
def widening_kernel(p_v, p_out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, widen(tl.load(p_v + o, mask=o < n, other=0.0), True), mask=o < n)


def run(z: torch.Tensor, activation: str, rounded_to: tl.dtype = tl.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z) and act'(z) in fp32, by the forms for results that are rounded to that dtype."""
    y, d = torch.full_like(z, math.nan), torch.full_like(z, math.nan)
    block = triton.next_power_of_2(z.numel())
    pointwise_kernel[(1,)](z, y, d, z.numel(), ACT=activation, DTYPE=rounded_to, BLOCK=block)
    return y, d


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_derivative_are_as_exact_as_torch(activation, as_good_as_torch):
    z = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 2001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]
    )
    y, d = run(z, activation)
    as_good_as_torch(y, act_ref(z.double(), activation), act_ref(z, activation), "value")
    as_good_as_torch(d, act_derivative_ref(z.double(), activation), act_derivative_ref(z, activation), "derivative")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forms_for_16_bits_are_as_exact_as_torch(activation, dtype, as_good_as_torch):
    z = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 2001), torch.tensor([0.0, -0.0, 1e-5, -1e-5])])
    z = z.to(dtype)
    y, d = run(z.float(), activation, tl.float16)
    as_good_as_torch(y.to(dtype), act_ref(z.double(), activation), act_ref(z, activation), "value")
    own = act_derivative_ref(z, activation)
    as_good_as_torch(d.to(dtype), act_derivative_ref(z.double(), activation), own, "derivative")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forms_for_16_bits_lose_no_small_value(activation):
    """Relative to each value, not to the largest: a sixteenth of fp16's half unit, and where the derivative passes zero an
    absolute error of 5e-6. Below 1e-20 either way nothing is asked."""
    z = torch.cat([torch.linspace(-6, 6, 20001), torch.logspace(-15, 0, 500), -torch.logspace(-15, 0, 500)])
    y, d = run(z, activation, tl.bfloat16)
    for got, truth, least in (
        (y, act_ref(z.double(), activation), 1e-20),
        (d, act_derivative_ref(z.double(), activation), 5e-6),
    ):
        error = (got.double() - truth).abs()
        assert bool((error <= 1.5e-5 * truth.abs() + least).all()), (error / truth.abs()).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_agrees_with_autograd(activation):
    """A second opinion on the oracle: autograd in fp64 knows nothing of our formulas."""
    z = torch.linspace(-9, 9, 1999, dtype=torch.float64).requires_grad_()
    act_ref(z, activation).sum().backward()
    torch.testing.assert_close(act_derivative_ref(z.detach(), activation), z.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rounded_to", [tl.float32, tl.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_stay_finite_where_the_truth_is(activation, rounded_to):
    z = torch.tensor([-1e9, -1e4, -90.0, 90.0, 1e4, 1e9])
    y, d = run(z, activation, rounded_to)
    truth = act_ref(z.double(), activation)
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d.double(), act_derivative_ref(z.double(), activation), rtol=1e-6, atol=1e-6)


def test_tanh_keeps_relative_precision_near_zero():
    z = torch.logspace(-20, -0.5, 1500)
    y, _ = run(torch.cat([z, -z]), "tanh")
    truth = torch.tanh(torch.cat([z, -z]).double())
    assert ((y.double() - truth) / truth).abs().max() < 4e-7


@pytest.mark.parametrize("rounded_to", [tl.float32, tl.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(activation, rounded_to):
    y, _ = run(torch.tensor([math.nan, 1.0]), activation, rounded_to)
    assert math.isnan(y[0])
    assert not math.isnan(y[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even_as_torch_does(dtype):
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=gen, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 0.0, -0.0, math.inf, -math.inf, 3e38, 1e-40])
    v = torch.cat([ties, bits.view(torch.float32), torch.randn(1000, generator=gen)])
    if dtype is torch.float16:
        v = v[v.abs() < 6e4]  # numpy warns where torch gives infinity
    out = torch.empty_like(v, dtype=dtype)
    rounding_kernel[(1,)](v, out, v.numel(), BLOCK=triton.next_power_of_2(v.numel()))
    torch.testing.assert_close(out, v.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_widening_is_exact_for_every_bfloat16():
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(v.numel())
    widening_kernel[(1,)](v, out, v.numel(), BLOCK=2**16)
    torch.testing.assert_close(out, v.float(), rtol=0, atol=0, equal_nan=True)
