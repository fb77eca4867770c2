"""Early stop for fused operations: a replay that waits for nothing beyond what an operation saves ends before its work.

torch's own operators save their inputs first and compute then, so a replay that ends in one is spared its work. A custom
operation saves when it is done. `about_to_save` lets it say beforehand what it will save: a checkpointed block that ends in a
fused MLP is then run again up to that MLP, whose two GEMMs are two thirds of the block's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gpuckpt.pytorch._torch_internals import top_saved_tensors_hooks

__all__ = ["Replay", "RunsOtherwise", "about_to_save", "replaying", "running"]

_current = threading.local()


class Replay(Protocol):
    """Work that is run again: what autograd saves arrives at `pack`. `arrive` stands for several such calls where these end the
    replay, and raises what ends it. `waits_for()`: the numbers of what is waited for; None where everything has to run. `check`:
    where set, it is called with what arrives and is waited for."""

    check: Callable[[Sequence[Tensor]], None] | None

    def pack(self, tensor: Tensor) -> Any: ...

    def arrive(self, tensors: Sequence[Tensor]) -> None: ...

    def waits_for(self) -> Collection[int] | None: ...


class RunsOtherwise(BaseException):
    """A recompute that leaves out what nobody needs met work that is not what it was in forward: it is run again as a whole. A
    BaseException, so that user code does not catch it."""


class replaying:
    """Within the context this thread runs `replay`. Weakly: Ctrl-C can end `__exit__` before its first line, and a replay holds
    what has arrived."""

    __slots__ = ("_before", "_replay")

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def __enter__(self) -> None:
        self._before = getattr(_current, "replay", None)
        _current.replay = weakref.ref(self._replay)

    def __exit__(self, *error: object) -> None:
        _current.replay = self._before


def about_to_save(saved: Callable[[Any, Sequence[bool]], Sequence[Tensor | None]], inputs: Sequence[Any]) -> None:
    """Called by an operation with what its node will be given, right before that: ends a replay that waits for no more.

    `saved(inputs, needs_input_grad)`: what the operation's `setup_context` saves for backward, in that order.
    """
    if torch.compiler.is_compiling():
        return
    replay = running()
    if replay is None or not torch.is_grad_enabled():
        return
    pack, _ = top_saved_tensors_hooks(True) or (None, None)
    if pack != replay.pack:
        return  # other hooks within the replayed work see what is saved: an inner checkpoint's, or a user's
    needs = [isinstance(given, Tensor) and given.requires_grad for given in inputs]
    if any(needs):
        replay.arrive([tensor for tensor in saved(inputs, needs) if tensor is not None])


def running() -> Replay | None:
    """The replay that this thread runs."""
    ref = getattr(_current, "replay", None)
    return None if ref is None else ref()
