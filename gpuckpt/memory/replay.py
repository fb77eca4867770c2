"""`replay(events, budget)`: what a ledger logged, asked of another budget: a user's trace becomes a test.

A log says what was held and when, and nothing of the arrays. So it can be asked of a smaller budget, of one that others use as
well, or of another version of this library, without the model that made it. Refused requests are left out: what a budget refused
was not held. Where the log begins in the middle, what was held before it comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory.budget import Budget
from gpuckpt.memory.ledger import Event

__all__ = ["replay"]

_MORE, _LESS = ("charge", "allocate"), ("release", "free")
_FIELDS = len(Event._fields)


def replay(events: Iterable[Event | list[Any]], budget: Budget) -> int:
    """Hold in `budget`, step by step, what a log says was held. Afterwards it holds what it held before.

    Args:
        events: `budget.events()` of the budget that was traced, or the same rows as JSON gives them back.
        budget: one that counts what it is asked, on any device: nothing is allocated.

    Returns the most bytes that the log held at a time.

    Raises:
        BudgetExceeded: they do not fit; its `hint` names the event and the step of the plan. The budget is as before.
        ValueError: rows that are no log, or whose bytes do not add up.

    >>> traced = Budget(1000, device="cpu")
    >>> first = traced.charge(600, "a"); second = traced.charge(300, "b"); first.release()
    >>> replay(traced.events(), Budget(900, device="cpu"))
    900
    >>> replay(traced.events(), Budget(800, device="cpu"))
    Traceback (most recent call last):
    gpuckpt.errors.BudgetExceeded: memory budget exceeded: need 300, available 200; event 1 of the log (charge of 'b')...
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is {shown(budget)}; expected a Budget")
    try:
        rows = list(events)
    except (TypeError, NotImplementedError):  # the second: a tensor without elements in memory
        raise TypeError(
            f"events is {shown(events)}; expected the rows of a log, as budget.events() gives them"
        ) from None
    log = [_event(number, row) for number, row in enumerate(rows)]
    held_bytes = peak_bytes = 0
    label = budget.ledger.step
    try:
        for number, event in enumerate(log):
            if number == 0:
                _hold(budget, _before(event), number, event)
                held_bytes = peak_bytes = _before(event)
            if event.kind in _MORE:
                _hold(budget, event.nbytes, number, event)
                held_bytes += event.nbytes
            elif event.kind in _LESS and event.nbytes <= held_bytes:
                budget.free(event.nbytes)
                held_bytes -= event.nbytes
            elif event.kind == "step":
                budget.step(event.step)
            peak_bytes = max(peak_bytes, held_bytes)
            if held_bytes != event.used_bytes:
                raise ValueError(
                    f"event {number} of the log ({event.kind} of {event.what!r}) says that {event.used_bytes} bytes were held, "
                    f"and those before it add up to {held_bytes}: a part is missing"
                )
    finally:
        budget.free(held_bytes)
        budget.ledger.step = label
    return peak_bytes


def _event(number: int, row: Any) -> Event:
    if not isinstance(row, list | tuple) or len(row) != _FIELDS:
        raise ValueError(
            f"event {number} of the log is {shown(row)}; expected {_FIELDS} values, as budget.events() gives them"
        )
    event = Event(*row)
    numbers = event.nbytes, event.used_bytes
    if not isinstance(event.kind, str) or any(type(each) is not int or each < 0 for each in numbers):
        raise ValueError(
            f"event {number} of the log is {shown(row)}; expected a kind, what it was of, and bytes of at least 0"
        )
    return event


def _before(first: Event) -> int:
    """What was held before the first event of a log."""
    if first.kind in _MORE:
        return max(first.used_bytes - first.nbytes, 0)
    return first.used_bytes + (first.nbytes if first.kind in _LESS else 0)


def _hold(budget: Budget, nbytes: int, number: int, event: Event) -> None:
    try:
        budget.allocate(nbytes)
    except BudgetExceeded as error:
        where = f"event {number} of the log ({event.kind} of {event.what!r}), in step {event.step!r} of the plan"
        raise BudgetExceeded(error.need, error.available, f"{where}: {error.hint}") from None
