"""Seconds without a measurement, and further ways to keep a stage.

`roofline_s` (Williams, Waterman and Patterson 2009): no kernel is faster than its arithmetic or its traffic. `with_spill` and
`with_compression` add options to every stage of a chain, for the solver to choose from. Transfers and conversions are taken to
overlap nothing unless `overlap` says so: a plan may turn out faster than promised, not slower.

What it does not do: hold a table of devices (`gpuckpt.kernels.roofline` has one), or put the copy that comes back in backward
under the cap: spilled bytes that return are counted in neither held nor total bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpuckpt.planning.chain import Chain, Stage, Variant

__all__ = ["LINK_BYTES_PER_S", "roofline_s", "with_compression", "with_spill"]

LINK_BYTES_PER_S = {
    "pcie-gen3-x16": 15.75e9,
    "pcie-gen4-x16": 31.5e9,
    "pcie-gen5-x16": 63.0e9,
    "nvlink-c2c": 450.0e9,
}
"""Bytes a second between host and device, one way, by the standards' raw rates; pinned copies reach about 80% of them."""


def roofline_s(
    flops: float, moved_bytes: float, flops_per_s: float, bytes_per_s: float, efficiency: float = 1.0
) -> float:
    """Least seconds for `flops` of arithmetic and `moved_bytes` of memory traffic, divided by `efficiency` in (0, 1]."""
    if flops < 0 or moved_bytes < 0:
        raise ValueError(f"flops and moved_bytes are {flops!r} and {moved_bytes!r}; expected numbers of at least 0")
    if flops_per_s <= 0 or bytes_per_s <= 0 or not 0 < efficiency <= 1:
        raise ValueError("rates are above 0 and efficiency is in (0, 1]")
    return max(flops / flops_per_s, moved_bytes / bytes_per_s) / efficiency


def with_spill(chain: Chain, bytes_per_s: float, *, overlap: float = 0.0, name: str = "spill") -> Chain:
    """The chain with an option for each recomputable stage to keep what it saves in host memory.

    `bytes_per_s`: of the link, one way; `overlap`: the fraction of each transfer hidden behind other work, 0 to 1.
    """
    _check(bytes_per_s, overlap)

    def spilled(stage: Stage, saved_bytes: int) -> tuple[tuple[int, ...], float, int]:
        return (), (1.0 - overlap) * saved_bytes / bytes_per_s, 0

    return _with_option(chain, name, spilled)


def with_compression(chain: Chain, ratio: float, bytes_per_s: float, *, name: str = "packed") -> Chain:
    """The chain with an option for each recomputable stage to keep what it saves in `1 / ratio` of the bytes.

    `bytes_per_s`: how fast bytes are packed, and unpacked in backward.
    """
    _check(bytes_per_s, 0.0)
    if ratio < 1:
        raise ValueError(f"ratio is {ratio!r}; expected at least 1")

    def packed(stage: Stage, saved_bytes: int) -> tuple[tuple[int, ...], float, int]:
        return (-1,), saved_bytes / bytes_per_s, -int(-saved_bytes // ratio)

    return _with_option(chain, name, packed)


def _with_option(chain: Chain, name: str, option: Callable[[Stage, int], tuple[tuple[int, ...], float, int]]) -> Chain:
    """`option(stage, saved bytes)` gives the ids saved instead, seconds each way, and the size of id -1, a new storage."""
    storages = list(chain.storages)
    stages = []
    for stage in chain.stages:
        saved_bytes = sum(chain.storages[i] for i in set(stage.saves))
        if not stage.recomputable or not saved_bytes:
            stages.append(stage)
            continue
        ids, seconds, new_bytes = option(stage, saved_bytes)
        if -1 in ids:
            ids = tuple(len(storages) if i == -1 else i for i in ids)
            storages.append(new_bytes)
        variant = Variant(name, ids, stage.forward_s + seconds, stage.backward_s + seconds)
        stages.append(replace(stage, variants=(*stage.variants, variant)))
    return replace(chain, stages=tuple(stages), storages=tuple(storages))


def _check(bytes_per_s: float, overlap: float) -> None:
    if not bytes_per_s > 0:
        raise ValueError(f"bytes_per_s is {bytes_per_s!r}; expected more than 0")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}; expected 0 to 1")
