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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory.ledger import Ledger
from gpuckpt.memory.protocols import Evictable, Holds

__all__ = ["Holders", "make_room", "parse_policies"]

_MOST_POLICIES = 16
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


def parse_policies(policies: Sequence[Any] | str, spill_to: Any, storage_dtype: str | None) -> tuple[Any, ...]:
    """The user's list, checked. Raises `ValueError` for an unknown policy, or one that lacks what it needs."""
    single = isinstance(policies, str) or callable(policies) or not isinstance(policies, Sequence)
    listed = (policies,) if single else tuple(policies[: _MOST_POLICIES + 1])
    known = all(callable(policy) or (isinstance(policy, str) and policy in _NAMES) for policy in listed)
    if not known or len(listed) > _MOST_POLICIES:
        raise ValueError(f"over_cap must name {', '.join(map(repr, _NAMES))} or be callable, got {shown(policies)}")
    if spill_to is not None and not isinstance(getattr(spill_to, "ledger", None), Ledger):
        raise TypeError(f"spill_to is {shown(spill_to)}; expected a budget or None")
    if "spill" in listed and (spill_to is None or spill_to.hold != "pool" or spill_to.device != "cpu"):
        raise ValueError('over_cap names "spill": give spill_to=CheckpointBudget(..., device="cpu", hold="pool")')
    if "compress" in listed and storage_dtype is None:
        raise ValueError('over_cap names "compress", which loses digits: declare storage_dtype, such as "float16"')
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
