"""Tensors inside of objects among the arguments that work does not read: the entries that other layers have put into a cache.

These are told by their graph; constants that a cache brings along are kept like other arguments. A recompute is given a stand-in
for entries, so that nobody has to keep them. Whoever reads one is told, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt.errors import RecomputeMismatch
from gpuckpt.planning import Stage
from gpuckpt.pytorch._torch_internals import untraced
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["ReadWatch", "Unread", "is_entry", "stand_in"]


class _StandIn(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RecomputeMismatch(
            "a stage reads a tensor inside of one of its arguments (an entry of a cache) which its class did not read when the "
            "model was measured, and which was not kept for a recompute; hand the tensor in as an argument of its own, or leave "
            "the cache out (Hugging Face: use_cache=False)"
        )


def stand_in() -> torch.Tensor:
    """A tensor that nobody may read."""
    return torch.empty(0).as_subclass(_StandIn)


def is_entry(tensor: torch.Tensor) -> bool:
    """Whether a tensor inside of an object was made in this forward, or stands for one that was."""
    return type(tensor) is _StandIn or tensor.grad_fn is not None


class ReadWatch:
    """Notes whether any of `tensors` is read within the context: by a function of torch, which may ask for its shape alone, or by
    an operation below, of compiled code as well."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        watched = list(tensors)
        self.read = False
        self._ids = set(map(id, watched))
        self._storages = {part.untyped_storage()._cdata for tensor in watched for part in parts_of(tensor)}
        self._modes: list[AbstractContextManager[Any]] = [_Functions(self), _Operations(self)]

    def look(self, arguments: Any, *, storages: bool) -> None:
        if self.read:
            return
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        if storages:
            parts = [part for tensor in tensors for part in parts_of(tensor)]
            self.read = any(part.untyped_storage()._cdata in self._storages for part in parts)
        else:
            self.read = any(id(tensor) in self._ids for tensor in tensors)

    def __enter__(self) -> ReadWatch:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, watch: ReadWatch) -> None:
        super().__init__()
        self._watch = watch

    @untraced
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch.look((args, kwargs), storages=False)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, watch: ReadWatch) -> None:
        super().__init__()
        self._watch = watch

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch.look((args, kwargs), storages=True)
        return func(*args, **(kwargs or {}))


class Unread:
    """Which classes of blocks were given objects with tensors inside, and read none of them."""

    def __init__(self) -> None:
        self._calls: list[
            tuple[type, int, ReadWatch, set[int]]
        ] = []  # with the number of each, and ids that only objects name

    def watching(self, block: object, call: int, inside: Sequence[torch.Tensor], ids: set[int]) -> Any:
        """The context for one call of a block."""
        if not inside:
            return nullcontext()
        watch = ReadWatch(inside)
        self._calls.append((type(block), call, watch, ids))
        return watch

    @property
    def classes(self) -> frozenset[type]:
        reading = {cls for cls, _, watch, _ in self._calls if watch.read}
        return frozenset({cls for cls, *_ in self._calls} - reading)

    def dropped(self, stages: list[Stage], owned: Sequence[int]) -> list[Stage]:
        """The stages as they are where nothing is kept of objects whose tensors are not read. `owned`: the stage of each call."""
        found = list(stages)
        for cls, call, _, ids in self._calls:
            if cls in self.classes:
                stage = found[owned[call]]
                others = tuple([i for i in stage.extras if i not in ids])
                variants = [replace(v, saves=tuple([i for i in v.saves if i not in ids])) for v in stage.variants]
                found[owned[call]] = replace(stage, extras=others, variants=tuple(variants))
        return found
