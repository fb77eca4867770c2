"""What a forked child does first: locks that a thread of the parent may have held would never be released in the child."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renew_after_fork"]


class Forked(Protocol):
    """Something with locks of its own, weakly referencable."""

    def after_fork(self) -> None:
        """In the child, before anything else runs: make new locks."""
        ...


_alive: weakref.WeakSet[Forked] = weakref.WeakSet()


def renew_after_fork(owner: Forked) -> None:
    """Have `owner.after_fork()` called in every child that is forked while `owner` is alive."""
    _alive.add(owner)


def _in_child() -> None:
    for owner in list(_alive):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)
