"""Functions compiled by Numba, kept for the next process where there is a place for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Any:
    """`function`, compiled when it is first called, without the interpreter's lock.

    The compiled code is kept beside the source, or where that cannot be written in the user's own cache folder (Numba's rule;
    NUMBA_CACHE_DIR names another). Where neither can be written each process compiles anew, which takes seconds.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that can be written
        return njit(nogil=True)(function)
