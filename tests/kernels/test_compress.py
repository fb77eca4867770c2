"""Compressed storage: the stated error bound, codes torch can read, and rounding that is unbiased where it is stochastic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import compress as cp

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TORCH_TYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# From the definition of the formats: (half a step relative to the value, half a step of the smallest codes over the largest).
BOUND = {"int8": (0.0, 0.5 / 127), "e4m3": (2**-4, 2**-10 / 448), "e5m2": (2**-3, 2**-17 / 57344)}


def compressed(x, format, seed=None, **more):
    codes = torch.full(x.shape, 0xAB, dtype=torch.uint8)
    scales = torch.full(cp.scales_shape(*x.shape), float("nan"))
    cp.compress(x, codes, scales, format=format, seed=seed, **more)
    return codes, scales


def read_with_torch(codes, scales, format):
    """The stored matrix by torch's own types: fp64, no code in common with the kernels."""
    values = codes.view(TORCH_TYPES[format]).double()
    return values * scales.double().repeat_interleave(cp.GROUP, dim=1)[:, : codes.shape[1]]


def allowed(x, format, stochastic):
    """The bound of the docstring for every element, in fp64."""
    relative, of_largest = BOUND[format]
    x = x.double().abs()
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % cp.GROUP)).unflatten(1, (-1, cp.GROUP))
    largest = blocks.amax(-1).repeat_interleave(cp.GROUP, dim=1)[:, : x.shape[1]]
    bound = torch.maximum(relative * x, of_largest * largest) * (2 if stochastic else 1) + x * 2**-22
    return torch.where(largest < 2**-100, largest, bound)


def values(M, K, dtype, seed, spread):
    """Magnitudes over `spread` powers of two, so that subnormal codes are met too."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(M, K, generator=g) * torch.exp2(-spread * torch.rand(M, K, generator=g))).to(dtype)


@pytest.mark.parametrize("format", cp.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
def test_error_bound(format, dtype, seed):
    x = values(70, 384, DTYPES[dtype], 1, 14)
    codes, scales = compressed(x, format, seed)
    stored = read_with_torch(codes, scales, format)
    assert ((stored - x.double()).abs() <= allowed(x, format, seed is not None)).all()


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(0, 40),
    K=st.integers(0, 300),
    format=st.sampled_from(list(cp.FORMATS)),
    dtype=st.sampled_from(list(DTYPES)),
    rounding=st.sampled_from([None, 0, 2**63 - 1]),
    spread=st.sampled_from([0, 8, 40, 120]),
    seed=st.integers(0, 99),
)
def test_error_bound_for_any_shape_and_range(M, K, format, dtype, rounding, spread, seed):
    x = values(M, K, DTYPES[dtype], seed, spread)
    codes, scales = compressed(x, format, rounding)
    stored = read_with_torch(codes, scales, format)
    assert ((stored - x.double()).abs() <= allowed(x, format, rounding is not None)).all()
    out = torch.full(x.shape, float("nan"))
    cp.decompress(codes, scales, out, format=format)
    assert torch.equal(out, stored.float())


@pytest.mark.parametrize("format", cp.FORMATS)
def test_nearest_means_nearest(format):
    # Against a search through all codes: no code is closer than the chosen one.
    x = values(4, 128, torch.float32, 2, 16)
    codes, scales = compressed(x, format)
    every = torch.arange(256, dtype=torch.uint8).view(TORCH_TYPES[format]).double()
    every = every[every.isfinite()]
    distances = (x.double()[..., None] - scales.double()[..., None] * every).abs()
    chosen = (x.double() - read_with_torch(codes, scales, format)).abs()
    assert (chosen <= distances.amin(-1) + x.abs().amax() * 2**-21).all()


@pytest.mark.parametrize("format", cp.FORMATS)
def test_decompress_reads_every_code(format):
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    read = codes.view(TORCH_TYPES[format]).float()
    codes[~(read.abs() <= cp.FORMATS[format])] = 0  # codes that are never written: NaN, infinities, -128
    out = torch.empty(2, 128)
    cp.decompress(codes, torch.ones(2, 1), out, format=format)
    assert torch.equal(out, codes.view(TORCH_TYPES[format]).float())


@pytest.mark.parametrize("format", cp.FORMATS)
def test_stochastic_rounding_is_unbiased(format):
    x = values(1, 128, torch.float32, 3, 6)
    x[0, 0] = 4.0  # the scale, which is stored exactly
    rows = x.expand(1500, 128)
    codes, scales = compressed(rows, format, seed=11)
    stored = read_with_torch(codes, scales, format)
    # The mean of n draws that differ by at most one step lies within 5 standard errors of the value: 5 steps / (2 sqrt n).
    step = 2 * allowed(x, format, False)[0]
    assert ((stored.mean(0) - x[0].double()).abs() <= 5 * step / (2 * 1500**0.5) + 1e-6 * x[0].abs()).all()
    nearest = read_with_torch(*compressed(x, format), format)
    assert (stored.mean(0) - x[0]).abs().mean() < 0.3 * (nearest - x).abs().mean()


def test_the_seed_and_the_position_decide_the_bits():
    x = values(64, 256, torch.float32, 4, 4)
    whole = compressed(x, "e4m3", seed=1)
    assert torch.equal(whole[0], compressed(x, "e4m3", seed=1)[0])
    assert not torch.equal(whole[0], compressed(x, "e4m3", seed=2)[0])
    lower = compressed(x[40:], "e4m3", seed=1, first_row=40)
    assert torch.equal(lower[0], whole[0][40:])


@pytest.mark.parametrize("format", cp.FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other(format, bad, seed):
    x = values(3, 256, torch.float32, 5, 2)
    x[1, 7] = bad
    codes, scales = compressed(x, format, seed)
    out = torch.zeros(3, 256, dtype=torch.bfloat16)
    cp.decompress(codes, scales, out, format=format)
    assert out[1, :128].isnan().all()
    out[1, :128] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("format", cp.FORMATS)
def test_zeros_and_vanishing_blocks(format):
    x = torch.zeros(2, 128)
    x[1] = 2.0**-120
    codes, scales = compressed(x, format, seed=0)
    assert (read_with_torch(codes, scales, format) == 0).all()


def test_strides_and_gaps():
    x = values(20, 130, torch.float16, 6, 4)
    wide_codes = torch.full((20, 400), 7, dtype=torch.uint8)
    wide_scales = torch.full((2, 20), -1.0)
    cp.compress(x.t().contiguous().t(), wide_codes[:, 10:270:2], wide_scales.t(), format="e5m2")
    codes, scales = compressed(x, "e5m2")
    assert torch.equal(wide_codes[:, 10:270:2], codes)
    assert torch.equal(wide_scales.t(), scales)
    assert (wide_codes[:, 11:270:2] == 7).all()
    assert (wide_codes[:, :10] == 7).all()
    assert (wide_codes[:, 270:] == 7).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "fp4"}, ValueError, "unknown format 'fp4'"),
        ({"codes": torch.zeros(4, 8, dtype=torch.int8)}, TypeError, "uint8"),
        ({"codes": torch.zeros(8, dtype=torch.uint8)}, ValueError, "must be a matrix"),
        ({"scales": torch.zeros(4, 2)}, ValueError, "scales has shape"),
        ({"scales": torch.zeros(4, 1, dtype=torch.float16)}, TypeError, "float32"),
        ({"x": torch.zeros(4, 9)}, ValueError, "x has shape"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"codes": torch.zeros(1, 8, dtype=torch.uint8).expand(4, 8)}, ValueError, "overlaps itself"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.zeros(4, 8),
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "scales": torch.zeros(4, 1),
        "format": "int8",
    }
    with pytest.raises(error, match=message):
        cp.compress(**{**arguments, **change})
