"""What holds Python objects: variables, slots and containers, read and written alike."""

from __future__ import annotations

import enum
import functools
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuckpt.pytorch.engine.fence.randomness import GENERATORS

__all__ = [
    "LARGEST",
    "PLAIN",
    "STATES",
    "Names",
    "Slots",
    "ValueKind",
    "Variable",
    "content_of",
    "fill",
    "holders_in",
    "is_foreign",
    "kind_of",
]

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})
LARGEST = 64
"""Entries of a container that is looked into."""

STATES = (int, float, bool, str, complex, type(None))
"""Kinds of plain values that a variable may change between."""

_CODE = (types.FunctionType, types.MethodType, functools.partial)
_NOTHING_INSIDE = (type, types.BuiltinFunctionType, types.ModuleType, enum.Enum)


class ValueKind(enum.Enum):
    """What there is to look at in a value."""

    PLAIN = enum.auto()  # nothing: numbers, texts, classes, instances of foreign classes
    CODE = enum.auto()  # functions, methods, partials: what they lead to
    TENSOR = enum.auto()
    MODULE = enum.auto()
    GENERATOR = enum.auto()
    ARRAY = enum.auto()
    TUPLE = enum.auto()
    CONTAINER = enum.auto()
    OBJECT = enum.auto()


_CONTAINERS = (list, dict, set, deque, bytearray)
_FOREIGN = (sys.stdlib_module_names - {"collections", "types", "argparse"}) | {"torch", "numpy", "gpuckpt", "builtins"}
_kinds: dict[type, ValueKind] = {}
_MOST_KINDS = 4096


def kind_of(value: Any) -> ValueKind:
    """The same for all instances of a class."""
    cls = type(value)
    kind = _kinds.get(cls)
    if kind is None:
        if len(_kinds) >= _MOST_KINDS:  # classes that are made again and again
            _kinds.clear()
        kind = _kinds[cls] = _kind_of(cls)
    return kind


def _kind_of(cls: type) -> ValueKind:
    if cls in PLAIN or issubclass(cls, _NOTHING_INSIDE):
        return ValueKind.PLAIN
    for kind, classes in (
        (ValueKind.CODE, _CODE),
        (ValueKind.TENSOR, torch.Tensor),
        (ValueKind.MODULE, nn.Module),
        (ValueKind.GENERATOR, GENERATORS),
        (ValueKind.ARRAY, np.ndarray),
        (ValueKind.TUPLE, (tuple, frozenset)),
        (ValueKind.CONTAINER, _CONTAINERS),
    ):
        if issubclass(cls, classes):
            return kind
    if issubclass(cls, threading.local):
        return ValueKind.OBJECT
    return ValueKind.PLAIN if cls.__module__.partition(".")[0] in _FOREIGN else ValueKind.OBJECT


def is_foreign(code: Any) -> bool:
    """Whether a function or a class is torch's, NumPy's, Python's own or ours, and so leads to no state of the user's."""
    if isinstance(code, functools.partial):
        code = code.func
    module = str(getattr(code, "__module__", None)).partition(".")[0]
    return module in _FOREIGN or module in sys.stdlib_module_names


def holders_in(value: Any) -> list[Any]:
    """What holds the parts of a container or an object: itself, its dict, its slots."""
    found = [value] if kind_of(value) is ValueKind.CONTAINER else []
    cls = type(value)
    if isinstance(value, threading.local):
        return [OfThread(value)]
    if cls.__module__.partition(".")[0] not in _FOREIGN:
        with suppress(AttributeError):
            found.append(object.__getattribute__(value, "__dict__"))
        if not found:
            slots = [name for base in cls.__mro__ for name in _names(vars(base).get("__slots__", ()))]
            found += [Slots(value, slots)] if slots else []
    return found


def _names(slots: Any) -> list[str]:
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__")]


class Variable:
    """A variable by its name: in a module's attributes, or of a function that closes over it."""

    __slots__ = ("held", "name")

    def __init__(self, held: Any, name: str) -> None:
        self.held, self.name = held, name

    def read(self) -> dict[Any, Any]:
        held, name = self.held, self.name
        if isinstance(held, types.CellType):
            try:
                return {name: held.cell_contents}
            except ValueError:
                return {}
        return {name: held[name]} if name in held else {}

    def write(self, content: dict[Any, Any]) -> None:
        held, name = self.held, self.name
        if isinstance(held, types.CellType):
            if content:
                held.cell_contents = content[name]
            else:
                del held.cell_contents
        elif content:
            held[name] = content[name]
        else:
            held.pop(name, None)


class Names:
    """Some of the names in a namespace: a module's globals, or the attributes of a class."""

    __slots__ = ("_plain", "held", "names")

    def __init__(self, held: Any) -> None:
        self.held = held
        self.names: dict[str, Any] = {}  # each with what is known of the tensors that it leads to
        self._plain: dict[Any, Any] | None = None

    def read(self) -> dict[Any, Any]:
        held = vars(self.held) if isinstance(self.held, type) else self.held
        return {name: held[name] for name in self.names if name in held}

    def plain(self, content: dict[Any, Any]) -> bool:
        """Whether there is nothing inside of these values, which is remembered."""
        known = self._plain
        if known is not None and len(known) == len(content) and all(map(is_, known.values(), content.values())):
            return True
        plain = all(kind_of(value) is ValueKind.PLAIN for value in content.values())
        self._plain = content.copy() if plain else None
        return plain

    def write(self, content: dict[Any, Any]) -> None:
        held = self.held
        now = self.read()
        for name in self.names:
            if name in content:
                if now.get(name, self) is not content[name]:
                    setattr(held, name, content[name]) if isinstance(held, type) else held.update({name: content[name]})
            elif name in now:
                delattr(held, name) if isinstance(held, type) else held.pop(name)


class Slots:
    """An object without a dict."""

    __slots__ = ("names", "value")

    def __init__(self, value: Any, names: Sequence[str]) -> None:
        self.value, self.names = value, names

    def read(self) -> dict[Any, Any]:
        return {name: getattr(self.value, name) for name in self.names if hasattr(self.value, name)}

    def write(self, content: dict[Any, Any]) -> None:
        for name in self.names:
            if name in content:
                setattr(self.value, name, content[name])
            elif hasattr(self.value, name):
                delattr(self.value, name)


class OfThread:
    """What a `threading.local` holds in the thread that asks."""

    __slots__ = ("value",)

    def __init__(self, value: threading.local) -> None:
        self.value = value

    def read(self) -> dict[Any, Any]:
        return dict(self.value.__dict__)

    def write(self, content: dict[Any, Any]) -> None:
        held = self.value.__dict__
        held.clear()
        held.update(content)


def content_of(holder: Any) -> dict[Any, Any]:
    """What a holder holds, by name, key or index; of a set each entry."""
    if isinstance(holder, dict):
        return {key: value for key, value in dict.items(holder)}  # noqa: C416  # a subclass may make values as it is asked
    if isinstance(holder, Variable | Names | Slots | OfThread):
        return holder.read()
    return dict.fromkeys(holder, True) if isinstance(holder, set) else dict(enumerate(holder))


def fill(holder: Any, content: dict[Any, Any]) -> None:
    """Let a holder hold `content`, as `content_of` gave it, and nothing else."""
    if isinstance(holder, Variable | Names | Slots | OfThread):
        holder.write(content)
    elif isinstance(holder, dict):
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict
        kind.clear(holder)
        for key, value in content.items():
            kind.__setitem__(holder, key, value)
    elif isinstance(holder, list | bytearray):
        holder[:] = type(holder)(content.values())
    else:
        holder.clear()
        if isinstance(holder, deque):
            holder.extend(content.values())
        else:
            holder.update(content)
