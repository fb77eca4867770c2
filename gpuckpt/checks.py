"""Checks of parameters: each names the parameter, and says what was given and what was expected."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

__all__ = ["check_choice", "check_flag", "check_function", "check_int", "check_number", "check_sequence", "shown"]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: object) -> str:
    """`repr(value)` for a message: on one line, of bounded length, and there even where `repr` fails.

    >>> shown([1, "a"]), shown("x" * 10**6)[:8], shown(10**5000)
    ("[1, 'a']", "'xxxxxxx", 'an int')
    """
    try:
        text = " ".join(_short.repr(value).split())
    except Exception:  # an int of more than 4300 digits, or an object whose own repr is broken
        name = type(value).__name__
        return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_int(value: object, name: str, least: int | None = 0, most: int | None = None) -> int:
    """`value` as an int of at least `least` and at most `most`; NumPy's integers are ints, and bools are not.

    Raises `TypeError` for what is no int, `ValueError` for one out of bounds.

    >>> check_int(3, "repeats", 1)
    3
    """
    expected = "an int" + (f" of at least {least}" if least is not None else "") + (f", at most {most}" if most else "")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # or an array, whose __index__ fails
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)} ({type(value).__name__}); expected {expected}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name} is {shown(value)}; expected {expected}")
    return number


def check_number(value: object, name: str, least: float = 0.0, most: float = math.inf) -> float:
    """`value` as a float from `least` to `most`. Raises `TypeError` for what is no number, `ValueError` for NaN and others.

    >>> check_number(0.5, "overlap", 0.0, 1.0)
    0.5
    """
    expected = f"a number from {least:g} to {most:g}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)} ({type(value).__name__}); expected {expected}")
    try:
        number = float(value)
    except OverflowError:
        number = math.nan
    if not least <= number <= most:
        raise ValueError(f"{name} is {shown(value)}; expected {expected}")
    return number


def check_choice(value: object, name: str, choices: Sequence[Any]) -> None:
    """Raise `ValueError` where `value` is none of `choices`, which are strings or None.

    >>> check_choice("pool", "hold", ("account", "pool"))
    """
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, choices))}")


def check_function(value: object, name: str) -> None:
    """Raise `TypeError` where `value` is neither callable nor None.

    >>> check_function(None, "allocator")
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} is {shown(value)} ({type(value).__name__}); expected a function, or None")


def check_flag(value: object, name: str) -> None:
    """Raise `TypeError` where `value` is neither True nor False.

    >>> check_flag(True, "strict")
    """
    if value is not True and value is not False:
        raise TypeError(f"{name} is {shown(value)} ({type(value).__name__}); expected True or False")


def check_sequence(value: Any, name: str, kind: type, expected: str) -> list[Any]:
    """The elements of `value`, all of them of `kind`. Raises `TypeError` for what is no container, and for another element.

    >>> check_sequence((1, 2), "numbers", int, "ints in a sequence")
    [1, 2]
    """
    try:
        found = list(value)
    except (TypeError, NotImplementedError):  # the second: a tensor without elements in memory
        raise TypeError(f"{name} is {shown(value)}; expected {expected}") from None
    for number, each in enumerate(found):
        if not isinstance(each, kind):
            raise TypeError(f"{name}[{number}] is {shown(each)}; expected a {kind.__name__}")
    return found
