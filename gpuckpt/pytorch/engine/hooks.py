"""`with budget:` for torch: whatever autograd saves inside is held by the budget.

The hooks are `torch.autograd.graph.saved_tensors_hooks`; they are thread-local, as is the notion of a current budget. What is
charged is told in storage_index.py.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import (
    innermost_transform,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    top_saved_tensors_hooks,
)
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes
from gpuckpt.pytorch.engine.saved_storage import HeldTensor
from gpuckpt.pytorch.engine.storage_index import index_of

__all__ = ["current_budget", "enter", "plain_call", "redirect_saves", "redirected_hold", "room_for_saves"]

_current = threading.local()


def current_budget() -> Budget | None:
    """The innermost budget that this thread has entered, or None."""
    stack = getattr(_current, "stack", None)
    context = stack[-1]() if stack else None
    return None if context is None else context.budget


def room_for_saves() -> float:
    """Bytes that may be saved here in addition, and stay where they are until backward: no limit outside of hooks on saved
    tensors, what is free of the budget inside of `with budget:` alone. 0 under `hold="pool"`, which would copy them, and under
    the hooks of a checkpoint or a user, who may drop them and have the work run again."""
    top = top_saved_tensors_hooks(True)
    if top is None:
        return math.inf
    budget = current_budget()
    if budget is None or budget.hold != "account" or top[0] != index_of(budget).hold:
        return 0.0
    return float(budget.remaining())


class redirect_saves:
    """Within the context a replay that this thread runs holds tensors by `hold`; None: as it always does."""

    __slots__ = ("_before", "_hold")

    def __init__(self, hold: Callable[[torch.Tensor], Any] | None) -> None:
        self._hold = hold

    def __enter__(self) -> None:
        self._before = redirected_hold()
        _current.redirected = self._hold

    def __exit__(self, *error: object) -> None:
        _current.redirected = self._before


def redirected_hold() -> Callable[[torch.Tensor], Any] | None:
    """What the innermost `redirect_saves` of this thread was given."""
    return getattr(_current, "redirected", None)


class enter:
    """Make `budget` the thread's current budget, and hold in it what autograd saves, until `__exit__`.

    A checkpoint's recompute passes hooks of its own, which decide what of the saved tensors is held. Ctrl-C can end `__exit__`
    before its first line; it can therefore be called again, leaves whatever is still open inside of it as well, and is
    called at the latest when the object dies.
    """

    __slots__ = ("__weakref__", "_open", "_pack", "budget")

    def __init__(
        self,
        budget: Budget | None,
        pack: Callable[[torch.Tensor], Any] | None = None,
        unpack: Callable[[Any], torch.Tensor] = HeldTensor.load,
    ) -> None:
        self.budget = budget
        self._open = False
        if not hasattr(_current, "stack"):
            _current.stack = []
        if pack is None:
            pack = index_of(budget).hold
            if not _current.stack:
                drop_stale_nodes()
        self._pack = pack
        self._open = True
        _current.stack.append(weakref.ref(self))
        push_saved_tensors_hooks(pack, unpack)

    def __enter__(self) -> None:
        """Nothing more to do: entering begins with the constructor, so that a budget can keep the object for its exit."""

    def __exit__(self, *error: object) -> None:
        stack = getattr(_current, "stack", [])  # another thread's, if a finalizer calls
        while any(ref() is self for ref in stack):
            context = stack[-1]()
            top = top_saved_tensors_hooks(True)
            if context is not None and top is not None and top[0] is context._pack:
                pop_saved_tensors_hooks()
            stack.pop()
        self._open = False

    def __del__(self) -> None:
        if self._open:
            self.__exit__()


@contextmanager
def plain_call(name: str, budget: Budget | None) -> Iterator[None]:
    """For work of `name` inside a transform of torch.func: it is not checkpointed, since backward would run it again outside of
    the transform, where its tensors are no more. `budget` holds what autograd saves."""
    transform = str(innermost_transform()).lower()
    if transform == "grad" and (budget is not None or current_budget() is not None):
        raise NotImplementedError(
            "torch.func.grad, vjp, jacrev and hessian take no hooks on saved tensors, and so no budget; use torch.autograd.grad"
        )
    warnings.warn(
        f"{name} inside torch.func ({transform}) is a plain call: what autograd saves is kept. Checkpoint the call of the "
        "transform instead",
        stacklevel=4,
    )
    with nullcontext() if budget is None else enter(budget):
        yield
