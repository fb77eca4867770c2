"""What the forward of modules saw in them, so that a recompute sees the same and leaves no trace.

Of every module: its plain attributes and flags (a dropout rate, `training`, a counter, an active adapter), lists and dicts of
such, and which tensors are its parameters and buffers (functional_call, adapters and MAML put others in their place for a
while). A recompute gets all of these as they were, and what it changes itself is undone. Bytes that were changed in place cannot
be brought back: that is a `StateModified`, a `RecomputeMismatch` which names the tensor.

Buffers that a forward writes itself (counters, moving averages, the vectors of a power iteration) are copied before, and the
recompute writes into copies of the copies: each is updated once. Which these are is learned in the first two forwards; from then
on the copies are kept, and charged, with a frame's inputs. Running statistics of torch's BatchNorm need no copy: a momentum of
zero leaves them bit for bit, and the same kernel runs.

What DistributedDataParallel wraps runs again without it. Parameters that FSDP2 gathers and frees are left to it;
what an optimizer changes is their sharded form, which is looked at.

Attributes that are tensors or objects: see reached.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuckpt.errors import StateModified
from gpuckpt.pytorch._torch_internals import forward_inside, keep_sharding_state, version_number
from gpuckpt.pytorch.engine.fence.attributes import (
    ABSENT,
    ELSEWHERE,
    captured,
    containers,
    hooks_of,
    refill,
    restore,
    restore_hooks,
)
from gpuckpt.pytorch.engine.fence.holders import PLAIN, Variable
from gpuckpt.pytorch.engine.fence.norms import freeze
from gpuckpt.pytorch.engine.fence.reached import Reached, TensorUse
from gpuckpt.pytorch.engine.fence.watched import Watched
from gpuckpt.pytorch.engine.verify import unread

__all__ = ["ModuleState"]


class ModuleState:
    """What a forward that begins now sees. `kept`: tensors that belong to no model, which a frame has to keep with its inputs."""

    __slots__ = (
        "_again",
        "_copies",
        "_hooks",
        "_modules",
        "_seen",
        "_sharded",
        "_storages",
        "_tensors",
        "_trained",
        "_versions",
        "_watched",
        "kept",
    )

    def __init__(self, watched: Watched, reached: Reached) -> None:
        self._watched = watched
        self._modules: list[Any] = [part.ref() for part in watched.parts]
        self._seen = [
            [
                value
                if type(value := held.get(name, ABSENT)) in PLAIN
                else self._look(number, held, name, value, reached)
                for name in part.names
            ]
            for number, (part, held) in enumerate(
                zip(watched.parts, (module.__dict__ for module in self._modules), strict=True)
            )
        ]
        self._hooks = [hooks_of(module.__dict__) for module in self._modules]
        dicts = self._dicts()
        tensors = [dicts[part][is_buffer].get(name) for part, is_buffer, name in watched.places]
        self._versions = [None if tensor is None else version_number(tensor) for tensor in tensors]
        self._trained = [tensor is not None and tensor.requires_grad for tensor in tensors]
        self._storages = [None if tensor is None else _storage(tensor) for tensor in tensors]
        self._sharded = [_version_of(ref) for ref, _, _ in watched.sharded]
        self._copies: dict[int, torch.Tensor] = {}  # of buffers that may be written; while that is not known, of all
        if watched.trials or watched.written:
            with torch.no_grad():
                for number in range(len(tensors)) if watched.trials else sorted(watched.written):
                    tensor = tensors[number]
                    if watched.places[number].is_buffer and tensor is not None:
                        self._copies[number] = tensor.detach().clone()
        # A leaf belongs to a model or to the caller. Anything else was computed, and lives by being kept.
        computed = [number for number, tensor in enumerate(tensors) if tensor is not None and not tensor.is_leaf]
        self.kept: list[torch.Tensor] = [tensor for tensor in tensors if tensor is not None and not tensor.is_leaf]
        self._tensors: list[Any] = tensors
        for index, number in enumerate(computed):
            self._tensors[number] = index
        self._again: dict[int, int] = {}  # of buffers that are known to be written: where among `kept` their copies are
        if not watched.trials:
            self._again = {number: len(self.kept) + place for place, number in enumerate(self._copies)}
            self.kept += self._copies.values()
            self._copies = {}

    def _look(self, number: int, held: dict[str, Any], name: str, value: Any, reached: Reached) -> Any:
        taken = captured(value)
        if taken is not ELSEWHERE:
            return taken
        uses = self._watched.uses
        use = uses.get((number, name))
        if use is None:
            use = uses[number, name] = TensorUse()
        reached.variable(Variable(held, name), value, use)
        return ABSENT

    @property
    def modules(self) -> set[Any]:
        """All modules whose state this is."""
        return set(self._modules)

    @property
    def rewritten(self) -> str | None:
        """A parameter that forward changes in place itself, so that it cannot run again."""
        return self._watched.rewritten

    @property
    def copies(self) -> list[torch.Tensor]:
        """Copies of buffers beside those in `kept`."""
        return list(self._copies.values())

    def _dicts(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(module._parameters, module._buffers) for module in self._modules]

    def learn(self, for_good: bool = False) -> None:
        """The forward is over: which buffers has it written? `for_good`: it will be the same ones from now on."""
        watched = self._watched
        if not watched.trials:
            return
        dicts = self._dicts()
        for number, (_, is_buffer, name) in enumerate(watched.places):
            tensor = self._tensors[number]
            if not is_buffer and isinstance(tensor, torch.Tensor) and version_number(tensor) != self._versions[number]:
                watched.rewritten = name
        for number in list(self._copies):
            part, is_buffer, name = watched.places[number]
            tensor = dicts[part][is_buffer].get(name)
            if (
                tensor is not self._tensors[number]
                or version_number(tensor) != self._versions[number]
                or (tensor.layout is torch.strided and not torch.equal(tensor, self._copies[number]))  # through `.data`
            ):
                watched.written.add(number)
            else:
                del self._copies[number]
        watched.trials = 0 if for_good else max(0, watched.trials - 1)

    def enter(self, kept: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Let the modules be as they were; returns what lets them be as they are now, with nothing in them of what ran between.

        Raises `StateModified` where bytes were changed in place.
        """
        watched = self._watched
        self._check()
        attributes = [(module.__dict__, dict(module.__dict__)) for module in self._modules]
        held_containers = [pair for held, _ in attributes for pair in containers(held)]
        dicts = self._dicts()
        stood = [(dicts[part][is_buffer], name) for part, is_buffer, name in watched.places]
        before = [held.get(name, ABSENT) for held, name in stood]
        rebuilt = self._rebuild()
        for part, (held, _), seen, hooks, module in zip(
            watched.parts, attributes, self._seen, self._hooks, self._modules, strict=True
        ):
            restore(held, part.names, seen)
            restore_hooks(held, hooks)
            if (inside := forward_inside(module)) is not None:
                held["forward"] = inside
        for number, (held, name) in enumerate(stood):
            tensor = self._tensors[number]
            if number in self._copies:
                held[name] = self._copies[number].clone()
            elif number in self._again:
                held[name] = kept[self._again[number]].clone()
            elif isinstance(tensor, int):
                held[name] = kept[tensor]
            elif tensor is not None:
                held[name] = tensor
        refrozen = [
            tensor
            for tensor, trained in zip(self._tensors, self._trained, strict=True)
            if isinstance(tensor, torch.Tensor) and tensor.is_leaf and tensor.requires_grad != trained
        ]
        for tensor in refrozen:  # frozen or unfrozen since: what is saved depends on it
            tensor.requires_grad_(not tensor.requires_grad)
        norms = [module for part, module in zip(watched.parts, self._modules, strict=True) if part.is_norm]
        stopped = [
            keep_sharding_state(module)
            for part, module in zip(watched.parts, self._modules, strict=True)
            if part.is_sharded
        ]
        frozen = freeze(norms)
        compared = unread(buffer for norm, _, _ in frozen for buffer in norm._buffers.values() if buffer is not None)

        def leave() -> None:
            compared()
            for keep in stopped:
                keep()
            for children, were in rebuilt:
                refill(children, were)
            for tensor in refrozen:
                tensor.requires_grad_(not tensor.requires_grad)
            for norm, momentum, count in frozen:
                norm.momentum, norm.num_batches_tracked = momentum, count
            for (held, name), tensor in zip(stood, before, strict=True):
                if tensor is ABSENT:
                    held.pop(name, None)
                else:
                    held[name] = tensor
            for held, was in attributes:
                if len(held) != len(was) or any(held.get(name, ABSENT) is not value for name, value in was.items()):
                    held.clear()
                    held.update(was)
            for container, content in held_containers:
                refill(container, content)

        return leave

    def _rebuild(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Put submodules back where they stood; which dicts that concerns, and what is in them now."""
        by_id: dict[int, Any] = {}
        found = []
        for part, module in zip(self._watched.parts, self._modules, strict=True):
            children = module._modules
            if list(map(id, children.values())) != part.children:
                by_id = by_id or {id(None): None, **{id(other): other for other in self._modules}}
                found.append((children, dict(children)))
                children.clear()
                children.update(zip(part.child_names, map(by_id.__getitem__, part.children), strict=True))
        return found

    def _check(self) -> None:
        watched = self._watched
        for number, tensor in enumerate(self._tensors):
            if tensor is None or isinstance(tensor, int) or number in self._copies or number in self._again:
                continue  # a copy, or kept, which autograd watches
            if version_number(tensor) != self._versions[number] or _storage(tensor) != self._storages[number]:
                part, is_buffer, name = watched.places[number]
                raise _modified("buffer" if is_buffer else "parameter", name, watched.parts[part].owner, tensor)
        for (ref, owner, name), version in zip(watched.sharded, self._sharded, strict=True):
            if _version_of(ref) != version:
                raise _modified("sharded parameter", name, owner, ref())


def _version_of(ref: weakref.ref[torch.Tensor]) -> int:
    tensor = ref()
    return -1 if tensor is None else tensor._version


def _modified(kind: str, name: str, owner: str, tensor: torch.Tensor | None) -> StateModified:
    shape = "" if tensor is None else f", of shape {tuple(tensor.shape)},"
    return StateModified(
        f"{kind} {name!r} of {owner}{shape} was changed in place between the forward of checkpointed work and its backward, "
        "where the work runs again and would see new values; change it after backward, or outside of what is checkpointed"
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0
