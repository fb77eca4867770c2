"""The largest size that fits, where every answer to "what does it need?" costs a measurement."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_fitting"]

_MOST_LINES = 12  # answers after which lines have not helped, and the rest is halved


def largest_fitting(
    need: Callable[[int], int], budget_bytes: int, fixed_bytes: int, start: int, *, limit: int, step: int = 1
) -> int:
    """The largest multiple of `step` up to `limit` whose `need(size)` is at most `budget_bytes`; 0 if not even `step` fits.

    `need` grows with the size, about in proportion beyond `fixed_bytes`, and is asked a handful of times: guesses lie on the line
    through the two nearest answers, and both the answer and the size after it are asked for, unless that is beyond the limit.

    >>> asked = []
    >>> largest_fitting(lambda n: asked.append(n) or 100 + 7 * n, 1000, 100, 1, limit=10**6), asked
    (128, [1, 128, 129])
    """
    known = {0: fixed_bytes}
    low, high = 0, limit // step + 1  # in steps: what fits, and what does not or is not allowed
    guess = max(1, start // step)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = need(guess * step)
        if known[guess] <= budget_bytes:
            low = guess
        else:
            high = guess
        if len(known) > _MOST_LINES:
            guess = (low + high) // 2
            continue
        below, above = _nearest(known, low, high)
        slope = (known[above] - known[below]) / (above - below)
        guess = low + int((budget_bytes - known[low]) / slope) if slope > 0 else high - 1
        guess += guess == low  # the line says that nothing more fits: ask
    return low * step


def _nearest(known: dict[int, int], low: int, high: int) -> tuple[int, int]:
    """Two known sizes for a line: on both sides of the answer, or the last two below it."""
    if high in known:
        return low, high
    below = sorted(size for size in known if size <= low)
    return (below[-2], below[-1]) if len(below) > 1 else (below[-1], max(known))
