"""Seconds without a measurement, and a further way to keep a stage.

`roofline_s` (Williams, Waterman and Patterson 2009): no kernel is faster than its arithmetic or its traffic. `with_spill` adds an
option to every stage of a chain, for the solver to choose from. Transfers are taken to be synchronous unless `overlap` says
otherwise: a plan may turn out faster than promised, not slower.

What it does not do: hold a table of devices (`gpuckpt.kernels.audit.roofline` has one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from gpuckpt.planning.chain import Chain, Stage, Variant

__all__ = ["LINK_BYTES_PER_S", "roofline_s", "with_spill"]

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


def with_spill(
    chain: Chain, bytes_per_s: float, *, latency_s: float = 0.0, overlap: float = 0.0, name: str = "spill"
) -> Chain:
    """The chain with an option for each recomputable stage to keep what it saves in host memory.

    Extras that a stage saves stay: other stages hold them anyway. `bytes_per_s`: of the link, one way; `latency_s`: seconds
    each storage takes besides, one way; `overlap`: the fraction of each transfer hidden behind other work, 0 to 1.
    """
    _check(bytes_per_s, overlap)
    if not 0 <= latency_s < math.inf:
        raise ValueError(f"latency_s is {latency_s!r}; expected finite seconds of at least 0")

    def spilled(stage: Stage) -> Variant | None:
        here = tuple(i for i in stage.saves if i in stage.extras)
        away = tuple(dict.fromkeys(i for i in stage.saves if i not in stage.extras))
        moved_bytes = sum(chain.storages[i] for i in away)
        if not moved_bytes:
            return None
        seconds = (1.0 - overlap) * (moved_bytes / bytes_per_s + len(away) * latency_s)
        return Variant(name, here, stage.forward_s + seconds, stage.backward_s + seconds, away)

    return replace(chain, stages=_with_option(chain, spilled))


def _with_option(chain: Chain, option: Callable[[Stage], Variant | None]) -> tuple[Stage, ...]:
    """The stages, each recomputable one with what `option` makes for it, if anything."""
    stages = []
    for stage in chain.stages:
        variant = option(stage) if stage.recomputable else None
        stages.append(stage if variant is None else replace(stage, variants=(*stage.variants, variant)))
    return tuple(stages)


def _check(bytes_per_s: float, overlap: float) -> None:
    if not bytes_per_s > 0:
        raise ValueError(f"bytes_per_s is {bytes_per_s!r}; expected more than 0")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}; expected 0 to 1")
