"""Running one part of a model by itself, and leaving no trace: tensors cut loose from their past, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpuckpt.pytorch._torch_internals import set_versions, version_number
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.fence.attributes import INTERNAL
from gpuckpt.pytorch.engine.fence.holders import LARGEST, ValueKind, content_of, fill, holders_in, kind_of
from gpuckpt.pytorch.profiling.sharding import sharding_unchanged

__all__ = [
    "ModelState",
    "ParameterWrites",
    "connected",
    "cut",
    "cut_call",
    "fresh",
    "have_drawn",
    "random_states",
    "set_random_states",
    "unchanged",
]


class _Connect(torch.autograd.Function):
    """Makes a tensor that is cut from its graph require a gradient without becoming a leaf (which autograd would take
    for a parameter, and which must not be changed in place) and without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        # The same bytes with a version counter of their own: what autograd does to this one is not done to the caller's.
        alias = tensor.data
        set_versions((alias,), (tensor._version,))
        return alias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None]:
        return None, None


def cut(tree: Any) -> Any:
    """The tensors of a nested value without their past, on the same bytes; each requires a gradient as before, and is no
    leaf if it was none."""
    return pytree.tree_map_only(torch.Tensor, _cut, tree)


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_leaf else connected(tensor.detach())


def connected(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor as one that requires a gradient and is no leaf, on the same bytes."""
    return _Connect.apply(torch.empty((), requires_grad=True), tensor)


def fresh(tree: Any) -> Any:
    """Like `cut`, on copies: a stage that changes its input in place does not change the original again, nor the objects among
    its arguments."""
    leaves, spec = pytree.tree_flatten(tree)
    objects = Objects(leaves)
    leaves = [_fresh(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if objects:
        leaves = objects.rebuilt(leaves, [_fresh(tensor) for tensor in objects.tensors])
    return pytree.tree_unflatten(leaves, spec)


def cut_call(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], Callable[[], None]]:
    """`cut` for a call, and what hands on to the caller's own dicts and lists what the call has written into them."""
    written: list[tuple[Any, Any, Any]] = []  # the caller's container, the call's, and what that held at first

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _cut(value)
        if type(value) is dict or type(value) is list:
            copied: Any = (
                {key: walk(value[key]) for key in value} if type(value) is dict else [walk(item) for item in value]
            )
            written.append((value, copied, copied.copy()))
            return copied
        if type(value) is tuple:
            return tuple(walk(item) for item in value)
        return cut(value)

    cut_args = tuple(walk(value) for value in args)
    cut_kwargs = {name: walk(value) for name, value in kwargs.items()}

    def hand_on() -> None:
        for theirs, ours, first in written:
            if isinstance(theirs, dict):
                for key in first.keys() - ours.keys():
                    theirs.pop(key, None)
                theirs.update({key: cut(item) for key, item in ours.items() if first.get(key, written) is not item})
            elif len(ours) != len(first) or any(a is not b for a, b in zip(ours, first, strict=True)):
                same = dict(zip(map(id, first), theirs, strict=True))
                theirs[:] = [same[id(item)] if id(item) in same else cut(item) for item in ours]

    return cut_args, cut_kwargs, hand_on


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return tensor
    copy = tensor.detach().clone()
    if not tensor.requires_grad:
        return copy
    return connected(copy)


class ModelState:
    """What a model's modules hold besides parameters and submodules: attributes and buffers, and what is inside of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = _holders(model)

    def outlived(self) -> bool:
        """Whether forwards since have left tensors where there were none, for later ones to read: a table, a mask, a memory.
        Tensors with a graph, which a later forward is not meant to read, are taken out again."""
        found = False
        for holder, now in _holders(self._model).values():
            before = self._held.get(id(holder), (holder, {}))[1]
            for key, value in now.items():
                was = before.get(key)
                parts = value if isinstance(value, tuple) else (value,)
                if was is value or not any(isinstance(part, torch.Tensor) for part in parts):
                    continue
                if any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts):
                    content = {**content_of(holder), key: was}
                    fill(holder, content if key in before else {k: v for k, v in content.items() if k != key})
                else:
                    found = found or was is None
        return found


def _holders(model: nn.Module) -> dict[int, tuple[Any, dict[Any, Any]]]:
    """Dicts, containers and objects in which the state of a model stands, by id, each with its content."""
    found: dict[int, tuple[Any, dict[Any, Any]]] = {}
    for module in model.modules():
        found[id(module._buffers)] = module._buffers, dict(module._buffers)
        attributes = {name: value for name, value in module.__dict__.items() if name not in INTERNAL}
        found[id(module.__dict__)] = module.__dict__, attributes
        waiting = [(value, _STATE_DEPTH) for value in attributes.values()]
        while waiting:
            value, depth = waiting.pop()
            if depth == 0 or kind_of(value) not in (ValueKind.CONTAINER, ValueKind.OBJECT):
                continue
            for holder in holders_in(value):
                if id(holder) not in found and not (isinstance(holder, Sized) and len(holder) > LARGEST):
                    found[id(holder)] = holder, content_of(holder)
                    waiting += [(item, depth - 1) for item in found[id(holder)][1].values()]
    return found


_STATE_DEPTH = 3  # of objects within objects


class ParameterWrites(TorchDispatchMode):
    """Notices which parameters work changes in place (the average that a momentum encoder is, vectors of a power iteration,
    weights that are clamped), `.data` included, and copies these before; they have their bytes back when `undone()` is left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        plain = [tensor for tensor in model.parameters() if type(tensor.data) is torch.Tensor and not is_lazy(tensor)]
        self._were = [(tensor, tensor.data) for tensor in plain if tensor.layout is torch.strided]
        self._bytes = {data.untyped_storage()._cdata: data for _, data in self._were}
        self._copies: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
                    for leaf in pytree.tree_leaves(given):
                        self._copy(leaf)
        return func(*args, **(kwargs or {}))

    def _copy(self, value: Any) -> None:
        if type(value) is torch.Tensor and value.layout is torch.strided:
            key = value.untyped_storage()._cdata
            if key in self._bytes and key not in self._copies:
                self._copies[key] = _whole(self._bytes[key]).clone()

    @contextmanager
    def undone(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._undo()

    def _undo(self) -> None:
        with torch.no_grad(), _disable_current_modes():
            for key, copy in self._copies.items():
                _whole(self._bytes[key]).copy_(copy)
            for tensor, data in self._were:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def random_states() -> list[torch.Tensor]:
    """Where the random number generators stand, of the CPU and of the devices in use."""
    with _disable_current_modes():  # real tensors, also where the rest is fake
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Let the generators stand where `random_states()` found them."""
    cpu_rng, *cuda_rng = states
    torch.set_rng_state(cpu_rng)
    if cuda_rng:
        torch.cuda.set_rng_state_all(cuda_rng)


def have_drawn(before: list[torch.Tensor]) -> bool:
    """Whether random numbers have been drawn since `random_states()` gave `before`."""
    with _disable_current_modes():
        return not all(map(torch.equal, before, random_states()))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers (the same objects, with the same contents), which of its parameters are sharded, and the
    random number generators are as before, and autocast remembers no cast of a weight that was made meanwhile."""
    owners = [(module, dict(module._buffers)) for module in model.modules()]
    contents = {buffer: (buffer.detach().clone(), version_number(buffer)) for buffer in model.buffers()}
    random = random_states()
    try:
        with sharding_unchanged(model):
            yield
    finally:
        for module, buffers in owners:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, (before, version) in contents.items():
                same = (
                    torch.equal(buffer, before) if buffer.layout is torch.strided else version_number(buffer) == version
                )
                if not same:
                    buffer.copy_(before)
        set_random_states(random)
        torch.clear_autocast_cache()
