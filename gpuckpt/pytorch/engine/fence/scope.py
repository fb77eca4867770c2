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

from gpuckpt.pytorch.engine.fence.code import Code, Lead, code_of
from gpuckpt.pytorch.engine.fence.holders import STATES, ValueKind, Variable, is_foreign, kind_of
from gpuckpt.pytorch.engine.fence.randomness import is_generator
from gpuckpt.pytorch.engine.fence.reached import Reached
from gpuckpt.pytorch.engine.fence.tensors import TensorUse

__all__ = ["ModuleScope", "Scope", "reaches_anything", "scope_of"]

_MOST = 64  # functions that are met in variables

_callables: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()  # modules, and classes with __call__


class Scope:
    """What a call of `function` with `leaves` as arguments may use. `reached`: Python objects, among them modules and generators;
    `learned`: what earlier calls of the same modules, or of the same code, have shown; `iterators`: names of those that the call
    would use up."""

    __slots__ = ("_met", "iterators", "learned", "reached", "roots")

    def __init__(self, function: Any, leaves: Iterable[Any]) -> None:
        self.reached = Reached()
        self.iterators: list[str] = []
        self._met: dict[int, Any] = {}
        self._function(function, whole=False)
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
        self.follow()
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

    def lead(self, lead: Lead, whole: bool) -> None:
        """Note what code leads to."""
        reached = self.reached
        for names in lead.spaces:
            reached.names(names, whole=whole)
        for variable, use in lead.cells:
            for value in variable.read().values():
                reached.variable(variable, value, use, whole=whole)
        for value, name, use in lead.defaults:
            reached.look(value, name, use, whole=whole)

    def follow(self) -> None:
        """Functions that were met, and what their code leads to."""
        reached = self.reached
        while reached.callables and len(self._met) < _MOST:
            self._function(*reached.callables.pop())

    def _function(self, function: Any, whole: bool) -> None:
        reached = self.reached
        if isinstance(function, nn.Module):
            reached.modules[id(function)] = function
            return
        if id(function) in self._met:
            return
        self._met[id(function)] = function
        if isinstance(function, functools.partial):
            self._function(function.func, whole)
            known = _learned_of(function)
            for value in (*function.args, *function.keywords.values()):
                self._value(value, "argument", known, whole)
            return
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            reached.modules[id(owner)] = owner
        elif owner is not None and kind_of(owner) is not ValueKind.PLAIN:
            reached.look(owner, type(owner).__name__, _learned_of(function).use("self"), whole=whole)
        function = getattr(function, "__func__", function)
        if isinstance(owner, nn.Module) and vars(type(owner)).get(getattr(function, "__name__", ""), self) is function:
            return  # as other code of the module
        if hasattr(function, "__wrapped__"):
            if isinstance(function, types.FunctionType) and not is_foreign(function):
                self._function(inspect.unwrap(function), whole)
            else:
                function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType):
            if kind_of(function) not in (ValueKind.PLAIN, ValueKind.CODE):  # an object that can be called
                reached.look(function, type(function).__name__, _learned_of(function).use("self"), whole=whole)
            return
        code = code_of(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            reached.variable(Variable(cell, name), value, code.use(name), whole=whole)
            if isinstance(value, Iterator):
                self.iterators.append(f"{type(value).__name__!r} called {name!r}")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(value, "default", code, whole)
        self.lead(code.lead(function), whole)

    def _value(self, value: Any, name: str, code: Code, whole: bool) -> None:
        """What a function gets from where it was made."""
        if isinstance(value, Iterator):
            self.iterators.append(f"{type(value).__name__!r} called {name!r}")
        else:
            self.reached.look(value, name, code.use(name), whole=whole)


def reaches_anything(function: Any) -> bool:
    """Whether a call without arguments has anything to work on: a module, a method's object, what a function closes over."""
    if isinstance(function, nn.Module | functools.partial) or not hasattr(function, "__code__"):
        return True
    code, names = function.__code__, function.__globals__
    bound = getattr(function, "__self__", None) is not None
    given = function.__closure__ or function.__defaults__ or function.__kwdefaults__
    held = (names.get(name) for name in code_of(code).names)
    return bool(bound or given) or any(isinstance(value, nn.Module | torch.Tensor) for value in held)


def _learned_of(function: Any) -> Code:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if isinstance(code, types.CodeType):
        return code_of(code)
    key = function if isinstance(function, nn.Module) else type(function)
    found = _callables.get(key)
    if found is None:
        functions = _functions_of(function) if isinstance(function, nn.Module) else ()
        found = _callables[key] = Code({name: None for f in functions for name in code_of(f.__code__).names})
    return found


def _functions_of(root: nn.Module) -> list[types.FunctionType]:
    """The functions of the classes of a tree of modules, those of torch left out."""
    kinds = {kind: None for module in root.modules() for kind in type(module).__mro__}
    return [
        value
        for kind in kinds
        if not is_foreign(kind)
        for value in vars(kind).values()
        if isinstance(value, types.FunctionType) and not is_foreign(value)
    ]


class ModuleScope:
    """What a tree of modules reaches by its classes: where their code leads (`lead`), attributes of the classes included, and
    `generators`, there and in attributes of the modules."""

    __slots__ = ("generators", "lead")

    def __init__(self, root: nn.Module) -> None:
        self.lead = Lead()
        for kind in {kind for module in root.modules() for kind in type(module).__mro__}:
            if not is_foreign(kind):
                self.lead.attributes(kind, [name for name in vars(kind) if name not in _OF_CLASSES])
        self.lead.functions(_functions_of(root))
        held = [module.__dict__ for module in root.modules()] + [names.read() for names in self.lead.spaces]
        found = {id(value): value for values in held for value in values.values() if is_generator(value)}
        self.generators = tuple(found.values())


_OF_CLASSES = frozenset({*vars(nn.Module), "__annotations__"})

_holders: weakref.WeakKeyDictionary[nn.Module, ModuleScope] = weakref.WeakKeyDictionary()


def scope_of(root: nn.Module) -> ModuleScope:
    """The same for a tree that was looked at before."""
    held = _holders.get(root)
    if held is None:
        held = _holders[root] = ModuleScope(root)
    return held
