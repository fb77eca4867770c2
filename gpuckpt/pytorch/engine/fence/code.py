"""What code leads to: the variables that functions name, in their modules' globals, in classes and in what they close over, and
those of the functions, classes and modules that these name in turn.

Code of torch, NumPy and Python's own library is not followed, nor is anything beyond four calls, or more than 256 functions.
"""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Container, Iterable
from functools import partial
from typing import Any

from torch import nn

from gpuckpt.pytorch.engine.fence.holders import STATES, Names, ValueKind, Variable, is_foreign, kind_of
from gpuckpt.pytorch.engine.fence.tensors import TensorUse

__all__ = ["Code", "Lead", "code_of"]

_DEPTH = 4  # of functions that name functions
_MOST = 256  # functions and classes
_OPERATORS = frozenset(
    f"__{name}__" for name in ("call", "getitem", "getattr", "iter", "len", "contains", "bool", "float")
)
_MAKING = _OPERATORS | {"__init__", "__new__", "__post_init__", "__enter__", "__exit__"}


class Lead:
    """What some functions lead to. `spaces`: names of globals and of attributes of classes; `cells`: variables that they close
    over; `defaults`: of their parameters, such as a dict that serves as a cache. Each with what is known of tensors there."""

    __slots__ = ("_met", "_spaces", "_waiting", "cells", "defaults")

    def __init__(self) -> None:
        self._spaces: dict[int, Names] = {}
        self.cells: list[tuple[Variable, TensorUse]] = []
        self.defaults: list[tuple[Any, str, TensorUse]] = []
        self._met: set[Any] = set()
        self._waiting: deque[tuple[types.FunctionType, int]] = deque()

    @property
    def spaces(self) -> Iterable[Names]:
        return self._spaces.values()

    def functions(self, functions: Iterable[types.FunctionType], depth: int = _DEPTH) -> Lead:
        """Follow `functions` and what they name."""
        self._waiting.extend((function, depth) for function in functions)
        while self._waiting:
            function, left = self._waiting.popleft()
            self._function(function, left, own=False)
        return self

    def globals_of(self, function: types.FunctionType) -> Lead:
        """Follow what `function` names. What it closes over, and its defaults, are those of one of many that have its code."""
        self._function(function, _DEPTH, own=True)
        return self.functions(())

    def attributes(self, cls: type, names: Iterable[str], depth: int = _DEPTH) -> None:
        """Those of the attributes of one class called `names` that may change."""
        self._space(cls, names, depth)

    def methods(
        self, cls: type, names: Iterable[str], depth: int = _DEPTH, operators: Container[str] = _OPERATORS
    ) -> Lead:
        """Follow those methods of a class that are called `names` or are `operators`, and note attributes that they name."""
        if cls in self._met or len(self._met) >= _MOST or depth <= 0 or issubclass(cls, nn.Module):
            return self
        self._met.add(cls)
        wanted = set(names)
        for kind in cls.__mro__:
            if is_foreign(kind):
                continue
            found = [(name, _inner(value)) for name, value in vars(kind).items()]
            called = [f for name, f in found if f is not None and (name in wanted or name in operators)]
            self._space(kind, {*wanted, *(name for f in called for name in code_of(f.__code__).names)}, depth)
            self._waiting.extend((f, depth - 1) for f in called)
        return self

    def _function(self, function: types.FunctionType, depth: int, own: bool) -> None:
        code = function.__code__
        if code in self._met or len(self._met) >= _MOST:
            return
        self._met.add(code)
        names = code_of(code).names
        self._space(function.__globals__, names, depth)
        if own:
            return
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if _may_change(value):
                self.cells.append((Variable(cell, name), TensorUse()))
            self._follow(value, names, depth)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if kind_of(value) not in (ValueKind.PLAIN, ValueKind.CODE):
                self.defaults.append((value, f"default of {function.__name__}", TensorUse()))
            self._follow(value, names, depth)

    def _space(self, held: Any, names: Iterable[str], depth: int) -> None:
        content = vars(held) if isinstance(held, type) else held
        for name in names:
            if name in content and not name.startswith("__"):
                value = content[name]
                if _may_change(value):
                    space = self._spaces.get(id(held))
                    if space is None:
                        space = self._spaces[id(held)] = Names(held)
                    space.names.setdefault(name, TensorUse())
                self._follow(value, names, depth)

    def _follow(self, value: Any, names: Iterable[str], depth: int) -> None:
        if isinstance(value, types.ModuleType):
            if depth > 0 and value not in self._met and not is_foreign(_Named(value)):
                self._met.add(value)
                self._space(vars(value), names, depth - 1)
        elif isinstance(value, type):
            if not is_foreign(value):
                self.methods(value, names, depth, _MAKING)
        elif (function := _inner(value)) is not None:
            if depth > 0 and not is_foreign(function):
                self._waiting.append((function, depth - 1))
        elif kind_of(value) is ValueKind.OBJECT:
            self.methods(type(value), names, depth)


class _Named:
    def __init__(self, module: types.ModuleType) -> None:
        self.__module__ = module.__name__


def _may_change(value: Any) -> bool:
    return type(value) in STATES or kind_of(value) not in (ValueKind.PLAIN, ValueKind.CODE)


def _inner(value: Any) -> types.FunctionType | None:
    """The function behind a method, a property or a partial."""
    while not isinstance(value, types.FunctionType):
        if isinstance(value, types.MethodType | staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, partial):
            value = value.func
        else:
            return None
    return value


class Code:
    """What is known of code: the `names` that it looks up, attributes included, and what its calls have shown."""

    __slots__ = ("_classes", "_lead", "_uses", "draws", "names", "trials")

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self.draws = "random" in self.names  # from Python's or NumPy's own generators
        self.trials = 2
        self._uses: dict[str, TensorUse] = {}
        self._lead: Lead | None = None
        self._classes: weakref.WeakKeyDictionary[type, Lead] = weakref.WeakKeyDictionary()

    def use(self, name: str) -> TensorUse:
        """What is known of the tensors that a variable leads to."""
        return self._uses.setdefault(name, TensorUse())

    def lead(self, function: types.FunctionType) -> Lead:
        """Where `function`, of this code, leads to."""
        if self._lead is None:
            self._lead = Lead().globals_of(function)
        return self._lead

    def lead_of(self, cls: type) -> Lead:
        """Where objects of a class lead code that calls methods of theirs."""
        found = self._classes.get(cls)
        if found is None:
            found = self._classes[cls] = Lead().methods(cls, self.names).functions(())
        return found


_codes: dict[types.CodeType, Code] = {}
_MOST_CODES = 4096


def code_of(code: types.CodeType) -> Code:
    """The same for all functions of one code."""
    found = _codes.get(code)
    if found is None:
        if len(_codes) >= _MOST_CODES:  # code that is created again and again
            _codes.clear()
        found = _codes[code] = Code(_names_in(code))
    return found


def _names_in(code: types.CodeType) -> dict[str, None]:
    """The names that a code and the functions inside it look up, attributes included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names_in(constant))
    return names
