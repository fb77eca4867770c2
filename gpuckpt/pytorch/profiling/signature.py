"""What a plan depends on: the sizes of everything a model is called with, its modes, and what it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.pytorch._torch_internals import sharded_parameters
from gpuckpt.pytorch.engine.fence.switches import settings
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["Fingerprint", "describe_call", "describe_model"]

_DEPTH = 4  # of objects within objects
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})
_EITHER = frozenset({"training"})  # modes that come and go have plans of their own


def describe_call(args: tuple, kwargs: dict[str, Any], *, numbers: bool) -> Any:
    """What of a call's arguments decides bytes: shapes, strides, dtypes and devices of the tensors, wherever they are, and the
    kinds of everything else. `numbers`: with the values of ints and strings."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, tuple([_describe(leaf, numbers, _DEPTH) for leaf in leaves])


def _describe(leaf: Any, numbers: bool, depth: int) -> Any:
    if isinstance(leaf, torch.Tensor):
        if leaf.layout is not torch.strided:  # how many rows or entries there are, no shape of the whole tells
            parts = tuple([_describe(part, numbers, depth) for part in parts_of(leaf)])
            return leaf.layout, leaf.requires_grad, parts
        if leaf.is_nested:
            raise TypeError(
                "a fitted model was given a nested tensor of strided layout, which has no sizes to plan for; make it with "
                "layout=torch.jagged"
            )
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    # A number with a fraction (a temperature, a rate) decides no shape: another one is no reason to plan again.
    if isinstance(leaf, bool | None):
        return leaf
    if isinstance(leaf, int | str):
        return leaf if numbers else type(leaf)
    if depth == 0 or isinstance(leaf, float | complex | type | nn.Module) or callable(leaf):
        return type(leaf)
    if isinstance(leaf, Mapping):
        return type(leaf), tuple((key, _describe(value, numbers, depth - 1)) for key, value in leaf.items())
    if isinstance(leaf, list | tuple):
        return type(leaf), tuple(_describe(value, numbers, depth - 1) for value in leaf)
    held = (
        {field.name: getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)}
        if dataclasses.is_dataclass(leaf)
        else getattr(leaf, "__dict__", None)
    )
    if not held:
        return type(leaf)
    return type(leaf), tuple((name, _describe(value, numbers, depth - 1)) for name, value in held.items())


class Fingerprint:
    """What a model is made of: its modules, their plain attributes, parameters and buffers. `changed()` tells whether it is
    another than the last time; what a forward changes itself (a counter) does not count."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: set[Any] = set()  # attributes and tensors that forwards were seen to change: (module, name)
        # Gathered for a while, and freed: which form stands in the module says nothing.
        self._sharded = [found for module in model.modules() for found in sharded_parameters(module)]
        self._gathered = {(id(module), name) for found in self._sharded for module, name in found.places}
        self._latest = self._take()
        self._seen = self._glance()

    def _glance(self) -> list[Any] | None:
        """All that `_take` takes, without names and in less than half of the time: while this is the same, so is that. None:
        look at it by name."""
        if self._sharded:
            return None
        found: list[Any] = []
        waiting = [self._model]
        met = {id(self._model)}
        while waiting:
            module = waiting.pop()
            held = module.__dict__
            found += held
            found += [value for value in held.values() if type(value) in _PLAIN]
            found += (
                type(module),
                len(held),
                len(held["_forward_hooks"]),
                len(held["_forward_pre_hooks"]),
                id(held.get("forward")),
            )
            for tensor in held["_parameters"].values():
                if tensor is not None:
                    found += (id(tensor), type(tensor), tensor.shape, tensor.dtype, tensor.device)
            for buffer in held["_buffers"].values():
                if buffer is not None:
                    found += (buffer.shape, buffer.dtype, *(part.untyped_storage()._cdata for part in parts_of(buffer)))
            for child in held["_modules"].values():
                if child is not None and id(child) not in met:
                    met.add(id(child))
                    waiting.append(child)
        return found

    def _unchanged(self) -> bool:
        before, self._seen = self._seen, self._glance()
        return before is not None and before == self._seen

    def _take(self) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for module in self._model.modules():
            number = id(module)
            found[number] = type(module), len(module._forward_hooks), len(module._forward_pre_hooks)
            held = module.__dict__
            for name, value in held.items():
                if type(value) in _PLAIN and name not in _EITHER:
                    found[number, name] = value
            found[number, "forward"] = id(held["forward"]) if "forward" in held else 0
            for name, tensor in module._parameters.items():
                if tensor is not None and (number, name) not in self._gathered:
                    found[number, name] = tensor.shape, tensor.dtype, tensor.device, type(tensor)
            for name, buffer in module._buffers.items():
                if buffer is not None:  # which storage, too: that is how budgets know whose bytes it holds
                    found[number, name] = (
                        buffer.shape,
                        buffer.dtype,
                        *(part.untyped_storage()._cdata for part in parts_of(buffer)),
                    )
        for index, sharded in enumerate(self._sharded):
            found[index, "sharded"] = sharded.tensor.shape, sharded.tensor.dtype, sharded.tensor.device
        return {key: value for key, value in found.items() if key not in self._own} if self._own else found

    def changed(self) -> bool:
        """Whether the model was changed since the last look."""
        if self._unchanged():
            return False
        now = self._take()
        before, self._latest = self._latest, now
        return now != before

    def refresh(self) -> None:
        """What the model is now is what it is compared with."""
        self._latest, self._seen = self._take(), self._glance()

    def learn(self) -> None:
        """A forward is over: what it changed of the model is its own business."""
        if self._unchanged():
            return
        now = self._take()
        if now != self._latest:
            both = now.keys() & self._latest.keys()
            self._own |= {key for key in both if now[key] != self._latest[key] and isinstance(key, tuple)}
            self._own |= {key for key in now.keys() ^ self._latest.keys() if isinstance(key, tuple)}
            self._latest = {key: value for key, value in now.items() if key not in self._own}


def describe_model(parts: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> tuple[Any, ...]:
    """What a plan depends on besides its inputs: the mode of every module, what is trained, autocast and torch's settings."""
    autocast = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
    )
    # Hugging Face's own checkpointing, which may be turned on between two steps, is refused where it is measured.
    modes = tuple([(part.training, part.__dict__.get("gradient_checkpointing", False)) for part in parts])
    return autocast, settings(), modes, tuple([parameter.requires_grad for parameter in parameters])
