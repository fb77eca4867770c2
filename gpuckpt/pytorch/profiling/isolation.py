"""Running one part of a model by itself, and leaving no trace: tensors cut loose from their past, and the model as it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpuckpt.planning import Stage
from gpuckpt.pytorch._torch_internals import set_versions, version_number
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.fence.attributes import INTERNAL
from gpuckpt.pytorch.engine.fence.holders import LARGEST, ValueKind, content_of, fill, holders_in, kind_of
from gpuckpt.pytorch.profiling.sharding import sharding_unchanged

__all__ = [
    "DroppedResults",
    "ModelState",
    "ParameterWrites",
    "connected",
    "cut",
    "cut_call",
    "fresh",
    "random_states",
    "set_random_states",
    "unchanged",
    "watch_draws",
]


class _Connect(torch.autograd.Function):
    """Makes a tensor that is cut from its graph require a gradient without becoming a leaf (which autograd would take
    for a parameter, and which must not be changed in place) and without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor, past: tuple[Past, ...]) -> torch.Tensor:
        ctx.past = past
        # The same bytes with a version counter of their own: what autograd does to this one is not done to the caller's.
        alias = tensor.data
        set_versions((alias,), (tensor._version,))
        return alias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, None]:
        return None, None, None


class Past:
    """Stands for a stage whose graph was cut off, and lives as long as that would have: while anything that goes on with its
    result does. `given`: the same of what the stage itself has gone on with."""

    __slots__ = ("__weakref__", "given")

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.given = past_of(tensors)


def past_of(tensors: Iterable[torch.Tensor]) -> tuple[Past, ...]:
    """The stages that `tensors` come from, whatever was done in between."""
    found: dict[Past, None] = {}
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = {None}
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        if isinstance(node, _Connect._backward_cls):
            found.update(dict.fromkeys(node.past))  # type: ignore[attr-defined]  # the context of its forward
        else:
            waiting += [following for following, _ in node.next_functions]
    return tuple(found)


class DroppedResults:
    """Which calls' results are dropped while the forward goes on, and when."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[Past]] = []  # of each call
        self._gone: dict[int, tuple[int, bool]] = {}  # by call: in which one or, where in none, before which
        self._inside = self._over = False

    def begin(self, tensors: Iterable[torch.Tensor]) -> Past:
        """A call begins that goes on with `tensors`."""
        self._inside = True
        return Past(tensors)

    def end(self, past: Past, needed: Callable[[], bool], tensors: Iterable[torch.Tensor]) -> None:
        """It is over, and has gone on with these as well. Notice when its result is gone; if what it saved is `needed` all the
        same, that is not."""
        number = len(self._refs)
        past.given += past_of(tensors)

        def gone(_: Any) -> None:
            if not self._over and not needed():
                self._gone[number] = len(self._refs), self._inside

        self._refs.append(weakref.ref(past, gone))
        self._inside = False

    def close(self) -> None:
        """The forward is over."""
        self._over = True

    def mark(self, stages: list[Stage], owned: Sequence[int]) -> None:
        """Say so of those `stages` to which no backward comes; `owned`: the number of each call's stage."""
        own = set(owned)
        for number in own:
            calls = [call for call, owner in enumerate(owned) if owner == number]
            if not all(call in self._gone for call in calls):
                continue
            last = 0
            for call in calls:
                at, inside = self._gone[call]
                last = max(last, owned[at] + inside if at < len(owned) else len(stages))
            dropped_in = max(0, last - number - 1)
            stages[number] = replace(stages[number], dropped_in=dropped_in, backward_s=0.0, variants=())


def cut(tree: Any, past: Past | None = None) -> Any:
    """The tensors of a nested value without their past, on the same bytes; each requires a gradient as before, and is no
    leaf if it was none. `past` stands for it; None: what the tensors themselves say."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: _cut(tensor, past), tree)


def _cut(tensor: torch.Tensor, past: Past | None = None) -> torch.Tensor:
    if tensor.is_leaf:
        return tensor
    return connected(tensor.detach(), past_of([tensor]) if past is None else (past,))


def connected(tensor: torch.Tensor, past: tuple[Past, ...] = ()) -> torch.Tensor:
    """A detached tensor as one that requires a gradient and is no leaf, on the same bytes."""
    return _Connect.apply(torch.empty((), requires_grad=True), tensor, past)


def fresh(tree: Any) -> Any:
    """Like `cut`, on copies: a stage that changes its input in place does not change the original again, nor the objects among
    its arguments."""
    leaves, spec = pytree.tree_flatten(tree)
    objects = Objects(leaves)
    leaves = [_fresh(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if objects:
        leaves = objects.rebuilt(leaves, [_fresh(tensor) for tensor in objects.tensors])
    return pytree.tree_unflatten(leaves, spec)


def cut_call(
    args: tuple, kwargs: dict[str, Any], past: Past | None = None
) -> tuple[tuple, dict[str, Any], Callable[[], None]]:
    """`cut` for a call, and what hands on to the caller's own dicts and lists what the call has written into them, with the
    `past` that stands for the call."""
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
                theirs.update(
                    {key: cut(item, past) for key, item in ours.items() if first.get(key, written) is not item}
                )
            elif len(ours) != len(first) or any(a is not b for a, b in zip(ours, first, strict=True)):
                same = dict(zip(map(id, first), theirs, strict=True))
                theirs[:] = [same[id(item)] if id(item) in same else cut(item, past) for item in ours]

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


def watch_draws() -> Callable[[], bool]:
    """From here on: whether random numbers have been drawn."""
    before = random_states()

    def have_been() -> bool:
        with _disable_current_modes():
            return not all(map(torch.equal, before, random_states()))

    return have_been


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
