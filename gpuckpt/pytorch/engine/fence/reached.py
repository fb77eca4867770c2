"""Python objects that work reaches without being given them, so that a recompute finds in them what forward found.

These are the variables that its functions close over and the globals that they name, attributes that are tensors or objects, and
what is inside of those and of lists, dicts, sets and deques. What somebody else has changed since forward is put back while the
work runs again. So is what forward changed itself in modules and objects, and afterwards these are as they are now. In variables
of functions and containers there that (a log, a count) stays as it is and is changed again, except tensors that forward reads: a
recompute reads what forward read, and writes into copies.

Which tensors a forward reads is watched where one is first met: most that stand in attributes are outputs that code left there
for others to see, and shall not be kept alive. Not looked into: what holds a lock or a thread, which others use at the same
time; instances of classes of torch, NumPy and Python's own library; more than 64 entries; arrays of more than 1 MiB.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gpuckpt.errors import StateModified
from gpuckpt.pytorch._torch_internals import version_number
from gpuckpt.pytorch.engine.fence.holders import LARGEST, ValueKind, Variable, content_of, fill, holders_in, kind_of
from gpuckpt.pytorch.engine.residency import is_resident

__all__ = ["Reached", "TensorUse"]

_MOST = 256  # holders that are looked into
_DEPTH = 5
_LARGEST_ARRAY_BYTES = 1 << 20
_ABSENT: Any = object()
_THREADS = ("_thread", "threading", "queue")
_OVERWRITES = (torch.Tensor.__setitem__, torch.Tensor.copy_, torch.Tensor.fill_, torch.Tensor.zero_)


class TensorUse:
    """What is known of the tensors that a variable leads to: whether a forward reads them, and changes them in place. None: no
    forward has been watched with a tensor there."""

    __slots__ = ("read", "written")

    def __init__(self) -> None:
        self.read: bool | None = None
        self.written = False


class _ReachedTensor:
    """A tensor as it was. `strong`, `copy`: what this holds itself; `index`: where it, or its copy, is among what a frame keeps;
    `lasting`: a variable of a function leads to it, which is there to be read."""

    __slots__ = ("copy", "index", "lasting", "name", "ref", "strong", "uses", "version")

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        self.ref = weakref.ref(tensor)
        self.version = version_number(tensor)
        self.name = name
        self.uses: list[TensorUse] = []
        self.strong: torch.Tensor | None = tensor
        self.copy: torch.Tensor | None = None
        self.index: int | None = None
        self.lasting = False


class _Loose:
    """A value with tensors inside, which may be kept alive only as far as these are."""

    __slots__ = ("below", "ref", "value")

    def __init__(self, value: Any, below: list[_ReachedTensor]) -> None:
        self.value = value
        self.below = below
        self.ref: Callable[[], Any] = lambda: None

    def settle(self) -> None:
        """Which tensors are kept is known."""
        if self.value is not None and any(tensor.strong is None and tensor.index is None for tensor in self.below):
            with suppress(TypeError):
                self.ref = weakref.ref(self.value)
            self.value = None

    def get(self) -> Any:
        found = self.ref() if self.value is None else self.value
        return _ABSENT if found is None else found


class _Watching(TorchFunctionMode):
    """Notes which of some tensors are read by torch's functions."""

    def __init__(self, watched: dict[int, _ReachedTensor]) -> None:
        super().__init__()
        self._watched = watched
        self.read: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args[1:] if func in _OVERWRITES else args
        self.read.update(id(leaf) for leaf in pytree.tree_leaves((given, kwargs)) if id(leaf) in self._watched)
        return func(*args, **(kwargs or {}))


class Reached:
    """What is reached, as it is now. `modules`, `generators`: those that were met on the way, by id.

    `variable` and `look` are called for all of it, then `begin`. `kept`: tensors that a frame has to keep for `enter`.
    """

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.generators: dict[int, Any] = {}
        self.kept: list[torch.Tensor] = []
        self._entries: list[tuple[Any, dict[Any, Any], bool]] = []  # holder, content, whether all of it is put back
        self._unstable: list[frozenset[Any]] = []  # of each the keys that forward changed itself
        self._noted: dict[int, tuple[Any, list[_ReachedTensor]]] = {}
        self._tensors: dict[int, _ReachedTensor] = {}
        self._loose: list[_Loose] = []
        self._arrays: list[tuple[Any, Any]] = []  # arrays, and what was in them
        self._watching: _Watching | None = None

    def __bool__(self) -> bool:
        return bool(self._entries or self._arrays)

    def variable(self, variable: Variable, value: Any, use: TensorUse, *, lasting: bool = False) -> None:
        """A variable and its value. `lasting`: of a function; else of a module, whose attributes are all put back."""
        noted, _ = self._note(value, use, variable.name, _DEPTH, lasting, not lasting)
        self._entries.append((variable, {variable.name: noted}, not lasting))

    def look(self, value: Any, name: str, use: TensorUse) -> None:
        """Look into a value that no variable has to be put back for."""
        self._note(value, use, name, _DEPTH, True, False)

    def _note(
        self, value: Any, use: TensorUse, name: str, depth: int, lasting: bool, whole: bool
    ) -> tuple[Any, list[_ReachedTensor]]:
        """What stands for a value, and the tensors below it."""
        kind = kind_of(value)
        if kind is ValueKind.PLAIN:
            return value, []
        if kind is ValueKind.TENSOR:
            tensor = self._tensors.get(id(value))
            if tensor is None:
                tensor = self._tensors[id(value)] = _ReachedTensor(value, name)
            tensor.lasting = tensor.lasting or lasting
            if use not in tensor.uses:
                tensor.uses.append(use)
            return tensor, [tensor]
        if kind is ValueKind.MODULE:
            self.modules[id(value)] = value
        elif kind is ValueKind.GENERATOR:
            self.generators[id(value)] = value
        elif kind is ValueKind.ARRAY:
            if value.nbytes <= _LARGEST_ARRAY_BYTES and value.dtype != object:
                self._arrays.append((value, value.copy()))
        elif id(value) in self._noted:
            return self._noted[id(value)]
        elif depth and len(self._noted) < _MOST:
            self._noted[id(value)] = value, []  # until it is known; it may refer to itself
            below = self._inside(value, kind, use, name, depth - 1, whole)
            if below:
                loose = _Loose(value, below)
                self._loose.append(loose)
                self._noted[id(value)] = loose, below
                return loose, below
        return value, []

    def _inside(
        self, value: Any, kind: ValueKind, use: TensorUse, name: str, depth: int, whole: bool
    ) -> list[_ReachedTensor]:
        below: list[_ReachedTensor] = []
        if kind is ValueKind.TUPLE:
            for item in value if len(value) <= LARGEST else ():
                below += self._note(item, use, name, depth, False, whole)[1]
            return below
        if kind is ValueKind.CONTAINER and len(value) > LARGEST:
            return below
        for holder in holders_in(value):
            content = content_of(holder)
            if any(type(item).__module__ in _THREADS for item in content.values()):
                continue  # others use it at the same time
            if not isinstance(holder, set):
                for key, item in content.items():
                    if kind_of(item) is not ValueKind.PLAIN:
                        content[key], inner = self._note(item, use, f"{name}.{key}", depth, False, whole)
                        below += inner
            # What can be called is like a function: a count of its calls counts recomputes.
            self._entries.append((holder, content, whole or (holder is not value and not callable(value))))
        return below

    def begin(self) -> Reached:
        """All has been met: settle which tensors are kept."""
        watched = {}
        for key, tensor in self._tensors.items():
            value = tensor.strong
            assert value is not None
            if value.is_leaf and value.requires_grad:
                continue  # trained: somebody keeps it, and what it was is compared
            if value.grad_fn is not None and not tensor.lasting:
                tensor.strong = None  # an output that somebody left there: its graph would stay with it
            elif any(use.read is None for use in tensor.uses):
                watched[key] = tensor
                if value.grad_fn is None:
                    with torch.no_grad():
                        tensor.copy = value.detach().clone()
            elif any(use.read for use in tensor.uses):
                tensor.index = len(self.kept)
                if any(use.written for use in tensor.uses) and value.grad_fn is None:
                    with torch.no_grad():
                        tensor.copy = value.detach().clone()
                self.kept.append(value if tensor.copy is None else tensor.copy)
                tensor.strong = None
            else:
                tensor.strong = None
        self._watching = _Watching(watched) if watched else None
        if self._watching is None:
            self._settle()
        return self

    def watching(self) -> AbstractContextManager[object]:
        """The context in which forward runs."""
        return nullcontext() if self._watching is None else self._watching

    def learn(self) -> None:
        """Forward is over: what has it read, and what has it changed?"""
        if self._watching is not None:
            for key, tensor in self._watching._watched.items():
                value = tensor.strong
                assert value is not None
                read = key in self._watching.read
                written = version_number(value) != tensor.version or (
                    tensor.copy is not None and value.layout is torch.strided and not torch.equal(value, tensor.copy)
                )
                for use in tensor.uses:
                    use.read = bool(use.read) or read
                    use.written = use.written or (read and written)
                if not read:
                    tensor.strong = tensor.copy = None
                elif not written:
                    tensor.copy = None
            self._watching = None
            self._settle()
        self._unstable = [_changes(content, content_of(holder)) for holder, content, _ in self._entries]

    def _settle(self) -> None:
        for loose in self._loose:
            loose.settle()

    @property
    def copies(self) -> list[torch.Tensor]:
        """What this holds itself, until it is known what a forward does with it."""
        held = [
            tensor.strong if tensor.copy is None else tensor.copy
            for tensor in self._tensors.values()
            if tensor.index is None
        ]
        return [tensor for tensor in held if tensor is not None and not is_resident(tensor)]

    def enter(self, kept: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Let everything be as it was; returns what lets it be as it is now. Raises `StateModified` for what was changed in place
        and cannot be as it was."""
        found = {id(tensor): self._as_it_was(tensor, kept) for tensor in self._tensors.values()}
        undo: list[tuple[Any, dict[Any, Any], bool]] = []
        arrays = [(array, array.copy(), was) for array, was in self._arrays if array.flags.writeable]
        for array, _, was in arrays:
            array[...] = was

        def leave() -> None:
            for array, now, _ in arrays:
                array[...] = now
            for holder, before, whole in reversed(undo):
                present = content_of(holder)
                content = before if whole else {**present, **before}
                if not _same(content, present):
                    fill(holder, {key: value for key, value in content.items() if value is not _ABSENT})

        unstable = self._unstable or [frozenset[Any]()] * len(self._entries)
        for (holder, content, whole), own in zip(self._entries, unstable, strict=True):
            now = content_of(holder)
            if whole:
                undo.append((holder, now, True))
            if _same(content, now):
                continue
            if not whole and own and len(now) != len(content) and isinstance(holder, list | deque | bytearray):
                continue  # a log, which grows as the work runs
            changed: dict[Any, Any] = {}
            for key in {**content, **now}:
                value = content.get(key, _ABSENT)
                known = whole
                if isinstance(value, _ReachedTensor):
                    value, known = found[id(value)], value.index is not None or value.strong is not None
                    if value is _ABSENT:
                        continue
                elif isinstance(value, _Loose) and (value := value.get()) is _ABSENT:
                    continue
                if value is not now.get(key, _ABSENT) and (known or key not in own):
                    changed[key] = value
            if changed:
                if not whole:
                    undo.append((holder, {key: now.get(key, _ABSENT) for key in changed}, False))
                fill(holder, {key: value for key, value in {**now, **changed}.items() if value is not _ABSENT})
        return leave

    def _as_it_was(self, tensor: _ReachedTensor, kept: Sequence[torch.Tensor]) -> Any:
        held = kept[tensor.index] if tensor.index is not None else tensor.copy
        if tensor.copy is not None:
            assert held is not None
            return held.detach().clone()
        value = tensor.ref()
        if value is not None and version_number(value) == tensor.version:
            return value
        if held is not None:
            return held
        if tensor.strong is not None:
            raise _modified(f"tensor {tensor.name!r} of shape {tuple(tensor.strong.shape)}")
        return _ABSENT if value is None else value  # forward did not read it


def _same(content: dict[Any, Any], now: dict[Any, Any]) -> bool:
    return len(content) == len(now) and all(map(is_, content.values(), now.values())) and list(content) == list(now)


def _changes(content: dict[Any, Any], now: dict[Any, Any]) -> frozenset[Any]:
    """The keys under which there is something else now."""
    if _same(content, now):
        return frozenset()
    return frozenset(
        key for key in {**content, **now} if _current(content.get(key, _ABSENT)) is not now.get(key, _ABSENT)
    )


def _current(value: Any) -> Any:
    if isinstance(value, _ReachedTensor):
        return value.ref()
    return value.get() if isinstance(value, _Loose) else value


def _modified(what: str) -> StateModified:
    return StateModified(
        f"{what}, which checkpointed work reads, was changed in place between its forward and its "
        "backward, where the work runs again and would see new values; change it after backward, or hand a copy in as an argument"
    )
