"""linear_fwd and linear_recompute_bwd in Triton's interpreter: every activation, dtype, layout and size, into NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpuckpt.kernels.device.activations import ACTIVATIONS
from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.host.arguments import describable
from gpuckpt.kernels.host.tiles import TileConfig
from gpuckpt.kernels.linear import db_partials_shape, linear_fwd, linear_recompute_bwd
from gpuckpt.kernels.testing.reference import act_ref, linear_bwd_ref, linear_ref

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = TileConfig(16, 32, 16, 4, 1, group_m=2)
"""Small enough that modest shapes have several tiles each way and a ragged edge."""
SPLIT = TileConfig(32, 64, 16, 1, 1)
"""One warp for 32 rows: the backward epilogue takes the 64 columns in two pieces."""


def draw(M, N, K, dtype, seed=0):
    """x, weight, bias, residual, dy at the scale of a trained layer: z of order 1, gradients of a mean over rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g)
    w = torch.randn(N, K, generator=g) / math.sqrt(max(K, 1))
    b, r = torch.randn(N, generator=g), torch.randn(M, N, generator=g)
    dy = torch.randn(M, N, generator=g) / max(M, 1)
    return tuple(t.to(dtype) for t in (x, w, b, r, dy))


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype)


def dense(*tensors):
    """Contiguous copies for torch's own answer: on some strided bfloat16 operands its CPU kernels read what lies between."""
    return [t if t is None else t.contiguous() for t in tensors]


def check_forward(check, x, w, b, r, activation, tile=SMALL, out=None, fwd=linear_fwd):
    y = poisoned(x.shape[0], w.shape[0], dtype=x.dtype) if out is None else out
    fwd(x, w, b, y, activation=activation, residual=r, tile=tile)
    wide = [t if t is None else t.double() for t in (x, w, b, r)]
    truth = linear_ref(wide[0], wide[1], wide[2], activation, wide[3])
    x, w, b, r = dense(x, w, b, r)
    check(y, truth, linear_ref(x, w, b, activation, r), f"{activation} forward")


def check_backward(check, x, w, b, dy, activation, tile=SMALL, dz=None, bwd=linear_recompute_bwd):
    dz = poisoned(*dy.shape, dtype=dy.dtype) if dz is None else dz
    h = poisoned(*dy.shape, dtype=dy.dtype)
    db = poisoned(*db_partials_shape(x, w, tile))
    bwd(x, w, b, dy, dz, db, activation=activation, h=h, tile=tile)
    wide = [t if t is None else t.double() for t in (x, w, b, dy)]
    truth, truth_db = linear_bwd_ref(*wide, activation)
    x, w, b, dy = dense(x, w, b, dy)
    own, own_db = linear_bwd_ref(x, w, b, dy, activation)
    check(dz, truth, own, f"{activation} dz")
    check(db.sum(0), truth_db, own_db, f"{activation} db")
    check(h, linear_ref(*wide[:3], activation), linear_ref(x, w, b, activation), f"{activation} h")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype, as_good_as_torch):
    x, w, b, r, dy = draw(37, 45, 53, dtype)
    check_forward(as_good_as_torch, x, w, b, r, activation)
    check_backward(as_good_as_torch, x, w, b, dy, activation)


LAYOUT = st.sampled_from(["dense", "transposed", "padded", "strided", "zero"])
OWN_LAYOUT = st.sampled_from(["dense", "transposed", "padded", "strided"])


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_shape_and_any_strides(data, as_good_as_torch, lay_out):
    M, N, K = (data.draw(st.integers(1, n), label=s) for n, s in ((50, "M"), (70, "N"), (50, "K")))
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    x, w, b, r, dy = (
        lay_out(t, data.draw(LAYOUT, label=s)) for t, s in zip(draw(M, N, K, dtype, seed=M), "xwbrg", strict=True)
    )
    b, r = (t if data.draw(st.booleans()) else None for t in (b, r))
    tile = data.draw(st.sampled_from([SMALL, SPLIT, TileConfig(32, 16, 32, 4, 1, group_m=3), None]))
    out = lay_out(poisoned(M, N, dtype=dtype), data.draw(OWN_LAYOUT))
    check_forward(as_good_as_torch, x, w, b, r, activation, tile, out)
    dz = lay_out(poisoned(M, N, dtype=dtype), data.draw(OWN_LAYOUT))
    check_backward(as_good_as_torch, x, w, b, dy, activation, tile, dz)


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_zero_and_one(shape, dtype, as_good_as_torch):
    x, w, b, r, dy = draw(*shape, dtype)
    check_forward(as_good_as_torch, x, w, b, r, "gelu")
    check_backward(as_good_as_torch, x, w, b, dy, "gelu")


def test_untouched_memory_stays_untouched(lay_out):
    """Outputs are views into wider memory; what lies between their rows must keep its bits."""
    x, w, b, _, dy = draw(20, 40, 24, torch.float32)
    frame = torch.full((26, 60), 7.0)
    linear_fwd(x, w, b, frame[3:23, 11:51], activation="silu", tile=SMALL)
    frame2 = torch.full((26, 60), 7.0)
    linear_recompute_bwd(x, w, b, dy, frame2[3:23, 11:51], activation="silu", tile=SMALL)
    for f in (frame, frame2):
        f[3:23, 11:51] = 7.0
        assert bool((f == 7.0).all())


def test_recomputed_z_has_the_bits_of_the_first_one():
    for dtype in DTYPES:
        x, w, b, _, dy = draw(70, 90, 100, dtype)
        y, h, dz = (torch.empty(70, 90, dtype=torch.float32) for _ in range(3))
        linear_fwd(x, w, b, y)
        linear_recompute_bwd(x, w, b, dy, dz, h=h)
        assert torch.equal(y, h)


def test_descriptors_give_the_bits_of_pointers(as_good_as_torch):
    """On a persistent grid and with ragged edges: a descriptor fills what lies outside with zeros."""
    x, w, b, r, dy = draw(37, 72, 88, torch.bfloat16)
    pairs = []
    for tma in (False, True):
        y, dz, h = (poisoned(37, 72, dtype=x.dtype) for _ in range(3))
        linear_fwd(x, w, b, y, activation="silu", residual=r, tile=SMALL, tma=tma)
        linear_recompute_bwd(x, w, b, dy, dz, activation="silu", h=h, tile=SMALL, tma=tma)
        pairs.append((y, dz, h))
    as_good_as_torch(
        pairs[1][0],
        linear_ref(x.double(), w.double(), b.double(), "silu", r.double()),
        linear_ref(x, w, b, "silu", r),
    )
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_what_a_descriptor_can_describe(lay_out):
    base = torch.zeros(9, 64, dtype=torch.bfloat16)
    assert describable(base, base[:, :40], base[1:5, 8:16])
    refused = {
        "odd row stride": torch.zeros(9, 63, dtype=torch.bfloat16),
        "start not at 16 bytes": base[:, 1:],
        "strided columns": base[:, ::2],
        "transposed": base.t(),
        "repeated row": base[:1].expand(9, 64),
        "32-bit": base.float(),
        "empty": base[:0],
        "a vector": base[0],
    }
    assert {k: describable(t) for k, t in refused.items()} == dict.fromkeys(refused, False)


def test_a_refused_descriptor_is_explained():
    x = torch.zeros(4, 7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="16-byte aligned"):
        linear_fwd(x, x, None, torch.zeros(4, 4), tma=True)


def test_in_place_over_dy_and_over_the_residual(as_good_as_torch):
    x, w, b, r, dy = draw(40, 50, 30, torch.bfloat16)
    expected, _ = linear_bwd_ref(x.double(), w.double(), b.double(), dy.double(), "gelu_tanh")
    own, _ = linear_bwd_ref(x, w, b, dy, "gelu_tanh")
    buffer = dy.clone()
    linear_recompute_bwd(x, w, b, buffer, buffer, activation="gelu_tanh", tile=SMALL)
    as_good_as_torch(buffer, expected, own)
    buffer = r.clone()
    linear_fwd(x, w, b, buffer, residual=buffer, activation="relu", tile=SMALL)
    as_good_as_torch(
        buffer, linear_ref(*(t.double() for t in (x, w, b)), "relu", r.double()), linear_ref(x, w, b, "relu", r)
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_db_is_deterministic_and_ignores_rows_beyond_the_edge():
    """A row beyond M has z = b; where that overflows act', 0 * inf is NaN and must not reach the sum."""
    x, w, b, _, dy = draw(17, 20, 8, torch.float32)
    b[3], w[3], w[3, 0], x[:, 0] = 2.5e38, 0, -2.5e38, 1
    db = [poisoned(*db_partials_shape(x, w, SMALL)) for _ in range(2)]
    for d in db:
        linear_recompute_bwd(x, w, b, dy, poisoned(17, 20), d, activation="relu2", tile=SMALL)
    assert torch.equal(db[0], db[1])
    assert bool(db[0].isfinite().all())
    assert db[0].shape == (2, 20)


@pytest.mark.parametrize("which", ["x", "weight", "out", "dy", "dz"])
def test_offsets_past_2_to_the_31(which, tmp_path, as_good_as_torch):
    """Rows 2^31 + 8 elements apart, in a sparse file: an int32 offset would read (or write) somewhere else."""
    M, N, K = 2, 3, 5
    x, w, b, r, dy = draw(M, N, K, torch.float16)
    far = 2**31 + 8
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far, dtype=torch.float16)

    def spread(t):
        v = storage.as_strided(t.shape, (far, 1))
        v.copy_(t)
        return v

    if which == "x":
        x = spread(x)
    if which == "weight":
        w = spread(w)
    out = spread(poisoned(M, N, dtype=x.dtype)) if which == "out" else None
    dz = spread(poisoned(M, N, dtype=x.dtype)) if which == "dz" else None
    check_forward(as_good_as_torch, x, w, b, r, "tanh", out=out)
    check_backward(as_good_as_torch, x, w, b, spread(dy) if which == "dy" else dy, "tanh", dz=dz)


def test_column_stride_past_2_to_the_31(tmp_path, as_good_as_torch):
    """K apart by more than an int32 offset: the step of the K loop has to be 64 bits wide too."""
    x, w, b, r, _ = draw(3, 3, 2, torch.float16)
    far = 2**31 + 8
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far, dtype=torch.float16)
    spread = storage.as_strided(x.shape, (1, far))
    spread.copy_(x)
    check_forward(as_good_as_torch, spread, w, b, r, "silu", tile=TileConfig(16, 16, 16, 4, 1))


def test_mixed_dtypes_of_what_is_not_multiplied(as_good_as_torch):
    x, w, _, _, _ = draw(20, 30, 40, torch.bfloat16)
    _, _, b, r, _ = draw(20, 30, 40, torch.float32)
    y = poisoned(20, 30)
    linear_fwd(x, w, b, y, activation="silu", residual=r)
    truth = act_ref(x.double() @ w.double().t() + b.double(), "silu") + r.double()
    as_good_as_torch(y, truth, act_ref(x.float() @ w.float().t() + b, "silu") + r)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "swish"}, ValueError, "unknown activation 'swish'"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\), expected \(6,\)"),
        ({"weight": torch.zeros(6, 4)}, ValueError, r"weight has shape \(6, 4\), expected \(6, 5\)"),
        ({"weight": torch.zeros(6, 5, dtype=torch.float16)}, TypeError, "cast one of them"),
        ({"x": torch.zeros(3, 5, dtype=torch.float64)}, TypeError, "float64"),
        ({"x": torch.zeros(5)}, ValueError, "must be matrices"),
        ({"out": torch.zeros(1, 6).expand(3, 6)}, ValueError, "overlaps itself"),
        ({"tile": TileConfig(16, 24, 16, 4, 1)}, ValueError, "power of two"),
    ],
)
def test_mistakes_are_explained(change, error, words):
    given_ = {"x": torch.zeros(3, 5), "weight": torch.zeros(6, 5), "bias": None, "out": torch.zeros(3, 6), **change}
    if given_["x"].dtype is torch.float64:
        given_["weight"] = given_["weight"].double()
    with pytest.raises(error, match=words):
        linear_fwd(**given_)
