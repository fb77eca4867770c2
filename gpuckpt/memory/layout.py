"""Where each array of a planned step lies: offsets in one slab, computed before the step from its sequence of allocs and frees.

Best fit with immediate merging of free neighbours, over a slab that grows when nothing fits. Where lifetimes nest (saved in
forward order, freed in reverse) there is never a gap below the top, so the slab is exactly the peak: no fragmentation. For
other sequences a second layout is tried (largest first, each at the lowest offset that is free over its lifetime: Pisarchyk
and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020), and the smaller slab is taken; finding the smallest
one of all is NP-hard and not attempted.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable
from typing import NamedTuple

__all__ = ["Slab", "lay_out"]

_LARGEST_FIRST_UP_TO = 4000  # arrays; it compares each with all others


class Slab(NamedTuple):
    """A layout. `offsets` and `sizes` in bytes, by id; sizes are rounded up to the unit. `peak_bytes` is the most that is alive
    at once: no layout can be smaller, and `size_bytes` equals it where lifetimes nest."""

    size_bytes: int
    peak_bytes: int
    offsets: dict[Hashable, int]
    sizes: dict[Hashable, int]


def lay_out(sequence: Iterable[tuple[object, ...]], *, unit_bytes: int = 1) -> Slab:
    """The layout of `("alloc", id, nbytes)` and `("free", id)` in the order in which they happen.

    `unit_bytes`: 512 on CUDA, as `CheckpointBudget.unit_bytes`. What is never freed lives to the end. Raises `ValueError` for an
    id that is allocated twice, freed before it is allocated, or for a size that is no count of bytes.
    """
    sizes, births, deaths, peak_bytes = _lifetimes(sequence, unit_bytes)
    offsets, size_bytes = _best_fit(sizes, births, deaths)
    if peak_bytes < size_bytes and len(sizes) <= _LARGEST_FIRST_UP_TO:
        others, other_bytes = _largest_first(sizes, births, deaths)
        if other_bytes < size_bytes:
            offsets, size_bytes = others, other_bytes
    return Slab(size_bytes, peak_bytes, offsets, sizes)


Sizes = dict[Hashable, int]


def _lifetimes(sequence: Iterable[tuple[object, ...]], unit_bytes: int) -> tuple[Sizes, Sizes, Sizes, int]:
    """Rounded sizes, first and last instant of each id, and the peak of what is alive."""
    sizes: Sizes = {}
    births: Sizes = {}
    deaths: Sizes = {}
    alive_bytes = peak_bytes = 0
    at = 0
    for at, step in enumerate(sequence):
        kind, name = step[0], step[1]
        if kind == "alloc" and len(step) == 3:
            nbytes = step[2]
            if not isinstance(nbytes, int) or nbytes < 0:
                raise ValueError(f"step {at} allocates {nbytes!r} bytes for {name!r}; a count of bytes was expected")
            if name in sizes:
                raise ValueError(f"step {at} allocates {name!r} a second time; give every allocation an id of its own")
            sizes[name] = -(-nbytes // unit_bytes) * unit_bytes
            births[name] = at
            alive_bytes += sizes[name]
            peak_bytes = max(peak_bytes, alive_bytes)
        elif kind == "free" and len(step) == 2:
            if name not in sizes or name in deaths:
                raise ValueError(f"step {at} frees {name!r}, which is not alive then")
            deaths[name] = at
            alive_bytes -= sizes[name]
        else:
            raise ValueError(f'step {at} is {step!r}; ("alloc", id, nbytes) or ("free", id) was expected')
    for name in sizes:
        deaths.setdefault(name, at + 1)
    return sizes, births, deaths, peak_bytes


def _best_fit(sizes: Sizes, births: Sizes, deaths: Sizes) -> tuple[Sizes, int]:
    instants = sorted([(at, True, name) for name, at in births.items()] + [(at, False, name) for name, at in deaths.items()],
                      key=lambda instant: instant[0])  # fmt: skip
    offsets: Sizes = {}
    gaps: list[tuple[int, int]] = []  # (offset, size) below the top, by offset, never adjacent
    top = size_bytes = 0
    for _, born, name in instants:
        nbytes = sizes[name]
        if not nbytes:
            offsets[name] = 0
        elif born:
            fitting = [gap for gap in gaps if gap[1] >= nbytes]
            if fitting:
                offset, room = min(fitting, key=lambda gap: (gap[1], gap[0]))
                gaps.remove((offset, room))
                if room > nbytes:
                    insort(gaps, (offset + nbytes, room - nbytes))
            else:
                offset, top = top, top + nbytes
                size_bytes = max(size_bytes, top)
            offsets[name] = offset
        else:
            top = _release(gaps, offsets[name], nbytes, top)
    return offsets, size_bytes


def _release(gaps: list[tuple[int, int]], offset: int, nbytes: int, top: int) -> int:
    """Put a range back among the gaps, merged with its neighbours; returns the new top."""
    for gap in [gap for gap in gaps if gap[0] + gap[1] == offset or gap[0] == offset + nbytes]:
        gaps.remove(gap)
        offset, nbytes = min(offset, gap[0]), nbytes + gap[1]
    if offset + nbytes == top:
        return offset
    insort(gaps, (offset, nbytes))
    return top


def _largest_first(sizes: Sizes, births: Sizes, deaths: Sizes) -> tuple[Sizes, int]:
    offsets: Sizes = {}
    placed: list[tuple[int, int, Hashable]] = []  # (offset, end, id), by offset
    for name in sorted(sizes, key=lambda name: (-sizes[name], births[name])):
        nbytes, offset = sizes[name], 0
        if nbytes:
            for start, end, other in placed:
                if births[other] < deaths[name] and births[name] < deaths[other] and end > offset:
                    if start - offset >= nbytes:
                        break
                    offset = end
            placed.append((offset, offset + nbytes, name))
            placed.sort(key=lambda place: place[:2])
        offsets[name] = offset
    return offsets, max((end for _, end, _ in placed), default=0)
