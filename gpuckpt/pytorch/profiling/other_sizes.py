"""What a model saves with inputs of a size that was never measured, from what it saved with others.

Nearly everything that a network saves is as large as a product of its inputs' dimensions: batch x length x width for an
activation, batch x length x length for the scores of plain attention, length alone for a mask that all rows share. Which product
it is follows from two or three measured sizes, exactly: of each storage all laws are tried that explain every measurement to the
byte, and a size is predicted only where they agree. Where no product explains a storage, it may be padded (a kernel that rounds
lengths up to 32), have a token more or less (a class token, shifted labels) or a part that grows otherwise: such laws are
believed when three measurements follow them.

A prediction is exact where the model does with the new size what it did with the others. Whether it did is seen when the step
runs: the ledger is held against the promise as ever.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from gpuckpt.planning import Chain, Stage
from gpuckpt.pytorch.profiling.runner import Measured

__all__ = ["Observed", "predict", "without_sizes"]

_MOST_VARIABLES = 3
_POWERS = (0, 1, 2)
_PADDINGS = (8, 16, 32, 64, 128)
_SHIFTS = (-2, -1, 1, 2)
_ENOUGH = 3  # measurements, for laws that two would not tell apart from others


class Observed(NamedTuple):
    """A measured model, and the sizes of what it was called with."""

    sizes: tuple[int, ...]
    measured: Measured


def without_sizes(description: Any) -> tuple[Any, tuple[int, ...]]:
    """A call's description (see signature.py) without the sizes of its tensors, and those sizes in order. A size of 0 or 1 stays:
    what is empty or broadcast often takes another way through a model."""
    sizes: list[int] = []

    def walk(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        if len(value) > 1 and isinstance(value[0], torch.Size):
            shape, strides, *rest = value
            sizes.extend(size for size in shape if size > 1)
            few = tuple([size if size <= 1 else None for size in shape])
            return few, "contiguous" if strides == _contiguous(shape) else strides, *rest
        return tuple([walk(item) for item in value])

    return walk(description), tuple(sizes)


def predict(observed: Sequence[Observed], sizes: tuple[int, ...]) -> Measured | None:
    """The model as it would be measured with inputs of these sizes; None where the measurements do not tell.

    Bytes of storages are exact if the laws are; seconds and temporaries are those of the most similar measurement, in proportion.
    """
    observed = _with_common_options(observed)
    first, *others = [
        (_structure(each.measured.chain), each.measured.modules, each.measured.owned, each.measured.random)
        for each in observed
    ]
    variables = _variables([*(each.sizes for each in observed), sizes])
    if any(other != first for other in others) or variables is None:
        return None
    laws = _Laws([values[:-1] for values in variables], [values[-1] for values in variables])
    chains = [each.measured.chain for each in observed]
    storages = laws.sizes([chain.storages for chain in chains])
    again = laws.sizes([[stage.again_bytes for stage in chain.stages] for chain in chains])
    if storages is None or again is None:
        return None
    nearest = min(
        observed, key=lambda each: abs(math.log((1 + sum(storages)) / (1 + sum(each.measured.chain.storages))))
    )
    chain = nearest.measured.chain
    ratio = sum(storages) / max(1, sum(chain.storages))
    stages = [_scaled(stage, ratio, nbytes) for stage, nbytes in zip(chain.stages, again, strict=True)]
    return replace(nearest.measured, chain=replace(chain, stages=tuple(stages), storages=tuple(storages)))


def _scaled(stage: Stage, ratio: float, again_bytes: int) -> Stage:
    """With what no ledger holds in proportion: seconds, temporaries, gradients."""
    return replace(
        stage,
        forward_s=stage.forward_s * ratio,
        backward_s=stage.backward_s * ratio,
        tail_s=stage.tail_s * ratio,
        workspace_bytes=math.ceil(stage.workspace_bytes * ratio),
        gradients_bytes=math.ceil(stage.gradients_bytes * ratio),
        output_bytes=math.ceil(stage.output_bytes * ratio),
        again_bytes=again_bytes,
        variants=tuple(
            [
                replace(v, forward_s=v.forward_s * ratio, backward_s=v.backward_s * ratio, again_s=v.again_s * ratio)
                for v in stage.variants
            ]
        ),
    )


def _with_common_options(observed: Sequence[Observed]) -> list[Observed]:
    """Of each stage only options that it was offered at all sizes: what is cheap to bring back depends on them."""
    counts = {len(each.measured.chain) for each in observed}
    if len(counts) > 1:
        return list(observed)
    chains = [each.measured.chain for each in observed]
    common = [
        set.intersection(*[{(v.name, v.ids) for v in stage.variants} for stage in stages])
        for stages in zip(*[chain.stages for chain in chains], strict=True)
    ]
    found = []
    for each in observed:
        stages = [
            replace(stage, variants=tuple([v for v in stage.variants if (v.name, v.ids) in names]))
            for stage, names in zip(each.measured.chain.stages, common, strict=True)
        ]
        chain = replace(each.measured.chain, stages=tuple(stages))
        found.append(Observed(each.sizes, replace(each.measured, chain=chain)))
    return found


def _structure(chain: Chain) -> list[Any]:
    """What of a chain does not depend on sizes."""
    return [
        len(chain.storages),
        *((stage.name, stage.recomputable, stage.dropped_in, stage.ids) for stage in chain.stages),
    ]


def _variables(rows: list[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """What varies from row to row; dimensions that are always equal are one variable. None for too many, or empty inputs."""
    varying = {column: None for column in zip(*rows, strict=True) if len(set(column)) > 1}
    return list(varying) if len(varying) <= _MOST_VARIABLES else None


class _Laws:
    """How sizes may depend on the variables: `before`, of each variable its values in the measurements, and `now`."""

    def __init__(self, before: Sequence[tuple[int, ...]], now: Sequence[int]) -> None:
        self._count = len(before[0]) if before else 1
        rows = [*zip(*before, strict=True), tuple(now)] if before else [(), ()]
        self._products = list(_products(rows))
        others = [[tuple([-(-size // unit) * unit for size in row]) for row in rows] for unit in _PADDINGS]
        others += [
            [tuple([size + shift * (n == column) for n, size in enumerate(row)]) for row in rows]
            for column in range(len(rows[0]))
            for shift in _SHIFTS
        ]
        self._others = [law for other in others for law in _products(other)]
        self._known: dict[tuple[int, ...], int | None] = {}

    def sizes(self, measured: Sequence[Sequence[int]]) -> list[int] | None:
        """For each item its size now; None if there is one that the measurements do not tell."""
        found: list[int] = []
        for before in zip(*measured, strict=True):
            if before not in self._known:
                self._known[before] = self._size(before)
            size = self._known[before]
            if size is None:
                return None
            found.append(size)
        return found

    def _size(self, before: tuple[int, ...]) -> int | None:
        if not any(before):
            return 0
        proportional = list(_proportional(self._products, before))
        if proportional or self._count < _ENOUGH:
            return _agreed(proportional)
        return _agreed([*_proportional(self._others, before), *_two_terms(self._products, before)])


def _products(rows: list[tuple[int, ...]]) -> Iterator[list[int]]:
    """Each product of powers of the variables, row by row."""
    for powers in itertools.product(_POWERS, repeat=len(rows[0])):
        yield [math.prod(size**power for size, power in zip(row, powers, strict=True)) for row in rows]


def _proportional(laws: Sequence[list[int]], before: tuple[int, ...]) -> Iterator[Fraction]:
    """What each law says where the measured sizes are in proportion to it."""
    for *law, now in laws:
        if not law[0]:
            continue
        factor = Fraction(before[0], law[0])
        if all(size == factor * value for size, value in zip(before, law, strict=True)):
            yield factor * now


def _two_terms(laws: Sequence[list[int]], before: tuple[int, ...]) -> Iterator[Fraction]:
    """The same for sums of two laws."""
    for (*one, one_now), (*two, two_now) in itertools.combinations(laws, 2):
        last = next((n for n in range(1, len(before)) if one[0] * two[n] != one[n] * two[0]), None)
        if last is None:
            continue
        divisor = one[0] * two[last] - one[last] * two[0]
        a = before[0] * two[last] - before[last] * two[0]
        b = before[last] * one[0] - before[0] * one[last]
        if all(size * divisor == a * x + b * y for size, x, y in zip(before, one, two, strict=True)):
            yield Fraction(a * one_now + b * two_now, divisor)


def _agreed(sizes: Sequence[Fraction]) -> int | None:
    """The size that all laws name, if it is one."""
    if len(set(sizes)) != 1 or sizes[0].denominator != 1 or sizes[0] < 0:
        return None
    return int(sizes[0])


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple([math.prod([max(1, size) for size in shape[n + 1 :]]) for n in range(len(shape))])
