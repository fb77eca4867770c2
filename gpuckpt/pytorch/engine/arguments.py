"""Objects among the arguments of checkpointed work: caches, batches, dicts and lists that a block reads and writes.

A recompute has to be given them as they were when the work began, and to write into something that is theirs alone. So an object
is taken apart when the work begins, into tensors, which are kept like any other argument, and a recipe that puts a copy together
again. Containers that torch's pytree knows are taken apart by it; here are instances of other classes, by their attributes.

Not taken apart: modules, functions, types, generators of random numbers, and objects of torch's and NumPy's own classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuckpt.pytorch.engine.fence.randomness import is_generator

__all__ = ["Objects"]

_SIMPLE = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, slice})
_DEPTH = 8
_LARGEST_ARRAY_BYTES = 1 << 20

Recipe = Callable[[Sequence[torch.Tensor], dict[int, Any]], Any]


class Objects:
    """The objects among `leaves`. `tensors`: those inside of them, each once, which the caller has to keep for the second run;
    `count`: how many these were when they were released."""

    __slots__ = ("_recipes", "count", "tensors")

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.tensors: list[torch.Tensor] = []
        self._recipes: dict[int, Recipe] = {}
        self.count = 0
        known: dict[int, Any] = {}
        for number, leaf in enumerate(leaves):
            if _is_object(leaf):
                self._recipes[number] = self._taken_apart(leaf, known, _DEPTH)

    def __bool__(self) -> bool:
        return bool(self._recipes)

    def release(self) -> list[torch.Tensor]:
        """`tensors`, which from now on the caller alone keeps: their graphs may lead back to whoever keeps this."""
        found, self.tensors = self.tensors, []
        self.count = len(found)
        return found

    def taken_out(self, leaves: Sequence[Any]) -> list[Any]:
        """`leaves` without the objects, which must not be kept: with the tensors inside of them they would keep whole graphs."""
        return [None if number in self._recipes else leaf for number, leaf in enumerate(leaves)]

    def rebuilt(self, leaves: Sequence[Any], kept: Sequence[torch.Tensor]) -> list[Any]:
        """`leaves` with a fresh copy of each object, as it was. `kept`: what has become of `tensors`."""
        made: dict[int, Any] = {}
        result = list(leaves)
        for number, recipe in self._recipes.items():
            result[number] = recipe(kept, made)
        return result

    def _taken_apart(self, value: Any, known: dict[int, Any], depth: int) -> Recipe:
        if isinstance(value, torch.Tensor):
            if id(value) not in known:
                known[id(value)] = len(self.tensors)
                self.tensors.append(value)
            index = known[id(value)]
            return lambda kept, made: kept[index]
        if type(value) in _SIMPLE or depth == 0:
            return lambda kept, made: value
        if type(value) in (list, tuple, set) or _is_named_tuple(value):
            kind = type(value)
            items = [self._taken_apart(item, known, depth - 1) for item in value]
            if _is_named_tuple(value):
                return lambda kept, made: kind(*(item(kept, made) for item in items))
            return lambda kept, made: kind(item(kept, made) for item in items)
        if type(value) is dict:
            pairs = [(key, self._taken_apart(item, known, depth - 1)) for key, item in value.items()]
            return lambda kept, made: {key: item(kept, made) for key, item in pairs}
        if isinstance(value, np.ndarray) and value.nbytes <= _LARGEST_ARRAY_BYTES:
            array = value.copy()
            return lambda kept, made: array.copy()
        if not _is_object(value):
            return lambda kept, made: value
        name = id(value)
        if name in known:  # seen already: the same object again, also where it refers to itself
            return lambda kept, made: made[name]
        known[name] = True
        try:
            blank = _blank(value)
        except Exception:  # what cannot be copied is used as it is
            return lambda kept, made: value
        held = [(key, self._taken_apart(item, known, depth - 1)) for key, item in vars(value).items()]
        entries = (
            [(key, self._taken_apart(item, known, depth - 1)) for key, item in value.items()]
            if isinstance(value, dict)
            else None
        )

        def build(kept: Sequence[torch.Tensor], made: dict[int, Any]) -> Any:
            if name in made:
                return made[name]
            twin = made[name] = blank()
            vars(twin).update({key: item(kept, made) for key, item in held})
            if entries is not None:
                dict.update(twin, {key: item(kept, made) for key, item in entries})
            return twin

        return build


def _blank(value: Any) -> Callable[[], Any]:
    """Makes instances of a value's class, to be filled. It refers to nothing inside of `value` where that can be helped: tensors
    there have graphs, and these the work, whose bytes would never be let go."""
    cls: Any = type(value)
    plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    if plain and not isinstance(value, list | set | tuple):
        with suppress(Exception):
            cls.__new__(cls)
            return lambda: cls.__new__(cls)
    copied = copy.copy(value)
    with suppress(Exception):
        emptied = copy.copy(value)
        vars(emptied).clear()
        if isinstance(emptied, dict):
            emptied.clear()
        copy.copy(emptied)
        copied = emptied
    return lambda: copy.copy(copied)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _is_object(value: Any) -> bool:
    """Whether a value is an instance with attributes of its own that work may read and write."""
    if type(value) in _SIMPLE or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, torch.Tensor | nn.Module | type) or callable(value) or is_generator(value):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins", "functools", "threading")
