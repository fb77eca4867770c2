"""Weights from a 64-bit linear congruential generator, in any number of them at once.

    state <- state * 6364136223846793005 + 1442695040888963407  (mod 2^64)

The multiplier is Knuth's for MMIX. n steps of an LCG are one affine map, (a, c)^n, so a block of states yields the next
block with one multiplication and one addition per state: the stream is the sequential one, bit for bit.

It is made for repeatable tests and examples. It is not a generator for statistics or for cryptography.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gpuckpt.checks import check_int

__all__ = ["lcg_states", "scaled_uniform", "unit_uniform"]

_MULTIPLIER = 6364136223846793005
_INCREMENT = 1442695040888963407
_MASK = (1 << 64) - 1
_BLOCK = 1 << 14
"""States in one block: 128 KiB, which stays in a core's second-level cache."""


def _blocks(seed: int, count: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Yield (start, states start..start + len) for states 1..count of the stream; a yielded block is overwritten later."""
    if count < 0:
        raise ValueError(f"cannot draw {count} states; the count must not be negative")
    size = min(_BLOCK, count)
    block = np.empty(size, dtype=np.uint64)
    multiplier, increment = _MULTIPLIER, _INCREMENT
    filled = min(1, size)
    if filled:
        block[0] = ((check_int(seed, "seed", None) & _MASK) * _MULTIPLIER + _INCREMENT) & _MASK
    # (multiplier, increment) always jumps `filled` steps ahead; squaring the map doubles the jump.
    while filled < size:
        step = min(filled, size - filled)
        block[filled : filled + step] = block[:step] * np.uint64(multiplier) + np.uint64(increment)
        increment = (increment * multiplier + increment) & _MASK
        multiplier = (multiplier * multiplier) & _MASK
        filled += step
    # `size` is a power of two whenever a second block is needed, so the map is then exactly one block's jump.
    for start in range(0, count, max(size, 1)):
        if start:
            block *= np.uint64(multiplier)
            block += np.uint64(increment)
        yield start, block[: count - start]


def lcg_states(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` states after `seed`, shape (count,)."""
    out = np.empty(count, dtype=np.uint64)
    for start, block in _blocks(seed, count):
        out[start : start + len(block)] = block
    return out


def scaled_uniform(seed: int, in_dim: int, out_dim: int) -> npt.NDArray[np.float32]:
    """Weights in [-limit, limit], limit = sqrt(6 / (in_dim + out_dim)) (Glorot), shape (out_dim, in_dim), float32."""
    limit = np.float32(math.sqrt(6.0 / (in_dim + out_dim)))
    out = np.empty(in_dim * out_dim, dtype=np.float32)
    top = np.float32(2**32 - 1)
    for start, block in _blocks(seed, out.size):
        u = (block >> np.uint64(32)).astype(np.float32) / top
        out[start : start + len(block)] = u * np.float32(2.0) * limit - limit
    return out.reshape(out_dim, in_dim)


def unit_uniform(seed: int, in_dim: int, out_dim: int) -> npt.NDArray[np.float32]:
    """Weights in [0, 1], shape (out_dim, in_dim), float32."""
    out = np.empty(in_dim * out_dim, dtype=np.float32)
    for start, block in _blocks(seed, out.size):
        out[start : start + len(block)] = (block >> np.uint64(33)).astype(np.float32) / np.float32(2**31)
    return out.reshape(out_dim, in_dim)
