"""Tensors that work reaches without being given them: which of them a forward reads, and what a recompute finds in their place.

Which ones a forward reads is watched where one is first met: most that stand in attributes are outputs that code left there
for others to see, and shall not be kept alive. Where such a one is gone, or was changed since, a recompute finds something that
nobody may read.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gpuckpt.errors import RecomputeMismatch
from gpuckpt.pytorch._torch_internals import version_number

__all__ = ["ReachedTensor", "ReachedTuple", "ReadsOf", "TensorFate", "TensorUse", "gone"]

_OVERWRITES = (torch.Tensor.__setitem__, torch.Tensor.copy_, torch.Tensor.fill_, torch.Tensor.zero_)


class TensorUse:
    """What is known of the tensors that a variable leads to: whether a forward reads them, and changes them in place. `trials`:
    forwards with a tensor there that are still watched for that."""

    __slots__ = ("_inside", "read", "trials", "written")

    def __init__(self) -> None:
        self.read = False
        self.written = False
        self.trials = 2
        self._inside: dict[str, TensorUse] = {}

    def at(self, key: Any) -> TensorUse:
        """Of those under a name; places in a list are not told apart, which change from step to step."""
        return self._inside.setdefault(key, TensorUse()) if isinstance(key, str) else self


class TensorFate(enum.Enum):
    """What a call does with a tensor that its work reaches."""

    LEFT = enum.auto()
    WATCHED = enum.auto()  # and held until the call has shown whether it reads it
    KEPT = enum.auto()  # with what the frame starts from


class ReachedTensor:
    """A tensor as it was. `strong`, `copy`: what this holds itself; `index`: where it, or its copy, is in what a frame keeps."""

    __slots__ = ("copy", "index", "name", "ref", "strong", "uses", "version")

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self.ref = weakref.ref(tensor)
        self.version = version_number(tensor)
        self.name = name
        self.uses: list[TensorUse] = []
        self.strong: torch.Tensor | None = tensor
        self.copy: torch.Tensor | None = None
        self.index: int | None = None

    def fate(self) -> TensorFate:
        """By what is known now of those who reach it."""
        value = self.ref()
        if value is None or (value.is_leaf and value.requires_grad):
            return TensorFate.LEFT  # trained: somebody keeps it, and what it was is compared
        if any(use.trials for use in self.uses):
            return TensorFate.WATCHED
        return TensorFate.KEPT if any(use.read for use in self.uses) else TensorFate.LEFT


class ReachedTuple:
    """A tuple with tensors inside, which would keep them alive: its parts, to be put together again."""

    __slots__ = ("_kind", "_parts")

    def __init__(self, value: Any, parts: list[Any]) -> None:
        self._kind = type(value)
        self._parts = parts

    def rebuilt(self, part: Callable[[Any], Any]) -> Any:
        parts = [part(each) for each in self._parts]
        return self._kind(*parts) if hasattr(self._kind, "_fields") else self._kind(parts)

    def is_(self, other: Any, same: Callable[[Any, Any], bool]) -> bool:
        """Whether `other` is a tuple of these very parts, by `same`."""
        return type(other) is self._kind and len(other) == len(self._parts) and all(map(same, self._parts, other))


class ReadsOf(TorchFunctionMode):
    """Notes which of some tensors are read by torch's functions."""

    def __init__(self, watched: dict[int, ReachedTensor]) -> None:
        super().__init__()
        self.watched = watched
        self.read: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args[1:] if func in _OVERWRITES else args
        self.read.update(id(leaf) for leaf in pytree.tree_leaves((given, kwargs)) if id(leaf) in self.watched)
        return func(*args, **(kwargs or {}))


class _Gone(torch.Tensor):
    uses: Sequence[TensorUse] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OVERWRITES and isinstance(args[0], cls):
            return args[0]
        for leaf in pytree.tree_leaves((args, kwargs)):
            for use in leaf.uses if isinstance(leaf, cls) else ():
                use.read = True
        raise RecomputeMismatch(
            "checkpointed work reads a tensor in an attribute or a variable which it was not seen to read before, so that it was "
            "not kept for a recompute, and which was replaced or changed since; from the next step on it is kept. Or hand it in "
            "as an argument"
        )


def gone(uses: Sequence[TensorUse]) -> torch.Tensor:
    """Stands for a tensor that is no more."""
    stand_in = torch.empty(0).as_subclass(_Gone)
    stand_in.uses = uses
    return stand_in
