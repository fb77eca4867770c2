"""What a function can reach besides its arguments: modules, and generators of random numbers.

Looked for where real code keeps them: the function itself (a module, a bound method, a partial), what it closes over, its
defaults, the globals that its code names, attributes of the modules, and arguments. Objects of other kinds are not looked into.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gpuckpt.pytorch.engine.fence.randomness import is_generator

__all__ = ["Scope", "reaches_anything"]

_DEPTH = 4  # of functions within functions


class _Code:
    """What is known of code: the names that it looks up, and what its calls have shown."""

    __slots__ = ("draws", "names", "trials")

    def __init__(self, code: types.CodeType | None = None) -> None:
        self.names = () if code is None else tuple(_names_in(code))
        self.draws = False  # from Python's or NumPy's own generators
        self.trials = 2


_codes: dict[types.CodeType, _Code] = {}
_callables: weakref.WeakKeyDictionary[Any, _Code] = weakref.WeakKeyDictionary()  # modules, and classes with __call__
_MOST = 4096


def _known(code: types.CodeType) -> _Code:
    found = _codes.get(code)
    if found is None:
        if len(_codes) >= _MOST:  # code that is created again and again
            _codes.clear()
        found = _codes[code] = _Code(code)
    return found


class Scope:
    """Modules (`roots`) and `generators` that a call of `function` with `leaves` as arguments may use. `learned`: what earlier
    calls of the same modules, or of the same code, have shown."""

    __slots__ = ("generators", "learned", "roots")

    def __init__(self, function: Any, leaves: Iterable[Any]) -> None:
        roots: dict[nn.Module, None] = {}
        generators: dict[int, Any] = {}
        for value in _reached(function, _DEPTH):
            if isinstance(value, nn.Module):
                roots[value] = None
            elif is_generator(value):
                generators[id(value)] = value
        for leaf in leaves:
            if isinstance(leaf, nn.Module):
                roots[leaf] = None
            elif not isinstance(leaf, torch.Tensor) and is_generator(leaf):
                generators[id(leaf)] = leaf
        for root in roots:
            for generator in _generators_of(root):
                generators[id(generator)] = generator
        self.roots = tuple(roots)
        self.generators = tuple(generators.values())
        # One piece of code may serve many modules (a loop with a lambda in it): then they are what is learned of.
        self.learned = [_learned_of(root) for root in roots] if roots else [_learned_of(function)]


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
        found = _callables[key] = _Code()
    return found


def _reached(function: Any, depth: int) -> list[Any]:
    if isinstance(function, nn.Module):
        return [function]
    found: list[Any] = []
    if depth == 0:
        return found
    if isinstance(function, functools.partial):
        found += _reached(function.func, depth - 1)
        for value in (*function.args, *function.keywords.values()):
            found += _looked_at(value, depth)
        return found
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        found.append(owner)
    function = getattr(function, "__func__", function)
    if hasattr(function, "__wrapped__"):
        function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        return found
    for cell in function.__closure__ or ():
        try:
            found += _looked_at(cell.cell_contents, depth)
        except ValueError:  # not filled yet
            continue
    for value in function.__defaults__ or ():
        found += _looked_at(value, depth)
    for value in (function.__kwdefaults__ or {}).values():
        found += _looked_at(value, depth)
    names = function.__globals__
    for name in _known(function.__code__).names:
        value = names.get(name)
        if value is not None and (isinstance(value, nn.Module) or is_generator(value)):
            found.append(value)
    return found


def _looked_at(value: Any, depth: int) -> list[Any]:
    if isinstance(value, nn.Module) or is_generator(value):
        return [value]
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return _reached(value, depth - 1)
    if isinstance(value, list | tuple) and len(value) <= 64:
        return [item for item in value if isinstance(item, nn.Module) or is_generator(item)]
    return []


def _names_in(code: types.CodeType) -> dict[str, None]:
    """The names that a code and the functions inside it look up, attributes included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names_in(constant))
    return names


class _GeneratorSearch:
    """Where a tree of modules keeps generators: attributes, and globals that its forwards name."""

    __slots__ = ("count", "found")

    def __init__(self, root: nn.Module) -> None:
        self.count = sum(1 for _ in root.modules())
        found: dict[int, Any] = {}
        for module in root.modules():
            for value in module.__dict__.values():
                if is_generator(value):
                    found[id(value)] = value
        for kind in {type(module) for module in root.modules()}:
            if kind.__module__.partition(".")[0] == "torch":
                continue
            for function in (value for base in kind.__mro__ for value in vars(base).values()):
                if isinstance(function, types.FunctionType) and str(function.__module__).partition(".")[0] != "torch":
                    for value in _reached(function, 1):
                        if is_generator(value):
                            found[id(value)] = value
        self.found = tuple(found.values())


_holders: weakref.WeakKeyDictionary[nn.Module, _GeneratorSearch] = weakref.WeakKeyDictionary()


def _generators_of(root: nn.Module) -> tuple[Any, ...]:
    held = _holders.get(root)
    if held is None:
        held = _holders[root] = _GeneratorSearch(root)
    return held.found
