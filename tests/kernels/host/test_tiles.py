"""The tile rule: pure, always valid, and the same for forward and recompute."""

from __future__ import annotations

import itertools

import pytest

from gpuckpt.kernels.audit.specs import ARCHS
from gpuckpt.kernels.host.hardware import SHARED_MEMORY_BYTES, nearest_arch
from gpuckpt.kernels.host.tiles import KINDS, TileConfig, candidates, choose, epilogue_n, why_invalid

DTYPES = ("fp32", "fp16", "bf16")
EVERY = list(itertools.product(KINDS, DTYPES, ARCHS))


@pytest.mark.parametrize(("kind", "dtype", "arch"), EVERY)
def test_every_shipped_tile_is_valid(kind, dtype, arch):
    tiles = candidates(kind, dtype, arch)
    assert tiles
    assert [why_invalid(kind, t, dtype, arch) for t in tiles] == [None] * len(tiles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kind_reduces_over_k_in_the_same_steps(dtype, arch):
    """What makes a z that another kernel recomputes bitwise the z of the forward pass."""
    assert len({t.bk for kind in KINDS for t in candidates(kind, dtype, arch)}) == 1


@pytest.mark.parametrize(("kind", "dtype", "arch"), EVERY)
def test_choice_is_a_candidate_and_fills_the_card(kind, dtype, arch):
    tiles = candidates(kind, dtype, arch)
    assert choose(kind, 1 << 15, 1 << 14, 4096, dtype, arch) == tiles[0]
    assert choose(kind, 16, 16, 4096, dtype, arch) == tiles[-1]
    areas = [t.bm * t.bn for t in tiles]
    assert areas == sorted(areas, reverse=True)
    chosen = [choose(kind, m, 1024, 64, dtype, arch) for m in (1, 100, 1000, 10_000, 100_000)]
    assert set(chosen) <= set(tiles)
    assert [c.bm * c.bn for c in chosen] == sorted(c.bm * c.bn for c in chosen)


@pytest.mark.parametrize("shape", [(0, 0, 0), (1, 1, 1), (17, 33, 100), (5000, 5000, 5000)])
def test_host_tiles_are_valid(shape):
    for kind, dtype in itertools.product(KINDS, DTYPES):
        assert why_invalid(kind, choose(kind, *shape, dtype, 0), dtype, 0) is None


@pytest.mark.parametrize(
    ("tile", "dtype", "arch", "words"),
    [
        (TileConfig(128, 96, 64, 8, 3), "bf16", 90, "bn=96 must be a power of two"),
        (TileConfig(128, 128, 8, 8, 3), "bf16", 90, "bk=8 must be"),
        (TileConfig(128, 128, 64, 3, 3), "bf16", 90, "num_warps=3"),
        (TileConfig(128, 128, 64, 8, 0), "bf16", 90, "num_stages=0"),
        (TileConfig(128, 128, 64, 8, 4), "bf16", 89, "needs 132096 B of shared memory; sm_89 has 101376"),
        (TileConfig(128, 128, 64, 8, 8), "bf16", 90, "needs 263168 B of shared memory"),
        (TileConfig(128, 256, 64, 4, 2), "bf16", 90, "256 accumulator registers"),
        (TileConfig(128, 128, 16, 8, 3), "fp32", 80, "16 fp32 outputs"),
        (TileConfig(32, 64, 64, 4, 3), "bf16", 100, "need 64 rows"),
    ],
)
def test_invalid_tiles_are_named_with_the_reason(tile, dtype, arch, words):
    assert words in why_invalid("linear", tile, dtype, arch)


def test_limits_are_those_of_the_cards():
    assert {a: SHARED_MEMORY_BYTES[a] for a in ARCHS} == {
        80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376,
    }  # fmt: skip


def test_nearest_arch():
    assert [nearest_arch(*c) for c in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))] == [
        80, 86, 86, 89, 90, 100, 100, 120, 120,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"7\.5 is not supported"):
        nearest_arch(7, 5)


def test_epilogue_pieces_divide_the_tile():
    for kind, dtype, arch in EVERY:
        for t in candidates(kind, dtype, arch):
            assert t.bn % epilogue_n(t) == 0


def test_unknown_requests_are_refused():
    with pytest.raises(ValueError, match="no tiles for kind='conv'"):
        choose("conv", 1, 1, 1, "bf16", 90)
