"""A chain of many equal blocks out of one that has a few of them.

Blocks of a deep network repeat with a period: 1 for most, 6 where every sixth layer attends differently. A model that is cut to a
few periods has the same chain but for the number of repeats. Two periods in a row that are equal, up to the numbers of their
storages, show what one more of them adds; `extend_chain` adds as many as are missing. The result is the chain of the whole model,
to the byte, where the blocks that were left out are like those that were not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain as concatenated
from typing import Any

from gpuckpt.errors import InvalidChain
from gpuckpt.planning.chain import Chain, Stage

__all__ = ["extend_chain", "fewest_blocks", "find_period"]


def find_period(kinds: Sequence[Any]) -> tuple[int, int]:
    """(first, period): from block `first` on, the second or a later one, `kinds[i] == kinds[i + period]`.

    Of all such pairs the one whose second period ends first; (number of blocks, 1) where nothing repeats.

    >>> find_period("abbbbb"), find_period("aaaaabaaaaabaa"), find_period("abcd")
    ((1, 1), (1, 6), (4, 1))
    """
    count = len(kinds)
    found = (count, 1)
    for period in range(1, count // 2 + 1):
        first = count - period
        while first > 1 and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        if first + 2 * period <= min(count, found[0] + 2 * found[1] - 1):
            found = (first, period)
    return found


def fewest_blocks(count: int, first: int, period: int) -> int:
    """How many of `count` blocks have to be measured: two periods, and what no whole number of periods makes up.

    >>> fewest_blocks(80, 1, 1), fewest_blocks(26, 1, 6), fewest_blocks(4, 4, 1)
    (3, 14, 4)
    """
    return min(count, first + 2 * period + (count - first) % period)


def extend_chain(chain: Chain, blocks: str, first: int, period: int, count: int) -> Chain:
    """`chain`, measured with `fewest_blocks(count, first, period)` blocks, with `count` of them.

    `blocks`: how names of their stages begin, up to the block's number ("model.layers." for "model.layers.0").

    Raises `InvalidChain` where the chain's two periods are not alike: what further ones hold cannot be told from them.
    """
    measured = fewest_blocks(count, first, period)
    copies = (count - measured) // period
    if copies == 0:
        return chain
    begin, middle, end = [_stage_of_block(chain, blocks, first + turn * period) for turn in range(3)]
    before, between, after = [_storages_named_by(chain.stages[:stage]) for stage in (begin, middle, end)]
    stride = after - between
    one, two, rest = chain.stages[begin:middle], chain.stages[middle:end], chain.stages[end:]
    pairs = [pair for a, b in zip(one, two, strict=False) for pair in zip(_ids(a), _ids(b), strict=False)]
    shared = {
        b for a, b in pairs if a == b
    }  # masks and the like, also those that the first period was the first to see
    if (
        list(map(_bytes, one)) != list(map(_bytes, two))
        or any(chain.storages[a] != chain.storages[b] for a, b in pairs)
        or any((b >= between) != (a >= before) for a, b in pairs if b not in shared)
        or any(before <= i < between and i not in shared for stage in rest for i in _ids(stage))
    ):
        raise InvalidChain(f"{chain.name}: blocks {blocks}* from {first} on do not repeat with a period of {period}")
    number = re.compile(rf"(?<![\w.]){re.escape(blocks)}(\d+)")

    def later(stage: Stage, turns: int) -> Stage:
        def renumbered(found: re.Match[str]) -> str:
            block = int(found[1])
            return f"{blocks}{block + turns * period if block >= first else block}"

        moved = _with_ids(stage, lambda i: i if i < before or i in shared else i + turns * stride)
        return replace(moved, name=number.sub(renumbered, stage.name))

    stages = [*chain.stages[:end]]
    for turn in range(1, copies + 1):
        stages += [later(stage, turn) for stage in two]
    stages += [later(stage, copies) for stage in rest]
    storages = (*chain.storages[:after], *chain.storages[between:after] * copies, *chain.storages[after:])
    return replace(chain, stages=tuple(stages), storages=storages)


def _stage_of_block(chain: Chain, blocks: str, block: int) -> int:
    """The first stage of a block; of the block after the last, the stage after all of theirs."""
    own = re.compile(rf"{re.escape(blocks)}{block}(?!\d)")
    found = next((number for number, stage in enumerate(chain.stages) if own.match(stage.name)), None)
    if found is None:
        found = max(
            (number + 1 for number, stage in enumerate(chain.stages) if stage.name.startswith(blocks)), default=None
        )
    if found is None:
        raise InvalidChain(f"{chain.name}: no stage is called {blocks}*")
    return found


def _ids(stage: Stage) -> list[int]:
    of_variants = [v.ids for v in stage.variants]
    return [*stage.saves, *stage.inputs, *stage.extras, *stage.output, *concatenated.from_iterable(of_variants)]


def _storages_named_by(stages: Sequence[Stage]) -> int:
    """One more than the highest id that these stages name: ids are given as storages are first seen."""
    return max((i + 1 for stage in stages for i in _ids(stage)), default=0)


def _with_ids(stage: Stage, moved: Callable[[int], int]) -> Stage:
    def each(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(moved, ids))

    variants = [v.renamed(each) for v in stage.variants]
    return replace(
        stage,
        saves=each(stage.saves),
        inputs=each(stage.inputs),
        extras=each(stage.extras),
        output=each(stage.output),
        variants=tuple(variants),
    )


def _bytes(stage: Stage) -> tuple[object, ...]:
    counts = tuple(map(len, (stage.saves, stage.inputs, stage.extras, stage.output)))
    variants = [(v.name, len(v.saves), len(v.spilled), len(v.remade), len(v.remade_later)) for v in stage.variants]
    return (
        counts,
        variants,
        stage.output_bytes,
        stage.workspace_bytes,
        stage.gradients_bytes,
        stage.again_bytes,
        stage.recomputable,
    )
