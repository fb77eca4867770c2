"""Context variables: a recompute finds those of its forward, whichever thread it runs in.

What they hold must not hold the graph, whose nodes hold the frame: a variable that collects what a model puts out would keep a
step's bytes for ever. So containers are taken as they were, in copies of plain values; objects that have containers are held
weakly.
"""

from __future__ import annotations

import contextvars
import copy
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from gpuckpt.pytorch._torch_internals import untraced

__all__ = ["ContextValues"]

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


class ContextValues:
    """The context variables of this moment. `run` calls a function with them; others, which cannot be kept, are as they are
    then."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        found = [(variable, _kept(value)) for variable, value in contextvars.copy_context().items()]
        self._values = [(variable, get) for variable, get in found if get is not None]

    @untraced
    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        def with_values() -> Any:
            for variable, get in self._values:
                value = get()
                if value is not _GONE:
                    variable.set(value)
            return function(*args)

        return contextvars.copy_context().run(with_values)


_GONE = object()


def _kept(value: Any) -> Callable[[], Any] | None:
    """What gives `value` back; None where it cannot be kept."""
    if isinstance(value, _CONTAINERS):
        if not _is_plain(value):
            return None
        taken = copy.deepcopy(value)
        return lambda: copy.deepcopy(taken)
    holds_more = isinstance(value, torch.Tensor) and value.grad_fn is not None
    holds_more = holds_more or any(isinstance(inner, _CONTAINERS) for inner in getattr(value, "__dict__", {}).values())
    if not holds_more or isinstance(value, torch.nn.Module):
        return lambda: value
    try:
        ref = weakref.ref(value)
    except TypeError:
        return None
    return lambda: _GONE if (held := ref()) is None else held


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (*_CONTAINERS, tuple, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
