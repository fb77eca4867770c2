"""What holds Python objects: variables, slots and containers, read and written alike."""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuckpt.pytorch.engine.fence.randomness import GENERATORS

__all__ = [
    "LARGEST",
    "PLAIN",
    "STATES",
    "Slots",
    "ValueKind",
    "Variable",
    "content_of",
    "fill",
    "holders_in",
    "kind_of",
]

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})
LARGEST = 64
"""Entries of a container that is looked into."""

STATES = (int, float, bool, str, complex, type(None))
"""Kinds of plain values that a variable may change between."""

_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, enum.Enum)


class ValueKind(enum.Enum):
    """What there is to look at in a value."""

    PLAIN = enum.auto()  # nothing: numbers, texts, code, classes, instances of foreign classes
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
    if cls in PLAIN or issubclass(cls, _CODE):
        return ValueKind.PLAIN
    for kind, classes in (
        (ValueKind.TENSOR, torch.Tensor),
        (ValueKind.MODULE, nn.Module),
        (ValueKind.GENERATOR, GENERATORS),
        (ValueKind.ARRAY, np.ndarray),
        (ValueKind.TUPLE, (tuple, frozenset)),
        (ValueKind.CONTAINER, _CONTAINERS),
    ):
        if issubclass(cls, classes):
            return kind
    return ValueKind.PLAIN if cls.__module__.partition(".")[0] in _FOREIGN else ValueKind.OBJECT


def holders_in(value: Any) -> list[Any]:
    """What holds the parts of a container or an object: itself, its dict, its slots."""
    found = [value] if kind_of(value) is ValueKind.CONTAINER else []
    cls = type(value)
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
    """A variable by its name: in a module's globals or attributes, of a class, or of a function that closes over it."""

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
        if isinstance(held, type):
            held = vars(held)
        return {name: held[name]} if name in held else {}

    def write(self, content: dict[Any, Any]) -> None:
        held, name = self.held, self.name
        if isinstance(held, types.CellType):
            if content:
                held.cell_contents = content[name]
            else:
                del held.cell_contents
        elif isinstance(held, type):
            setattr(held, name, content[name]) if content else delattr(held, name)
        elif content:
            held[name] = content[name]
        else:
            held.pop(name, None)


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


def content_of(holder: Any) -> dict[Any, Any]:
    """What a holder holds, by name, key or index; of a set each entry."""
    if isinstance(holder, dict):
        return {key: value for key, value in dict.items(holder)}  # noqa: C416  # a subclass may make values as it is asked
    if isinstance(holder, Variable | Slots):
        return holder.read()
    return dict.fromkeys(holder, True) if isinstance(holder, set) else dict(enumerate(holder))


def fill(holder: Any, content: dict[Any, Any]) -> None:
    """Let a holder hold `content`, as `content_of` gave it, and nothing else."""
    if isinstance(holder, Variable | Slots):
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
