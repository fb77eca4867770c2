"""Dropout: the mask is a function of seed, stream and position, the same in forward and backward, and random enough."""

from __future__ import annotations

import math

import pytest
import torch

from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.device.dropout import Dropout
from gpuckpt.kernels.host.tiles import TileConfig
from gpuckpt.kernels.linear import linear_fwd, linear_recompute_bwd
from gpuckpt.kernels.testing.reference import act_derivative_ref, act_ref

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter")

TILES = [TileConfig(16, 16, 16, 4, 1), TileConfig(32, 64, 16, 1, 1), None]


def mask(M, N, dropout, tile=None, **options):
    """Which elements are kept, through the forward kernel on ones."""
    y = torch.full((M, N), math.nan)
    linear_fwd(torch.ones(M, 1), torch.ones(N, 1), None, y, dropout=dropout, tile=tile, **options)
    scale = 1 / (1 - dropout.p) if dropout.p < 1 else 0.0
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(scale).item()}
    return y != 0


def philox(key, counter):
    """Philox4x32-10 from the paper, on Python ints."""
    k, c = list(key), list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_our_philox_is_the_papers():
    """A known-answer vector of the Random123 library, so that the oracle below can be trusted."""
    assert philox((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_mask_is_philox_at_each_position_whatever_the_tile(tile):
    d = Dropout(0.3, seed=(5 << 40) + 77, offset=(9 << 33) + 2, first_row=1000)
    kept = mask(37, 41, d, tile)
    key = (d.seed & 0xFFFFFFFF, d.seed >> 32)
    for m in range(37):
        for n in range(41):
            word = philox(key, (n, m + 1000, d.offset & 0xFFFFFFFF, d.offset >> 32))[0]
            assert bool(kept[m, n]) == (word >= d.threshold), (m, n)


def test_seeds_and_offsets_are_streams_of_their_own():
    masks = [mask(40, 40, Dropout(0.5, s, o)) for s, o in ((1, 0), (2, 0), (1, 1), (1 << 40, 0), (1, 1 << 40))]
    for i, a in enumerate(masks):
        assert torch.equal(a, masks[i])
        for b in masks[i + 1 :]:
            assert 0.4 < (a == b).float().mean() < 0.6
    assert torch.equal(masks[0], mask(40, 40, Dropout(0.5, 1, 0)))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_dropped_elements(p):
    n = 300 * 300
    dropped = 1 - mask(300, 300, Dropout(p, 3)).float().mean().item()
    assert abs(dropped - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_rows_can_be_taken_a_chunk_at_a_time():
    whole = mask(50, 30, Dropout(0.4, 11))
    parts = [mask(size, 30, Dropout(0.4, 11, first_row=start)) for start, size in ((0, 17), (17, 20), (37, 13))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_backward_recomputes_the_masks_bits(tile, dtype, as_good_as_torch):
    g = torch.Generator().manual_seed(0)
    x, w, r = torch.randn(40, 24, generator=g), torch.randn(50, 24, generator=g) / 5, torch.randn(40, 50, generator=g)
    b, dy = torch.randn(50, generator=g), torch.randn(40, 50, generator=g) / 6
    x, w, b, r, dy = (t.to(dtype) for t in (x, w, b, r, dy))
    d = Dropout(0.25, 1234, 5)
    keep = mask(40, 50, d)
    y, dz, h = (torch.full((40, 50), math.nan, dtype=dtype) for _ in range(3))
    linear_fwd(x, w, b, y, activation="silu", residual=r, dropout=d, tile=tile)
    linear_recompute_bwd(x, w, b, dy, dz, activation="silu", dropout=d, h=h, tile=tile)

    def oracle(x, w, b, r, dy):
        z = x @ w.t() + b
        scaled = keep.to(z.dtype) / (1 - d.p)
        return act_ref(z, "silu") * scaled + r, act_ref(z, "silu") * scaled, dy * scaled * act_derivative_ref(z, "silu")

    truth = oracle(*(t.double() for t in (x, w, b, r, dy)))
    for got, t, own, name in zip((y, h, dz), truth, oracle(x, w, b, r, dy), ("y", "h", "dz"), strict=True):
        as_good_as_torch(got, t, own, name)
    assert torch.equal(h == 0, ~keep)


@pytest.mark.parametrize("bad", [{"p": 1.5}, {"p": -0.1}, {"seed": -1}, {"offset": 1 << 63}, {"first_row": 1 << 32}])
def test_mistakes_are_explained(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if "p" not in bad else "probability"):
        Dropout(**{"p": 0.5, "seed": 0, **bad})
