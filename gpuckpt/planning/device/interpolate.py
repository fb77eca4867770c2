"""A chain for a size that was not measured, from chains of the same model for others.

What a network saves grows with the batch in proportion, and with the length of its samples like a polynomial of degree 2 (scores
and masks of attention are length x length). Through two measured batches or three measured lengths there is one such polynomial
for each number of bytes; what it says is exact where the model does follow it. Whoever uses the result measures it once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod

from gpuckpt.planning.chain import Chain

__all__ = ["chain_at"]


def chain_at(size: int, sizes: Sequence[int], chains: Sequence[Chain]) -> Chain | None:
    """The chain for `size`, by the polynomials through `chains`, measured for `sizes`; seconds are those of the last chain.

    None where the chains do not have the same stages, or a polynomial has no whole number of bytes for this size.
    """
    last = chains[-1]
    if any(_structure(chain) != _structure(last) for chain in chains):
        return None
    weights = [
        prod((Fraction(size - other, own - other) for other in sizes if other != own), start=Fraction(1))
        for own in sizes
    ]
    known: dict[tuple[int, ...], int | None] = {}

    def at(values: tuple[int, ...]) -> int | None:
        if values not in known:
            exact = sum((weight * value for weight, value in zip(weights, values, strict=True)), start=Fraction(0))
            known[values] = int(exact) if exact.denominator == 1 and exact >= 0 else None
        return known[values]

    sizes_now = [at(values) for values in zip(*(chain.storages for chain in chains), strict=True)]
    stages = []
    for stage, *alike in zip(last.stages, *(chain.stages for chain in chains), strict=True):
        found = [at(tuple(getattr(each, name) for each in alike)) for name in _COUNTED]
        if None in found:
            return None
        stages.append(replace(stage, **dict(zip(_COUNTED, found, strict=True))))
    storages = [size for size in sizes_now if size is not None]
    if len(storages) < len(sizes_now):
        return None
    return replace(last, stages=tuple(stages), storages=tuple(storages))


_COUNTED = ("output_bytes", "workspace_bytes", "gradients_bytes", "again_bytes")


def _structure(chain: Chain) -> list[object]:
    return [len(chain.storages), *((stage.name, stage.ids) for stage in chain.stages)]
