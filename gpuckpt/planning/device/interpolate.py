"""A chain for a size that was not measured, from chains of the same model for others.

What a network saves grows with the batch in proportion, and with the length of its samples like a polynomial of degree 2 (scores
and masks of attention are length x length). Through two measured batches or three measured lengths there is one such polynomial
for each number of bytes; what it says is exact where the model does follow it. Whoever uses the result measures it once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, prod

from gpuckpt.planning.chain import Chain

__all__ = ["chain_at"]


def chain_at(size: int, sizes: Sequence[int], chains: Sequence[Chain]) -> Chain | None:
    """The chain for `size`, by the polynomials through `chains`, measured for `sizes`; seconds are those of the last chain. Of
    each stage with the options that all of them have: which are worth offering depends on sizes.

    None where the chains do not have the same stages, or a storage has no whole number of bytes for this size. What stages take
    besides may have a bend (one of two things is larger up to a size, and then the other): it is rounded up, and at least 0.
    """
    last = chains[-1]
    if any(_structure(chain) != _structure(last) for chain in chains):
        return None
    weights = [
        prod((Fraction(size - other, own - other) for other in sizes if other != own), start=Fraction(1))
        for own in sizes
    ]
    known: dict[tuple[int, ...], Fraction] = {}

    def at(*values: int) -> Fraction:
        if values not in known:
            known[values] = sum((w * value for w, value in zip(weights, values, strict=True)), start=Fraction(0))
        return known[values]

    storages = [at(*values) for values in zip(*(chain.storages for chain in chains), strict=True)]
    if any(nbytes.denominator != 1 or nbytes < 0 for nbytes in storages):
        return None
    stages = []
    for stage, *alike in zip(last.stages, *(chain.stages for chain in chains), strict=True):
        counted = {name: max(0, ceil(at(*(getattr(each, name) for each in alike)))) for name in _COUNTED}
        common = set.intersection(*({(v.name, v.ids) for v in each.variants} for each in alike))
        variants = tuple([v for v in stage.variants if (v.name, v.ids) in common])
        stages.append(replace(stage, **counted, variants=variants))
    return replace(last, stages=tuple(stages), storages=tuple(map(int, storages)))


_COUNTED = ("output_bytes", "workspace_bytes", "gradients_bytes", "again_bytes")


def _structure(chain: Chain) -> list[object]:
    held = [(stage.name, stage.saves, stage.inputs, stage.extras, stage.output) for stage in chain.stages]
    return [len(chain.storages), *held]
