"""`linear` on compressed input, against fp64 and against torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import compress as cp
from gpuckpt.kernels import compressed_linear as cl
from gpuckpt.kernels.reference import act_derivative_ref, act_ref

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TORCH_TYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAN = float("nan")


def problem(M, N, K, dtype, format, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias, dy = (torch.randn(*s, generator=g) for s in ((M, K), (N, K), (N,), (M, N)))
    codes, scales = torch.empty(M, K, dtype=torch.uint8), torch.empty(cp.scales_shape(M, K))
    cp.compress(x, codes, scales, format=format)
    stored = codes.view(TORCH_TYPES[format]).float() * scales.repeat_interleave(cp.GROUP, 1)[:, :K]
    weight = weight / max(K, 1) ** 0.5
    # What the kernel multiplies: the stored values rounded to the weight's dtype.
    return codes, scales, stored.to(dtype), weight.to(dtype), bias.to(dtype), dy.to(dtype)


def results(x, weight, bias, dy, activation):
    z = x @ weight.t() + bias
    dz = dy * act_derivative_ref(z, activation)
    return {"y": act_ref(z, activation), "dz": dz, "h": act_ref(z, activation), "db": dz.sum(0)}


def check(M, N, K, dtype, format, activation, seed=0):
    codes, scales, x, weight, bias, dy = problem(M, N, K, dtype, format, seed)
    got = {name: torch.full((M, N), NAN, dtype=dtype) for name in ("y", "dz", "h")}
    partials = torch.full(cl.db_partials_shape(codes, weight), NAN)
    cl.compressed_linear_fwd(codes, scales, weight, bias, got["y"], format=format, activation=activation)
    cl.compressed_linear_recompute_bwd(
        codes, scales, weight, bias, dy, got["dz"], partials, format=format, activation=activation, h=got["h"]
    )
    got["db"] = partials.sum(0)
    assert torch.equal(got["y"], got["h"]), "forward and recompute must agree bit for bit"
    truth = results(*(t.double() for t in (x, weight, bias, dy)), activation)
    own = results(x, weight, bias, dy, activation)
    for name, want in truth.items():
        error = (got[name].double() - want).abs().amax().item() if want.numel() else 0.0
        theirs = (own[name].double() - want).abs().amax().item() if want.numel() else 0.0
        assert error < 2 * theirs + 1e-6, f"{name}: error {error:.3g}, torch's {theirs:.3g}"


@pytest.mark.parametrize("format", cp.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu"])
def test_forward_and_backward_are_within_twice_torchs_error(format, dtype, activation):
    check(150, 140, 300, DTYPES[dtype], format, activation)


@settings(max_examples=20, deadline=None)
@given(
    M=st.integers(0, 70),
    N=st.integers(0, 70),
    K=st.integers(0, 280),
    dtype=st.sampled_from(list(DTYPES)),
    format=st.sampled_from(list(cp.FORMATS)),
    seed=st.integers(0, 99),
)
def test_any_shape(M, N, K, dtype, format, seed):
    check(M, N, K, DTYPES[dtype], format, "relu", seed)


def test_strided_codes_scales_and_weight():
    codes, scales, _, weight, bias, _ = problem(20, 30, 140, torch.bfloat16, "e4m3")
    plain, strided = (torch.full((20, 30), NAN, dtype=torch.bfloat16) for _ in range(2))
    cl.compressed_linear_fwd(codes, scales, weight, bias, plain)
    columns = [t.t().contiguous().t() for t in (codes, scales, weight)]
    wide = torch.zeros(20, 280, dtype=torch.uint8)
    wide[:, ::2] = columns[0]
    cl.compressed_linear_fwd(wide[:, ::2], columns[1], columns[2], bias, strided)
    assert torch.equal(plain, strided)


def test_dz_may_overwrite_dy():
    codes, scales, _, weight, bias, dy = problem(20, 30, 64, torch.float16, "int8")
    out = torch.empty_like(dy)
    cl.compressed_linear_recompute_bwd(codes, scales, weight, bias, dy, out, format="int8", activation="tanh")
    cl.compressed_linear_recompute_bwd(codes, scales, weight, bias, dy, dy, format="int8", activation="tanh")
    assert torch.equal(out, dy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(3, 9, dtype=torch.float16)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(3, 8)}, TypeError, "decompress first"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, ValueError, "weight must be a matrix"),
        ({"scales": torch.zeros(4, 3)}, ValueError, "scales has shape"),
        ({"format": "int4"}, ValueError, "unknown format"),
        ({"activation": "swish"}, ValueError, "unknown activation"),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "scales": torch.zeros(4, 1),
        "weight": torch.zeros(3, 8, dtype=torch.float16),
        "bias": None,
        "out": torch.zeros(4, 3),
    }
    with pytest.raises(error, match=message):
        cl.compressed_linear_fwd(**{**arguments, **change})
