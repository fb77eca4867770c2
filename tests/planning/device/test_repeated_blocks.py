"""Chains of many blocks out of chains of few, on chains made by hand; real models: tests/pytorch/whole_device."""

from __future__ import annotations

import pytest

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Stage
from gpuckpt.planning.device.repeated_blocks import extend_chain, fewest_blocks, find_period
from gpuckpt.planning.variants import with_spill

PERIOD = 3


def deep(count: int, odd: int = -1) -> Chain:
    """Blocks of which every third is wider; all share one mask, and wide ones one more that the first of them makes."""
    storages, stages = [10, 20], [Stage("prefix", saves=(0,))]
    previous: tuple[int, ...] = ()
    wide_mask: int | None = None
    for block in range(count):
        wide = block % PERIOD == PERIOD - 1
        if wide and wide_mask is None:
            wide_mask = len(storages)
            storages.append(70)
        own = len(storages)
        storages += [300 if wide else 100, 50, 40 + (block == odd)]
        masks = (1, wide_mask) if wide and wide_mask is not None else (1,)
        stages.append(
            Stage(
                f"layers.{block}",
                1.0,
                2.0,
                (own, own + 1),
                previous,
                masks,
                (own + 2,),
                40,
                workspace_bytes=7 * (1 + wide),
            )
        )
        previous = (own + 2,)
    storages.append(5)
    stages.append(Stage("suffix", saves=(len(storages) - 1, *previous), recomputable=False))
    return with_spill(Chain(tuple(stages), tuple(storages), 8, "deep"), 1e3)


@pytest.mark.parametrize("count", range(7, 20))
def test_the_extended_chain_is_the_whole_one(count: int) -> None:
    measured = deep(fewest_blocks(count, 1, PERIOD))
    found = extend_chain(measured, "layers.", 1, PERIOD, count)
    assert found == deep(count)
    assert found.fingerprint() == deep(count).fingerprint()


def test_what_does_not_repeat_is_refused() -> None:
    with pytest.raises(InvalidChain, match=r"blocks layers\.\* from 1 on do not repeat"):
        extend_chain(deep(fewest_blocks(40, 1, PERIOD), odd=5), "layers.", 1, PERIOD, 40)
    with pytest.raises(InvalidChain, match="do not repeat"):
        extend_chain(deep(fewest_blocks(40, 1, 2)), "layers.", 1, 2, 40)
    with pytest.raises(InvalidChain, match="no stage is called blocks"):
        extend_chain(deep(8), "blocks.", 1, PERIOD, 41)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("aaaa", (1, 1)),
        ("abbb", (1, 1)),
        ("aabbbb", (2, 1)),
        ("sssssfsssssfssssssf"[:14], (1, 6)),
        ("abababab", (1, 2)),
        ("abcdef", (6, 1)),
        ("a", (1, 1)),
        ("", (0, 1)),
    ],
)
def test_periods(kinds: str, found: tuple[int, int]) -> None:
    assert find_period(kinds) == found
    first, period = found
    assert all(kinds[i] == kinds[i + period] for i in range(first, len(kinds) - period))
