"""Further ways to keep a stage, for the solver to choose from.

`with_spill` adds to every stage the option to keep what it saves in host memory. Transfers are synchronous unless `overlap` says
otherwise: a plan may turn out faster than promised, not slower. Spilled bytes are counted again when they come back.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace

from gpuckpt.planning.chain import Chain, Variant

__all__ = ["LINK_BYTES_PER_S", "with_spill"]

LINK_BYTES_PER_S = {
    "pcie-gen3-x16": 15.75e9,
    "pcie-gen4-x16": 31.5e9,
    "pcie-gen5-x16": 63.0e9,
    "nvlink-c2c": 450.0e9,
}
"""Bytes a second between host and device, one way, by the standards' raw rates; pinned copies reach about 80% of them."""


def with_spill(
    chain: Chain,
    bytes_per_s: float,
    *,
    latency_s: float = 0.0,
    overlap: float = 0.0,
    name: str = "spill",
    staying: Container[int] = (),
) -> Chain:
    """The chain with an option for each recomputable stage to keep what it saves in host memory.

    Extras that a stage saves stay: other stages hold them anyway. `bytes_per_s`: of the link, one way; `latency_s`: further
    seconds for each storage, one way; `overlap`: the fraction of each transfer hidden behind other work, 0 to 1; `staying`: ids
    of storages that cannot be moved (parts of sparse or nested tensors).

    >>> from gpuckpt.planning import Stage
    >>> chain = Chain((Stage("a", 1e-3, 2e-3, saves=(0,)),), (63 * 10**6,))
    >>> [option.forward_s for option in with_spill(chain, LINK_BYTES_PER_S["pcie-gen5-x16"]).stages[0].options]
    [0.001, 0.002]
    """
    if not bytes_per_s > 0:
        raise ValueError(f"bytes_per_s is {bytes_per_s!r}; expected more than 0")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}; expected 0 to 1")
    if not 0 <= latency_s < math.inf:
        raise ValueError(f"latency_s is {latency_s!r}; expected finite seconds of at least 0")
    stages = []
    for stage in chain.stages:
        here = tuple(i for i in stage.saves if i in stage.extras or i in staying)
        away = tuple(dict.fromkeys(i for i in stage.saves if i not in here))
        moved_bytes = sum(chain.storages[i] for i in away)
        if stage.recomputable and moved_bytes:
            seconds = (1.0 - overlap) * (moved_bytes / bytes_per_s + len(away) * latency_s)
            variant = Variant(name, here, stage.forward_s + seconds, stage.backward_s + seconds, away)
            stage = replace(stage, variants=(*stage.variants, variant))
        stages.append(stage)
    return replace(chain, stages=tuple(stages))
