"""RMSNorm and LayerNorm in Triton's interpreter, forward and backward, against fp64 and autograd."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import norm
from gpuckpt.kernels.device.casts import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def draw(M, K, dtype, seed=0):
    """x away from zero mean, weight, bias, gradient."""
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(M, K, generator=g) + 0.7, torch.randn(M, K, generator=g) / max(M, 1)
    w, b = 1 + torch.randn(K, generator=g) / 4, torch.randn(K, generator=g)
    return tuple(t.to(dtype) for t in (x, w, b, dy))


def by_torch(x, w, b, dy, kind):
    """(y, dx, dw, db) through autograd."""
    leaves = [None if t is None else t.detach().contiguous().requires_grad_() for t in (x, w, b)]
    xx, ww, bb = leaves
    if kind == "layer":
        y = F.layer_norm(xx, xx.shape[1:], ww, bb, EPS)
    else:
        y = F.rms_norm(xx, xx.shape[1:], ww, EPS)
        y = y if bb is None else y + bb
    y.backward(dy.contiguous())
    return (y.detach(), *(None if t is None else t.grad for t in leaves))


def check(as_good_as_torch, x, w, b, dy, kind, kernels=norm):
    M, K = x.shape
    y, dx = (torch.full((M, K), math.nan, dtype=x.dtype) for _ in range(2))
    kernels.norm_fwd(x, w, b, y, kind=kind, eps=EPS)
    stats = torch.full((2, M), math.nan)
    dw = None if w is None else torch.full(kernels.norm_partials_shape(x), math.nan)
    db = None if b is None else torch.full(kernels.norm_partials_shape(x), math.nan)
    kernels.norm_bwd(x, w, dy, dx, stats, dw, db, kind=kind, eps=EPS)
    truth = by_torch(*(None if t is None else t.double() for t in (x, w, b, dy)), kind)
    own = by_torch(x, w, b, dy, kind)
    sums = [None if t is None else t.sum(0) for t in (dw, db)]
    for got, t, o, name in zip((y, dx, *sums), truth, own, ("y", "dx", "dw", "db"), strict=True):
        if got is not None:
            as_good_as_torch(got, t, o, f"{kind} {name}")


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_autograd(dtype, kind, as_good_as_torch):
    check(as_good_as_torch, *draw(37, 150, dtype), kind)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_and_any_strides(data, as_good_as_torch, lay_out):
    M, K = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 200))
    layout = st.sampled_from(["dense", "transposed", "padded", "strided", "zero"])
    x, w, b, dy = (lay_out(t, data.draw(layout)) for t in draw(M, K, data.draw(st.sampled_from(DTYPES)), seed=K))
    w, b = (t if data.draw(st.booleans()) else None for t in (w, b))
    check(as_good_as_torch, x, w, b, dy, data.draw(st.sampled_from(["rms", "layer"])))


def test_rows_longer_than_a_block(as_good_as_torch):
    check(as_good_as_torch, *draw(3, 5000, torch.float32), "layer")


def test_a_large_mean_does_not_cancel(as_good_as_torch):
    x, w, b, dy = draw(8, 64, torch.float32)
    check(as_good_as_torch, x + 1000, w, b, dy, "layer")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_sizes_of_zero_and_one(shape, as_good_as_torch):
    x, w, b, dy = draw(*shape, torch.float32)
    y, dx = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    norm.norm_fwd(x, w, b, y, kind="rms")
    norm.norm_bwd(x, w, dy, dx, torch.empty(2, shape[0]), kind="rms")
    if x.numel():
        truth = by_torch(*(t.double() for t in (x, w, b, dy)), "rms")
        as_good_as_torch(y, truth[0], by_torch(x, w, b, dy, "rms")[0])
        as_good_as_torch(dx, truth[1], by_torch(x, w, b, dy, "rms")[1])


FAULTS = {
    "mean not subtracted": ("norm", "INTERPRET) - mean", "INTERPRET) - 0 * mean"),
    "mean of g forgotten": ("norm", "dx -= mean_g\n", "dx -= 0 * mean_g\n"),
    "projection on xhat forgotten": ("norm", "dx -= xhat * mean_gx", "dx -= 0 * mean_gx"),
    "weight dropped": ("norm", "y *= widen(", "y *= 1 + 0 * widen("),
    "bias dropped": ("norm", "y += widen(", "y += 0 * widen("),
    "variance over the padding": ("norm", "v = tl.where(k + o_k < K, v, 0.0)", "v = v * 1.0"),
    "one row tile only": ("norm", "o_m = i_m * ROWS", "o_m = 0 * i_m"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, mutant, as_good_as_torch):
    kernels = importlib.import_module(f"{mutant(*FAULTS[fault]).__name__}.norm")
    args = draw(40, 150, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        check(as_good_as_torch, *args, "layer", kernels=kernels)


def test_mistakes_are_explained():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="'rms' or 'layer'"):
        norm.norm_fwd(x, None, None, x, kind="batch")
    with pytest.raises(ValueError, match="eps must be positive"):
        norm.norm_fwd(x, None, None, x, eps=0)
    with pytest.raises(ValueError, match="share memory"):
        norm.norm_bwd(x, None, x, x, torch.zeros(2, 3), torch.zeros(1, 4))
    with pytest.raises(TypeError, match="stats must be float32"):
        norm.norm_bwd(x, None, x, x, torch.zeros(2, 3).half())
