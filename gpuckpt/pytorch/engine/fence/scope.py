"""What a function can reach besides its arguments: modules, generators of random numbers, and state in Python objects.

Looked for where real code keeps them: the function itself (a module, a bound method, a partial), what it closes over, its
defaults, the globals that its code names, attributes of the modules and of their classes, and arguments.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuckpt.pytorch.engine.fence.holders import STATES, ValueKind, Variable, kind_of
from gpuckpt.pytorch.engine.fence.randomness import is_generator
from gpuckpt.pytorch.engine.fence.reached import Reached, TensorUse

__all__ = ["ModuleScope", "Scope", "reaches_anything", "scope_of"]

_DEPTH = 4  # of functions within functions


class _Code:
    """What is known of code: the names that it looks up, and what its calls have shown."""

    __slots__ = ("_uses", "draws", "names", "trials")

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self.draws = "random" in self.names  # from Python's or NumPy's own generators
        self.trials = 2
        self._uses: dict[str, TensorUse] = {}

    def use(self, name: str) -> TensorUse:
        """What is known of the tensors that a variable leads to."""
        return self._uses.setdefault(name, TensorUse())


_codes: dict[types.CodeType, _Code] = {}
_callables: weakref.WeakKeyDictionary[Any, _Code] = weakref.WeakKeyDictionary()  # modules, and classes with __call__
_MOST = 4096


def _known(code: types.CodeType) -> _Code:
    found = _codes.get(code)
    if found is None:
        if len(_codes) >= _MOST:  # code that is created again and again
            _codes.clear()
        found = _codes[code] = _Code(_names_in(code))
    return found


class Scope:
    """What a call of `function` with `leaves` as arguments may use. `reached`: Python objects, among them modules and generators;
    `learned`: what earlier calls of the same modules, or of the same code, have shown; `iterators`: names of those that the call
    would use up."""

    __slots__ = ("iterators", "learned", "reached", "roots")

    def __init__(self, function: Any, leaves: Iterable[Any]) -> None:
        self.reached = Reached()
        self.iterators: list[str] = []
        self._function(function, _DEPTH)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) or (type(leaf) in STATES):
                continue
            if isinstance(leaf, Iterator):
                self.iterators.append(f"{type(leaf).__name__!r} among the arguments")
            elif isinstance(leaf, set | bytearray | np.ndarray) or not hasattr(leaf, "__dict__"):
                self.reached.look(leaf, "argument", TensorUse())  # others are taken apart, see arguments.py
            elif isinstance(leaf, nn.Module):
                self.reached.modules[id(leaf)] = leaf
            elif is_generator(leaf):
                self.reached.generators[id(leaf)] = leaf
        self.roots = tuple(self.reached.modules.values())
        # One piece of code may serve many modules (a loop with a lambda in it): then they are what is learned of.
        self.learned = [_learned_of(root) for root in self.roots] if self.roots else [_learned_of(function)]

    @property
    def generators(self) -> tuple[Any, ...]:
        """Of random numbers: those that are reached, and those that the modules hold."""
        found = dict(self.reached.generators)
        for root in self.reached.modules.values():
            found.update((id(generator), generator) for generator in scope_of(root).generators)
        return tuple(found.values())

    def _function(self, function: Any, depth: int) -> None:
        reached = self.reached
        if isinstance(function, nn.Module):
            reached.modules[id(function)] = function
            return
        if depth == 0:
            return
        if isinstance(function, functools.partial):
            self._function(function.func, depth - 1)
            for value in (*function.args, *function.keywords.values()):
                self._value(value, "argument", _learned_of(function), depth)
            return
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            reached.modules[id(owner)] = owner
        elif owner is not None and kind_of(owner) is not ValueKind.PLAIN:
            reached.look(owner, type(owner).__name__, _learned_of(function).use("self"))
        function = getattr(function, "__func__", function)
        if hasattr(function, "__wrapped__"):
            function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType):
            if kind_of(function) is not ValueKind.PLAIN:  # an object that can be called
                reached.look(function, type(function).__name__, _learned_of(function).use("self"))
            return
        code = _known(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            reached.variable(Variable(cell, name), value, code.use(name), lasting=True)
            self._value(value, name, code, depth, noted=True)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(value, "default", code, depth)
        for name, value in _named(function.__globals__, code.names):
            reached.variable(Variable(function.__globals__, name), value, code.use(name), lasting=True)

    def _value(self, value: Any, name: str, code: _Code, depth: int, noted: bool = False) -> None:
        """What a function gets from where it was made."""
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            self._function(value, depth - 1)
        elif isinstance(value, Iterator):
            self.iterators.append(f"{type(value).__name__!r} called {name!r}")
        elif not noted:
            self.reached.look(value, name, code.use(name))


def _named(names: dict[str, Any], wanted: Iterable[str]) -> list[tuple[str, Any]]:
    """Those of the globals called `wanted` that may change."""
    found = [(name, names[name]) for name in wanted if name in names and not name.startswith("__")]
    return [(name, value) for name, value in found if type(value) in STATES or kind_of(value) is not ValueKind.PLAIN]


def reaches_anything(function: Any) -> bool:
    """Whether a call without arguments has anything to work on: a module, a method's object, what a function closes over."""
    if isinstance(function, nn.Module | functools.partial) or not hasattr(function, "__code__"):
        return True
    code, names = function.__code__, function.__globals__
    bound = getattr(function, "__self__", None) is not None
    given = function.__closure__ or function.__defaults__ or function.__kwdefaults__
    held = (names.get(name) for name in _known(code).names)
    return bool(bound or given) or any(isinstance(value, nn.Module | torch.Tensor) for value in held)


def _learned_of(function: Any) -> _Code:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if isinstance(code, types.CodeType):
        return _known(code)
    key = function if isinstance(function, nn.Module) else type(function)
    found = _callables.get(key)
    if found is None:
        functions = _functions_of(function) if isinstance(function, nn.Module) else ()
        found = _callables[key] = _Code({name: None for f in functions for name in _names_in(f.__code__)})
    return found


def _names_in(code: types.CodeType) -> dict[str, None]:
    """The names that a code and the functions inside it look up, attributes included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names_in(constant))
    return names


def _functions_of(root: nn.Module) -> list[types.FunctionType]:
    """The functions of the classes of a tree of modules, those of torch left out."""
    kinds = {kind: None for module in root.modules() for kind in type(module).__mro__}
    return [
        value
        for kind in kinds
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing")
        for value in vars(kind).values()
        if isinstance(value, types.FunctionType) and str(value.__module__).partition(".")[0] != "torch"
    ]


class ModuleScope:
    """What a tree of modules reaches by its classes: `generators` in attributes, and in globals that its functions name; `names`
    of globals, and of attributes of the classes, that may change."""

    __slots__ = ("generators", "names")

    def __init__(self, root: nn.Module) -> None:
        found: dict[int, Any] = {}
        for module in root.modules():
            for value in module.__dict__.values():
                if is_generator(value):
                    found[id(value)] = value
        self.names: dict[tuple[int, str], tuple[Variable, TensorUse]] = {}
        for function in _functions_of(root):
            for name, value in _named(function.__globals__, _known(function.__code__).names):
                if is_generator(value):
                    found[id(value)] = value
                self.names[id(function.__globals__), name] = Variable(function.__globals__, name), TensorUse()
        for kind in {kind for module in root.modules() for kind in type(module).__mro__}:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"):
                for name, value in list(vars(kind).items()):
                    if (
                        not name.startswith("__")
                        and name not in _OF_CLASSES
                        and type(value) in (*STATES, list, dict, set)
                    ):
                        self.names[id(kind), name] = Variable(kind, name), TensorUse()
        self.generators = tuple(found.values())


_OF_CLASSES = frozenset({*vars(nn.Module), "__annotations__"})

_holders: weakref.WeakKeyDictionary[nn.Module, ModuleScope] = weakref.WeakKeyDictionary()


def scope_of(root: nn.Module) -> ModuleScope:
    """The same for a tree that was looked at before."""
    held = _holders.get(root)
    if held is None:
        held = _holders[root] = ModuleScope(root)
    return held
