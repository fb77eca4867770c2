"""Byte counts as people write them.

Binary units (KiB, MiB, GiB, TiB, PiB) are powers of 1024, decimal units (kB, MB, GB, TB, PB) powers of 1000, "B" and
no unit mean bytes. What does not come out as a whole number of bytes is refused: a cap is exact or it is no cap.
"""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import SupportsIndex

from gpuckpt.checks import check_int, shown

__all__ = ["format_bytes", "parse_bytes"]

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE | re.ASCII)
_MOST_BYTES = 2**63 - 1  # what an address space, CuPy and NumPy's integers can count
_MOST_CHARACTERS = 100
_EXAMPLES = 'write an int, or a string such as "256MiB", "1.5GiB" or "1GB" (10^9)'


def parse_bytes(size: SupportsIndex | str, name: str = "size") -> int:
    """Bytes in `size`: an int, or a number with a unit ("256MiB", "1.5GiB", "1GB" = 10^9; case does not matter).

    `name`: what errors call it. Raises `TypeError` for what is neither an integer nor a string (True, 1.5, None), `ValueError`
    for a negative count, one above 2^63 - 1, an unknown unit, or a fraction of a byte.

    >>> parse_bytes("1.5GiB"), parse_bytes("1GB"), parse_bytes(7)
    (1610612736, 1000000000, 7)
    """
    if isinstance(size, str):
        nbytes = _parse_text(size, name)
    elif isinstance(size, bool):
        raise TypeError(f"{name}: a size in bytes was expected, got {size!r}; {_EXAMPLES}")
    else:
        try:
            nbytes = operator.index(size)
        except (TypeError, ValueError, RuntimeError):  # arrays and tensors have an __index__ that may fail
            what = f"{shown(size)} ({type(size).__name__})"
            raise TypeError(f"{name}: a size in bytes was expected, got {what}; {_EXAMPLES}") from None
    if nbytes < 0:
        raise ValueError(f"{name}: a size in bytes cannot be negative, got {shown(nbytes)}")
    if nbytes > _MOST_BYTES:
        raise ValueError(f"{name}: {shown(size)} is more than 2^63 - 1 bytes, which nothing can hold")
    return nbytes


def _parse_text(text: str, name: str) -> int:
    match = _SIZE.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
    if match is None:
        raise ValueError(f"{name}: {shown(text)} is not a size in bytes; {_EXAMPLES}")
    unit = match["unit"]
    factor = _FACTORS.get(unit.lower())
    if factor is None:
        raise ValueError(
            f"{name}: {text!r} has the unknown unit {unit!r}; known are B, kB to PB (1000s) and KiB to PiB (1024s)"
        )
    exact = Fraction(match["number"].replace("_", "")) * factor
    if exact.denominator != 1:
        raise ValueError(f"{name}: {text!r} is {float(exact)} bytes, not a whole number of them; {_EXAMPLES}")
    return int(exact)


def format_bytes(nbytes: int) -> str:
    """`nbytes` with a binary unit and at most two decimals: 1610612736 is "1.5 GiB". For reading, not for parsing back.

    Raises `TypeError` for what is no integer.

    >>> format_bytes(1610612736)
    '1.5 GiB'
    """
    if type(nbytes) is not int:
        nbytes = check_int(nbytes, "nbytes", None)
    sign, size = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    if size < 1024:
        return f"{sign}{size} B"
    # A value that would print as 1024 of its unit takes the next one.
    power = min((size.bit_length() - 1) // 10, 5)
    if power < 5 and round(size / 1024**power, 2) >= 1024:
        power += 1
    if size >= 1024**8:
        return f"{sign}{size // 1024**5} PiB" if size < 1024**20 else f"{sign}2^{size.bit_length() - 1} B"
    scaled = f"{size / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{sign}{scaled} {'KMGTP'[power - 1]}iB"
