"""What this thread is doing: which records it writes, which one it reads, and that it does neither."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from gpuckpt.errors import RecomputeMismatch

__all__ = [
    "by_hand",
    "in_checkpoint",
    "is_open",
    "is_recomputing",
    "open_records",
    "paused",
    "reader",
    "reading",
    "recording",
]

_current = (
    threading.local()
)  # `open`: weak references to records that this thread writes; `reader`: one to what it reads


class Writable(Protocol):
    """A record, as this module knows it; see record.py."""

    choices: list[Any]
    fates: list[Any]


class recording:
    """Within the context, work of this thread writes `records`, besides those that it writes already. The thread refers to them
    weakly: Ctrl-C can end `__exit__` before its first line."""

    __slots__ = ("_before", "_records")

    def __init__(self, *records: Writable) -> None:
        self._records = records

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ())
        _current.open = self._before + tuple(map(weakref.ref, self._records))

    def __exit__(self, *error: object) -> None:
        _current.open = self._before


class reading:
    """Within the context, work of this thread is run again, and reads `record` from its beginning."""

    __slots__ = ("__weakref__", "_before", "_next", "_next_fates", "record")

    def __init__(self, record: Writable) -> None:
        self.record = record
        self._next = self._next_fates = 0

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ()), getattr(_current, "reader", None)
        _current.open, _current.reader = (), weakref.ref(self)

    def __exit__(self, *error: object) -> None:
        _current.open, _current.reader = self._before

    def next_choice(self) -> Any:
        """The next of the record's choices. Raises `RecomputeMismatch` where forward made no more."""
        choices = self.record.choices
        if self._next == len(choices):
            raise RecomputeMismatch(
                f"checkpointed work called once() {len(choices)} times in forward and more often when it was run again; it must "
                "do the same both times"
            )
        self._next += 1
        return choices[self._next - 1]

    def next_fates(self) -> Any:
        """Those of the next checkpoint within; None where forward had no more."""
        self._next_fates += 1
        return self.record.fates[self._next_fates - 1] if self._next_fates <= len(self.record.fates) else None


class paused:
    """Within the context, this thread neither writes records nor reads one: what runs is no part of the recorded work."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = getattr(_current, "open", ()), getattr(_current, "reader", None)
        _current.open, _current.reader = (), None

    def __exit__(self, *error: object) -> None:
        _current.open, _current.reader = self._before


class by_hand:
    """Within the context, code of this thread runs in a call of `checkpoint`, with gradients or without."""

    __slots__ = ()

    def __enter__(self) -> None:
        _current.depth = getattr(_current, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        _current.depth -= 1


def in_checkpoint() -> bool:
    """Whether the calling code is part of a call of `checkpoint`: what is saved there is that call's affair, and no plan's."""
    return getattr(_current, "depth", 0) > 0


def open_records() -> Sequence[Any]:
    """The records that this thread writes, outermost first."""
    return [record for ref in getattr(_current, "open", ()) if (record := ref()) is not None]


def is_open(record: Writable) -> bool:
    """Whether this thread writes `record`."""
    return any(ref() is record for ref in getattr(_current, "open", ()))


def reader() -> reading | None:
    """What this thread reads; None where it runs nothing again."""
    ref = getattr(_current, "reader", None)
    return None if ref is None else ref()


def is_recomputing() -> bool:
    """Whether the calling code is being run again in backward, by `checkpoint` or under a plan; False in forward and plain runs.

    >>> import gpuckpt, torch
    >>> seen = []
    >>> def work(x):
    ...     seen.append(is_recomputing())
    ...     return x.sin()
    >>> gpuckpt.checkpoint(work, torch.ones(3, requires_grad=True)).sum().backward()
    >>> seen
    [False, True]
    """
    return reader() is not None
