"""The gated MLP's kernels in Triton's interpreter: SwiGLU, GEGLU, ReGLU and every other activation, into NaN."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import gated
from gpuckpt.kernels.device.activations import ACTIVATIONS
from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.host.tiles import TileConfig, backward_form
from gpuckpt.kernels.testing.reference import gated_bwd_ref, gated_ref

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = TileConfig(16, 32, 16, 4, 1, group_m=2)
SPLIT = TileConfig(32, 64, 16, 1, 1)


def draw(M, N, K, D, dtype, seed=0):
    """x, wg, bg, wu, bu, dy, wd."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g)
    wg, wu = (torch.randn(N, K, generator=g) / math.sqrt(max(K, 1)) for _ in range(2))
    bg, bu = (torch.randn(N, generator=g) for _ in range(2))
    dy = torch.randn(M, D, generator=g) / max(M, 1)
    wd = torch.randn(D, N, generator=g) / math.sqrt(max(D, 1))
    return tuple(t.to(dtype) for t in (x, wg, bg, wu, bu, dy, wd))


def dense(*tensors):
    """Contiguous copies for torch's own answer: on some strided bfloat16 operands its CPU kernels read what lies between."""
    return [t if t is None else t.contiguous() for t in tensors]


def check(as_good_as_torch, args, activation, tile=SMALL, multiplier=1.0, kernels=gated, tma=None, form=None):
    x, wg, bg, wu, bu, dy, wd = args
    M, N = x.shape[0], wg.shape[0]
    wide = [t if t is None else t.double() for t in args]
    out, h, dz_g, dz_u = (torch.full((M, N), math.nan, dtype=x.dtype) for _ in range(4))
    options = {"activation": activation, "gate_multiplier": multiplier, "tile": tile, "tma": tma}
    kernels.gated_fwd(x, wg, bg, wu, bu, out, **options)
    truth = gated_ref(*wide[:5], activation, multiplier)
    own = gated_ref(*dense(*args[:5]), activation, multiplier)
    as_good_as_torch(out, truth, own, f"{activation} forward")
    dbg, dbu = (torch.full(kernels.db_partials_shape(x, wg, wu, wd, tile, form), math.nan) for _ in range(2))
    kernels.gated_recompute_bwd(x, wg, bg, wu, bu, dy, wd, h, dz_g, dz_u, dbg, dbu, form=form, **options)
    truths = gated_bwd_ref(*wide, activation, multiplier)
    owns = gated_bwd_ref(*dense(*args), activation, multiplier)
    for got, t, o, name in zip((h, dz_g, dz_u), truths, owns, ("h", "dz_g", "dz_u"), strict=True):
        as_good_as_torch(got, t, o, f"{activation} {name}")
    as_good_as_torch(dbg.sum(0), truths[1].sum(0), owns[1].sum(0), f"{activation} db_g")
    as_good_as_torch(dbu.sum(0), truths[2].sum(0), owns[2].sum(0), f"{activation} db_u")
    return out, h, dz_g, dz_u, dbg, dbu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype, as_good_as_torch):
    for form in ("triple", "plain"):
        check(as_good_as_torch, draw(37, 45, 53, 29, dtype), activation, form=form)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_strides_and_multiplier(data, as_good_as_torch, lay_out):
    M, N, K, D = (data.draw(st.integers(1, n), label=s) for n, s in ((50, "M"), (70, "N"), (50, "K"), (40, "D")))
    layout = st.sampled_from(["dense", "transposed", "padded", "strided", "zero"])
    dtype = data.draw(st.sampled_from(DTYPES))
    args = [lay_out(t, data.draw(layout)) for t in draw(M, N, K, D, dtype, seed=K)]
    for i in (2, 4):
        args[i] = args[i] if data.draw(st.booleans()) else None
    tile = data.draw(st.sampled_from([SMALL, SPLIT, None]))
    multiplier = data.draw(st.sampled_from([1.0, 0.5, -1.5]))
    form = data.draw(st.sampled_from(["triple", "plain"]))
    check(as_good_as_torch, args, data.draw(st.sampled_from(ACTIVATIONS)), tile, multiplier, form=form)


@pytest.mark.parametrize("shape", [(0, 5, 7, 3), (5, 0, 7, 3), (5, 7, 0, 3), (5, 7, 3, 0), (1, 1, 1, 1)])
def test_sizes_of_zero_and_one(shape, as_good_as_torch):
    check(as_good_as_torch, draw(*shape, torch.float16), "silu", form="triple")
    # In float32: plain rounds dh as torch does, and of a single number torch's own error may be none by chance.
    check(as_good_as_torch, draw(*shape, torch.float32), "silu", form="plain")


@pytest.mark.parametrize("form", ["triple", "plain"])
def test_descriptors_give_the_bits_of_pointers(form, as_good_as_torch):
    args = draw(37, 72, 88, 40, torch.bfloat16)
    by_pointer = check(as_good_as_torch, args, "silu", tma=False, form=form)
    by_descriptor = check(as_good_as_torch, args, "silu", tma=True, form=form)
    assert all(torch.equal(a, b) for a, b in zip(by_pointer, by_descriptor, strict=True))


def test_recomputed_h_has_the_bits_of_the_forward_pass(as_good_as_torch):
    for form in ("triple", "plain"):
        out, h, *_ = check(as_good_as_torch, draw(70, 90, 100, 60, torch.bfloat16), "gelu_tanh", None, form=form)
        assert torch.equal(out, h)


def test_gradients_are_autograds():
    """The oracle itself against autograd in fp64, through the whole gated MLP with Falcon-H1's multipliers."""
    x, wg, bg, wu, bu, dy, wd = (t.double().requires_grad_() for t in draw(9, 12, 7, 5, torch.float32))
    y = gated_ref(x, wg, bg, wu, bu, "silu", 0.8) @ wd.t() * 0.3
    y.backward(dy.detach())
    with torch.no_grad():
        _, dz_g, dz_u = gated_bwd_ref(x, wg, bg, wu, bu, dy * 0.3, wd, "silu", 0.8)
    torch.testing.assert_close(dz_g.sum(0), bg.grad)
    torch.testing.assert_close(dz_u.sum(0), bu.grad)
    torch.testing.assert_close(dz_g @ wg + dz_u @ wu, x.grad)


FAULTS = {
    "gate's bias dropped": ("gated_epilogue", "g += widen(", "g += 0 * widen("),
    "up's bias dropped": ("gated_epilogue", "u += widen(", "u += 0 * widen("),
    "gate and up swapped": ("gemm", "return acc_b, acc_c", "return acc_c, acc_b"),
    "multiplier forgotten in the chain rule": (
        "gated_epilogue",
        "element_ty, INTERPRET) * multiplier",
        "element_ty, INTERPRET)",
    ),
    "multiplier forgotten before act": ("gated_epilogue", "g *= multiplier", "g *= 1.0"),
    "one weight twice": (
        "gemm",
        "tl.dot(b_a, operand(b_c, INTERPRET), acc_c",
        "tl.dot(b_a, operand(b_b, INTERPRET), acc_c",
    ),
    "gradient halves swapped": ("gated_epilogue", "else gradients[i]", "else gradients[BN // EPILOGUE_N - 1 - i]"),
    "half of dh": ("gated_epilogue", "dv = widen(d, INTERPRET) if", "dv = 0.5 * widen(d, INTERPRET) if"),
    "missing mask over K": ("gemm", "m_k = o_k < K - i_k * BK", "m_k = o_k < BK"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, mutant, as_good_as_torch):
    kernels = importlib.import_module(f"{mutant(*FAULTS[fault]).__name__}.gated")
    args = draw(48, 70, 53, 41, torch.bfloat16)
    form = "plain" if "dh" in fault else "triple"
    check(as_good_as_torch, args, "silu", SPLIT, 0.5, form=form)
    with pytest.raises(AssertionError, match="error"):
        check(as_good_as_torch, args, "silu", SPLIT, 0.5, kernels=kernels, form=form)


def test_the_choice_of_form_is_the_stated_inequality():
    e, flops_per_byte = {"cublas": 0.74, "gated_plain": 0.59, "triple": 0.41}, 295.0  # H100
    for D in (16, 64, 128, 256, 1024, 8192):
        for K in (16, 64, 128, 256, 4096):
            slower = 2 * D * (1 / e["triple"] - 1 / e["cublas"]) + 4 * K * (1 / e["triple"] - 1 / e["gated_plain"])
            expected = "triple" if slower <= 2 * 2 * flops_per_byte else "plain"
            assert backward_form(4 * K, K, D, "bf16", 90, gated=True) == expected
    assert backward_form(256, 128, 128, "bf16", 90, gated=True) == "triple"
    assert backward_form(14336, 4096, 4096, "bf16", 90, gated=True) == "plain"
    assert backward_form(256, 128, 128, "fp32", 90, gated=True) == "plain"


def test_mistakes_are_explained():
    x, wg, bg, wu, bu, dy, wd = draw(3, 6, 5, 4, torch.float32)
    out = torch.empty(3, 6)
    with pytest.raises(ValueError, match=r"wu has shape \(6, 4\), expected \(6, 5\)"):
        gated.gated_fwd(x, wg, bg, wu[:, :4], bu, out)
    with pytest.raises(TypeError, match="cast one of them"):
        gated.gated_fwd(x, wg.half(), bg, wu, bu, out)
    with pytest.raises(TypeError, match=r"x is torch\.float32 and dy torch\.float16; cast one of them"):
        gated.gated_recompute_bwd(x, wg, bg, wu, bu, dy.half(), wd, None, out, out.clone())
    for form in ("triple", "plain"):
        with pytest.raises(ValueError, match="wd has shape"):
            gated.gated_recompute_bwd(x, wg, bg, wu, bu, dy, wd.t(), None, out, out.clone(), form=form)
    with pytest.raises(ValueError, match="'triple' or 'plain'; got 'dual'"):
        gated.gated_recompute_bwd(x, wg, bg, wu, bu, dy, wd, None, out, out.clone(), form="dual")
    with pytest.raises(ValueError, match="descriptors need 16-bit matrices"):
        gated.gated_fwd(x, wg, bg, wu, bu, out, tma=True)
