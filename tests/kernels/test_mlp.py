"""The MLP's recompute-backward, both forms, in Triton's interpreter; and the rule that chooses between them."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuckpt.kernels import mlp
from gpuckpt.kernels.audit.specs import ARCHS
from gpuckpt.kernels.device.activations import ACTIVATIONS
from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.host.tiles import TileConfig, backward_form
from gpuckpt.kernels.linear import linear_fwd
from gpuckpt.kernels.testing.reference import mlp_bwd_ref

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = TileConfig(16, 32, 16, 4, 1, group_m=2)
SPLIT = TileConfig(32, 64, 16, 1, 1)
"""One warp for 32 rows: the epilogue takes the 64 columns in pieces."""


def draw(M, N, K, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g)
    w1 = torch.randn(N, K, generator=g) / math.sqrt(max(K, 1))
    b1 = torch.randn(N, generator=g)
    dy = torch.randn(M, D, generator=g) / max(M, 1)
    w2 = torch.randn(D, N, generator=g) / math.sqrt(max(D, 1))
    return tuple(t.to(dtype) for t in (x, w1, b1, dy, w2))


def dense(*tensors):
    """Contiguous copies for torch's own answer: on some strided bfloat16 operands its CPU kernels read what lies between."""
    return [t if t is None else t.contiguous() for t in tensors]


def check(as_good_as_torch, x, w1, b1, dy, w2, activation, tile=SMALL, kernels=mlp, **options):
    M, N = x.shape[0], w1.shape[0]
    h, dz = (torch.full((M, N), math.nan, dtype=x.dtype) for _ in range(2))
    shape_options = {k: v for k, v in options.items() if k == "form"}
    db = torch.full(kernels.db_partials_shape(x, w1, w2, tile=tile, **shape_options), math.nan)
    kernels.mlp_recompute_bwd(x, w1, b1, dy, w2, h, dz, db, activation=activation, tile=tile, **options)
    truth = mlp_bwd_ref(*(t if t is None else t.double() for t in (x, w1, b1, dy, w2)), activation)
    own = mlp_bwd_ref(*dense(x, w1, b1, dy, w2), activation)
    for got, t, o, name in zip((h, dz, db.sum(0)), truth, own, ("h", "dz", "db"), strict=True):
        as_good_as_torch(got, t, o, f"{activation} {name}")
    return h, dz, db


@pytest.mark.parametrize("form", ["dual", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype, form, as_good_as_torch):
    check(as_good_as_torch, *draw(37, 45, 53, 29, dtype), activation, form=form)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_and_any_strides(data, as_good_as_torch, lay_out):
    M, N, K, D = (data.draw(st.integers(1, n), label=s) for n, s in ((50, "M"), (70, "N"), (50, "K"), (40, "D")))
    layout = st.sampled_from(["dense", "transposed", "padded", "strided", "zero"])
    dtype = data.draw(st.sampled_from(DTYPES))
    x, w1, b1, dy, w2 = (lay_out(t, data.draw(layout)) for t in draw(M, N, K, D, dtype, seed=K))
    b1 = b1 if data.draw(st.booleans()) else None
    tile = data.draw(st.sampled_from([SMALL, SPLIT, None]))
    form = data.draw(st.sampled_from(["dual", "plain"]))
    check(as_good_as_torch, x, w1, b1, dy, w2, data.draw(st.sampled_from(ACTIVATIONS)), tile, form=form)


@pytest.mark.parametrize("form", ["dual", "plain"])
@pytest.mark.parametrize("shape", [(0, 5, 7, 3), (5, 0, 7, 3), (5, 7, 0, 3), (5, 7, 3, 0), (1, 1, 1, 1)])
def test_sizes_of_zero_and_one(shape, form, as_good_as_torch):
    check(as_good_as_torch, *draw(*shape, torch.bfloat16), "gelu", form=form)


def test_descriptors_give_the_bits_of_pointers(as_good_as_torch):
    """Ragged edges included: a descriptor fills what lies outside with zeros."""
    args = draw(37, 72, 88, 40, torch.bfloat16)
    by_pointer = check(as_good_as_torch, *args, "silu", tma=False)
    by_descriptor = check(as_good_as_torch, *args, "silu", tma=True)
    assert all(torch.equal(a, b) for a, b in zip(by_pointer, by_descriptor, strict=True))


def test_h_has_the_bits_of_the_forward_pass():
    x, w1, b1, dy, w2 = draw(70, 90, 100, 60, torch.bfloat16)
    y, h, dz = (torch.empty(70, 90, dtype=x.dtype) for _ in range(3))
    linear_fwd(x, w1, b1, y, activation="gelu_tanh")
    mlp.mlp_recompute_bwd(x, w1, b1, dy, w2, h, dz, activation="gelu_tanh", form="dual")
    assert torch.equal(y, h)


def test_h_and_db_are_optional(as_good_as_torch):
    x, w1, b1, dy, w2 = draw(20, 30, 16, 24, torch.float32)
    dz = torch.full((20, 30), math.nan)
    mlp.mlp_recompute_bwd(x, w1, b1, dy, w2, None, dz, activation="relu")
    truth = mlp_bwd_ref(*(t.double() for t in (x, w1, b1, dy, w2)), "relu")[1]
    as_good_as_torch(dz, truth, mlp_bwd_ref(x, w1, b1, dy, w2, "relu")[1])


FAULTS = {
    "no bias": ("epilogue", "v += widen(", "v += 0 * widen("),
    "derivative forgotten": ("epilogue", "dz = dv * derivative(v, ACT, p_dz.dtype.element_ty, INTERPRET)", "dz = dv"),
    "gradient halves swapped": ("epilogue", "dv = gradients[i] if", "dv = gradients[BN // EPILOGUE_N - 1 - i] if"),
    "W2 read as if transposed": ("mlp", "(strides_w2[1], strides_w2[0])", "strides_w2"),
    "x and dy swapped": ("mlp", "z, dh, row0", "dh, z, row0"),
    "h of the gradient": ("epilogue", "h = activate(v, ACT", "h = activate(gradients[i], ACT"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, mutant, as_good_as_torch):
    kernels = importlib.import_module(f"{mutant(*FAULTS[fault]).__name__}.mlp")
    args = draw(48, 64, 64, 64, torch.bfloat16)
    check(as_good_as_torch, *args, "silu", SPLIT, form="dual")
    with pytest.raises(AssertionError, match="error"):
        check(as_good_as_torch, *args, "silu", SPLIT, kernels=kernels, form="dual")


def test_the_choice_of_form_is_the_stated_inequality():
    e, flops_per_byte = {"cublas": 0.74, "linear": 0.54, "dual": 0.44}, 295.0  # H100
    for D in (64, 300, 512, 1024, 2048, 8192):
        for K in (64, 512, 1024, 4096):
            slower = 2 * D * (1 / e["dual"] - 1 / e["cublas"]) + 2 * K * (1 / e["dual"] - 1 / e["linear"])
            expected = "dual" if slower <= 2 * 2 * flops_per_byte else "plain"
            assert backward_form(4 * K, K, D, "bf16", 90) == expected
    assert backward_form(1024, 256, 256, "bf16", 90) == "dual"
    assert backward_form(32768, 8192, 8192, "bf16", 90) == "plain"
    assert all(backward_form(4096, 64, 64, "fp32", arch) == "plain" for arch in ARCHS)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w2": torch.zeros(6, 4)}, ValueError, r"w2 has shape \(6, 4\), expected \(4, 6\)"),
        ({"dz": torch.zeros(6).expand(3, 6)}, ValueError, "overlaps itself"),
        ({"form": "fused"}, ValueError, "'dual' or 'plain'"),
        ({"dy": torch.zeros(3, 4, dtype=torch.float16)}, TypeError, "cast one of them"),
        ({"activation": "swish"}, ValueError, "unknown activation"),
        ({"db_partials": torch.zeros(1, 6, dtype=torch.float16)}, TypeError, "db_partials must be float32"),
    ],
)
def test_mistakes_are_explained(change, error, words):
    good = {
        "x": torch.zeros(3, 5), "w1": torch.zeros(6, 5), "b1": None, "dy": torch.zeros(3, 4), "w2": torch.zeros(4, 6),
        "h": None, "dz": torch.zeros(3, 6), "activation": "relu",
    }  # fmt: skip
    with pytest.raises(error, match=words):
        mlp.mlp_recompute_bwd(**{**good, **change})
