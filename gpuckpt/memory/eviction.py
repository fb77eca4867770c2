"""What a budget does when a request does not fit, in the order its user names.

"recompute"  what can be computed again is dropped (a torch frame's tensors; a `Saved` cannot)
"spill"      bytes move to a second, host budget, and come back when they are loaded
"compress"   floating-point arrays are stored in a smaller dtype; lossy, so only with a declared one
a callable   `policy(budget, need_bytes, what)`: frees what it likes, and returns whether it freed anything
"raise"      ends the list: `BudgetExceeded`. A list without it ends the same way

Holders that can give bytes up register themselves with `budget.offer(holder)`. They are asked oldest first: what was saved
first in forward is needed last in backward. They are asked outside every lock and never while an exception is being
handled, whose traceback would pin the very buffers that should go.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory.protocols import Evictable, Holds

__all__ = ["Holders", "make_room", "parse_policies"]

_NAMES = ("recompute", "spill", "compress", "raise")


class Holders:
    """Who can be asked, oldest first. Keeps nothing alive; needs no lock, as every change is one step of a dict."""

    def __init__(self) -> None:
        self._refs: dict[int, weakref.ref[Any]] = {}

    def add(self, holder: Evictable) -> None:
        """From now on `holder` is asked. One that is offered again becomes the youngest."""
        key, refs = id(holder), self._refs
        refs.pop(key, None)
        refs[key] = weakref.ref(holder, lambda dead: refs.pop(key, None) if refs.get(key) is dead else None)

    def discard(self, holder: Evictable) -> None:
        """`holder` is no longer asked."""
        self._refs.pop(id(holder), None)

    def in_order(self) -> Iterator[Evictable]:
        """Who is asked, oldest first. Keeps none of them alive but the one it is at, so that what one drops is gone."""
        for ref in list(self._refs.values()):
            holder = ref()
            if holder is not None:
                yield holder
            del holder


def parse_policies(policies: Iterable[Any] | str) -> tuple[Any, ...]:
    """The user's list, checked. Raises `ValueError` for an unknown policy."""
    listed = (policies,) if isinstance(policies, str) or callable(policies) else tuple(policies)
    for policy in listed:
        if not callable(policy) and policy not in _NAMES:
            raise ValueError(f"over_cap must name {', '.join(map(repr, _NAMES))} or be callable, got {policy!r}")
    return listed


_asking = threading.local()


def make_room(budget: Holds, ask: Callable[[], None], need_bytes: int, what: str) -> bool:
    """Apply the policies of `budget` until `ask()` passes; False where they ran out. A request that a policy makes while it
    frees bytes is not helped by policies in turn."""
    if getattr(_asking, "now", False):
        return False
    _asking.now = True
    try:
        for policy in budget.over_cap:
            if policy == "raise":
                return False
            if callable(policy):
                if policy(budget, need_bytes, what) and _passes(ask):
                    return True
                continue
            for holder in budget.holders.in_order():
                freed_bytes = holder.evict(policy)
                if freed_bytes:
                    budget.ledger.mark(policy, what, freed_bytes)
                if freed_bytes and need_bytes <= budget.remaining() and _passes(ask):
                    return True
        return False
    finally:
        _asking.now = False


def _passes(ask: Callable[[], None]) -> bool:
    try:
        ask()
    except BudgetExceeded:
        return False
    return True
