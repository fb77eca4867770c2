"""Python objects that work reaches without being given them, so that a recompute finds in them what forward found.

These are the variables that its functions close over and the globals that they name, attributes that are tensors or objects, and
what is inside of those and of lists, dicts, sets and deques. What somebody else has changed since forward is put back while the
work runs again. So is what forward changed itself in modules, in what their code names, and in objects, and afterwards these are
as they are now. In variables of functions and containers there that (a log, a count) stays as it is and is changed again, except
tensors: a recompute reads what forward read, writes into copies, and leaves none with a graph.

Not looked into: what holds a lock or a thread, which others use at the same time; instances of classes of torch, NumPy and
Python's own library; more than 64 entries; arrays of more than 1 MiB. What of tensors is kept: see tensors.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import nn

from gpuckpt.errors import StateModified
from gpuckpt.pytorch._torch_internals import version_number
from gpuckpt.pytorch.engine.fence.holders import (
    LARGEST,
    PLAIN,
    Names,
    ValueKind,
    Variable,
    content_of,
    fill,
    holders_in,
    is_foreign,
    kind_of,
)
from gpuckpt.pytorch.engine.fence.tensors import ReachedTensor, ReachedTuple, ReadsOf, TensorFate, TensorUse, gone
from gpuckpt.pytorch.engine.residency import is_resident

__all__ = ["Reached"]

_MOST = 256  # holders that are looked into
_DEPTH = 5
_LARGEST_ARRAY_BYTES = 1 << 20
_ABSENT: Any = object()
_THREADS = ("_thread", "threading", "queue")


class Reached:
    """What is reached, as it is now. `modules`, `generators`: those that were met on the way, by id; `callables`, `classes`:
    functions, and of which classes objects were met, which lead to more, with whether they are found `whole`.

    `variable`, `names` and `look` are called for all of it, then `begin`. `kept`: tensors that a frame has to keep for `enter`;
    `fates`: of each tensor what becomes of it, in the order in which they were met.
    What is found `whole` is put back whoever changed it.
    """

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.generators: dict[int, Any] = {}
        self.callables: list[tuple[Any, bool]] = []
        self.classes: dict[type, bool] = {}
        self.kept: list[torch.Tensor] = []
        self.fates: tuple[TensorFate, ...] = ()
        self._entries: list[tuple[Any, dict[Any, Any], bool]] = []  # holder, content, whether all of it is put back
        self._unstable: list[frozenset[Any]] = []  # of each the keys that forward changed itself
        self._noted: dict[int, Any] = {}
        self._spaces: dict[int, Names] = {}  # the first of each namespace
        self._tensors: dict[int, ReachedTensor] = {}
        self._arrays: list[tuple[Any, Any]] = []  # arrays, and what was in them
        self._watching: ReadsOf | None = None

    def __bool__(self) -> bool:
        return bool(self._entries or self._arrays)

    def leads_on(self, count: int) -> bool:
        """Whether there is more to look at than `count` modules."""
        return bool(self.callables or self.classes) or len(self.modules) > count

    def variable(self, variable: Variable, value: Any, use: TensorUse, *, whole: bool) -> None:
        """A variable and its value."""
        self._entries.append((variable, {variable.name: self._note(value, use, variable.name, _DEPTH, whole)}, whole))

    def names(self, names: Names, *, whole: bool) -> None:
        """Variables of one namespace."""
        known = self._spaces.setdefault(id(names.held), names)
        if known is not names and names.names.keys() <= known.names.keys():
            return  # noted already
        content = names.read()
        if not names.plain(content):
            for name, value in content.items():
                if kind_of(value) is not ValueKind.PLAIN:
                    content[name] = self._note(value, names.names[name], name, _DEPTH, whole)
        self._entries.append((names, content, whole))

    def look(self, value: Any, name: str, use: TensorUse, *, whole: bool = False) -> None:
        """Look into a value that no variable has to be put back for."""
        self._note(value, use, name, _DEPTH, whole)

    def _note(self, value: Any, use: TensorUse, name: str, depth: int, whole: bool) -> Any:
        """What stands for a value."""
        kind = kind_of(value)
        if kind is ValueKind.PLAIN:
            return value
        if kind is ValueKind.TENSOR:
            tensor = self._tensors.get(id(value))
            if tensor is None:
                tensor = self._tensors[id(value)] = ReachedTensor(value, name)
            if use not in tensor.uses:
                tensor.uses.append(use)
            return tensor
        if kind is ValueKind.CODE:
            if not is_foreign(value):
                self.callables.append((value, whole))
        elif kind is ValueKind.MODULE:
            self.modules[id(value)] = value
        elif kind is ValueKind.GENERATOR:
            self.generators[id(value)] = value
        elif kind is ValueKind.ARRAY:
            if value.nbytes <= _LARGEST_ARRAY_BYTES and value.dtype != object and id(value) not in self._noted:
                self._noted[id(value)] = value
                self._arrays.append((value, value.copy()))
        elif id(value) in self._noted:
            return self._noted[id(value)]
        elif depth and len(self._noted) < _MOST:
            self._noted[id(value)] = value  # it may refer to itself
            if kind is ValueKind.TUPLE:
                parts = [
                    self._note(item, use, name, depth - 1, whole) for item in (value if len(value) <= LARGEST else ())
                ]
                if any(isinstance(part, ReachedTensor | ReachedTuple) for part in parts):
                    self._noted[id(value)] = value = ReachedTuple(value, parts)
            elif kind is ValueKind.OBJECT or len(value) <= LARGEST:
                self._inside(value, kind, use, name, depth - 1, whole)
        return value

    def _inside(self, value: Any, kind: ValueKind, use: TensorUse, name: str, depth: int, whole: bool) -> None:
        if kind is ValueKind.OBJECT:
            self.classes[type(value)] = whole
        for holder in holders_in(value):
            content = content_of(holder)
            others = [(key, item) for key, item in content.items() if type(item) not in PLAIN]
            if any(type(item).__module__ in _THREADS and not isinstance(item, threading.local) for _, item in others):
                continue  # others use it at the same time
            if not isinstance(holder, set):
                for key, item in others:
                    if kind_of(item) is not ValueKind.PLAIN:
                        content[key] = self._note(item, use.at(key), f"{name}.{key}", depth, whole)
            # What can be called is like a function: a count of its calls counts recomputes.
            self._entries.append((holder, content, whole or (holder is not value and not callable(value))))

    def begin(self, fates: tuple[TensorFate, ...] | None) -> Reached:
        """All has been met: settle which tensors are kept, as `fates` say where work is run again."""
        watched = {}
        if fates is None or len(fates) != len(self._tensors):
            fates = tuple([tensor.fate() for tensor in self._tensors.values()])
        self.fates = fates
        for (key, tensor), fate in zip(self._tensors.items(), fates, strict=True):
            value = tensor.strong
            assert value is not None
            if value.is_leaf and value.requires_grad:
                continue
            if fate is TensorFate.WATCHED:
                watched[key] = tensor
                if value.grad_fn is None:
                    with torch.no_grad():
                        tensor.copy = value.detach().clone()
            elif fate is TensorFate.KEPT:
                tensor.index = len(self.kept)
                if any(use.written for use in tensor.uses) and value.grad_fn is None:
                    with torch.no_grad():
                        tensor.copy = value.detach().clone()
                self.kept.append(value if tensor.copy is None else tensor.copy)
                tensor.strong = None
            else:
                tensor.strong = None
        self._watching = ReadsOf(watched) if watched else None
        self._noted.clear()
        return self

    def watching(self) -> AbstractContextManager[object]:
        """The context in which forward runs."""
        return nullcontext() if self._watching is None else self._watching

    def learn(self) -> None:
        """Forward is over: what has it read, and what has it changed?"""
        if self._watching is not None:
            for key, tensor in self._watching.watched.items():
                value = tensor.strong
                assert value is not None
                read = key in self._watching.read
                written = version_number(value) != tensor.version or (
                    tensor.copy is not None and value.layout is torch.strided and not torch.equal(value, tensor.copy)
                )
                for use in tensor.uses:
                    use.trials = 0 if read else max(0, use.trials - 1)
                    use.read = use.read or read
                    use.written = use.written or (read and written)
                if not read:
                    tensor.strong = tensor.copy = None
                elif not written:
                    tensor.copy = None
            self._watching = None
        self._unstable = [_changes(content, content_of(holder)) for holder, content, _ in self._entries]

    @property
    def copies(self) -> list[torch.Tensor]:
        """What this holds itself, until it is known what a forward does with it."""
        held = [
            tensor.strong if tensor.copy is None else tensor.copy
            for tensor in self._tensors.values()
            if tensor.index is None
        ]
        return [tensor for tensor in held if tensor is not None and not is_resident(tensor)]

    def enter(
        self, kept: Sequence[torch.Tensor], cut: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Callable[[], None]:
        """Let everything be as it was; returns what lets it be as it is now. Raises `StateModified` for what was changed in place
        and cannot be as it was. `cut`: what to put in the place of tensors."""
        found = {id(tensor): self._as_it_was(tensor, kept) for tensor in self._tensors.values()}
        if cut is not None:
            found = {key: cut(tensor) for key, tensor in found.items()}
        undo: list[tuple[Any, dict[Any, Any], bool]] = []
        logs: list[tuple[list[Any], int]] = []
        arrays = [(array, array.copy(), was) for array, was in self._arrays if array.flags.writeable]
        for array, _, was in arrays:
            array[...] = was

        def restored(noted: Any) -> Any:
            if isinstance(noted, ReachedTensor):
                return found[id(noted)]
            return noted.rebuilt(restored) if isinstance(noted, ReachedTuple) else noted

        def leave() -> None:
            for array, now, _ in arrays:
                array[...] = now
            for log, length in logs:
                log[length:] = [item for item in log[length:] if not _has_graph(item)]
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
            elif isinstance(holder, list):
                logs.append((holder, len(now)))
            if _same(content, now):
                continue
            if not whole and own and len(now) != len(content) and isinstance(holder, list | deque | bytearray):
                continue  # a log, which grows as the work runs
            changed: dict[Any, Any] = {}
            again: dict[Any, Any] = {}  # what the work will leave there once more
            for key in {**content, **now}:
                noted = content.get(key, _ABSENT)
                current = now.get(key, _ABSENT)
                if whole or key not in own or isinstance(noted, ReachedTensor | ReachedTuple):
                    value = restored(noted)
                    if value is not current:
                        changed[key] = value
                elif _has_graph(current):
                    again[key] = current
            if (changed or again) and not whole:
                undo.append((holder, {**again, **{key: now.get(key, _ABSENT) for key in changed}}, False))
            if changed:
                fill(holder, {key: value for key, value in {**now, **changed}.items() if value is not _ABSENT})
        return leave

    def _as_it_was(self, tensor: ReachedTensor, kept: Sequence[torch.Tensor]) -> torch.Tensor:
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
        return gone(tensor.uses)  # forward did not read it


def _has_graph(value: Any) -> bool:
    """Whether a value is a tensor that nobody could go backward from, if a recompute left it."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def _same(content: dict[Any, Any], now: dict[Any, Any]) -> bool:
    return len(content) == len(now) and all(map(is_, content.values(), now.values())) and list(content) == list(now)


def _changes(content: dict[Any, Any], now: dict[Any, Any]) -> frozenset[Any]:
    """The keys under which there is something else now."""
    if _same(content, now):
        return frozenset()
    return frozenset(key for key in {**content, **now} if not _is(content.get(key, _ABSENT), now.get(key, _ABSENT)))


def _is(noted: Any, now: Any) -> bool:
    """Whether `now` is what was noted."""
    if isinstance(noted, ReachedTensor):
        return noted.ref() is now
    return noted.is_(now, _is) if isinstance(noted, ReachedTuple) else noted is now


def _modified(what: str) -> StateModified:
    return StateModified(
        f"{what}, which checkpointed work reads, was changed in place between its forward and its "
        "backward, where the work runs again and would see new values; change it after backward, or hand a copy in as an argument"
    )
