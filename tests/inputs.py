"""Inputs of every kind: what each parameter of a public call does with values that it was not made for.

A call ends in a result or in an error of ours, `TypeError` or `ValueError` that names the parameter, within seconds.
`MemoryError` is right for more bytes than a machine has.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from gpuckpt.errors import CheckpointError
from gpuckpt.memory import Budget

SECONDS = 60  # far more than any of them takes, on a machine with other work, traced line by line


def closed_budget() -> Budget:
    budget = Budget(1000, device="cpu")
    budget.close()
    return budget


# Made anew for each call: some are used up, or would be changed.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "2**63": lambda: 2**63,
    "-(2**200)": lambda: -(2**200),
    "10**400": lambda: 10**400,
    "1j": lambda: 1j,
    "Fraction": lambda: Fraction(1, 3),
    "Decimal NaN": lambda: Decimal("NaN"),
    "np.int64": lambda: np.int64(3),
    "np.float32": lambda: np.float32(0.5),
    "np.float64 NaN": lambda: np.float64("nan"),
    "np.bool_": lambda: np.bool_(True),
    "empty string": lambda: "",
    "a word": lambda: "bogus",
    "zeros and surrogates": lambda: "\x00\ud800",
    "a number in a string": lambda: "9" * 5000,
    "10^6 characters": lambda: "x" * 10**6,
    "bytes": lambda: b"32MiB",
    "[]": list,
    "()": tuple,
    "{}": dict,
    "set()": set,
    "[[[]]]": lambda: [[[]]],
    "[None]": lambda: [None],
    "[-1, 2**70]": lambda: [-1, 2**70],
    "{'a': {'b': None}}": lambda: {"a": {"b": None}},
    "10^6 numbers": lambda: [0] * 10**6,
    "a generator": lambda: (i for i in range(3)),
    "object()": object,
    "a function": lambda: len,
    "a type": lambda: int,
    "an exception": lambda: ValueError("x"),
    "0-d array": lambda: np.array(3),
    "empty array": lambda: np.zeros((0, 3)),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "0-d tensor": lambda: torch.tensor(2.0),
    "empty tensor": lambda: torch.zeros(0, 8),
    "integer tensor": lambda: torch.ones(3, dtype=torch.int8),
    "tensor on meta": lambda: torch.empty(4, 8, device="meta"),
    "complex tensor": lambda: torch.zeros(4, 8, dtype=torch.complex64),
    "sparse tensor": lambda: torch.eye(8).to_sparse(),
    "NaN tensor": lambda: torch.full((4, 8), float("nan")),
    "a closed budget": closed_budget,
    "a module": torch.nn.Identity,
}


OWN = "."
"""The words for a parameter that is user code's own: what that raises passes through."""


class TooLong(BaseException):
    """Not an `Exception`, which the code at hand might catch."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise `TooLong` after so many seconds; main thread only."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[..., Any], good: Mapping[str, Any], name: str, value: Any, words: str) -> str | None:
    """None where the call ends as it should with `value` for the parameter `name`, and else what was wrong.

    `good`: arguments that work, or functions without arguments that make them. `words`: a pattern for the parameter's name in
    errors.
    """
    arguments = {key: made() if isinstance(made, Make) else made for key, made in good.items()}
    arguments[name] = value
    try:
        with within(SECONDS):
            call(**arguments)
    except TooLong:
        return f"is not done after {SECONDS} s"
    except (CheckpointError, TypeError, ValueError, MemoryError) as error:
        text = str(error)
        if len(text) > 2000:
            return f"{type(error).__name__} with a message of {len(text)} characters: {text[:100]}..."
        if not isinstance(error, MemoryError) and not re.search(words, text):
            return f"{type(error).__name__} does not name it: {text[:200]}"
    except Exception as error:
        if words != OWN:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return None


class Make:
    """An argument that each call gets a new one of."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        return self.make()


class Call:
    """A public call, with arguments that work."""

    def __init__(self, call: Callable[..., Any], /, *, names: Mapping[str, str] | None = None, **good: Any) -> None:
        self.call = call
        self.good = good
        self.names = dict(names or {})  # other words by which errors may call a parameter

    def works(self) -> None:
        """The arguments do work, or nothing would be learned from others."""
        self.call(**{key: made() if isinstance(made, Make) else made for key, made in self.good.items()})

    def check(self, parameter: str) -> None:
        """Fail with a list of all values that do not end as they should."""
        own = self.names.get(parameter) == OWN
        words = OWN if own else rf"\b{parameter}\b" + (f"|{self.names[parameter]}" if parameter in self.names else "")
        found = {}
        for title, make in VALUES.items():
            wrong = outcome(self.call, self.good, parameter, make(), words)
            if wrong is not None:
                found[title] = wrong
        if found:
            pytest.fail(
                f"{parameter}: " + "".join(f"\n  {title}: {wrong}" for title, wrong in found.items()), pytrace=False
            )


def rows_of(calls: Mapping[str, Call]) -> list[Any]:
    """Every parameter of every call, for `pytest.mark.parametrize("call, parameter", ...)`."""
    return [
        pytest.param(call, parameter, id=f"{name}-{parameter}")
        for name, call in calls.items()
        for parameter in call.good
    ]
