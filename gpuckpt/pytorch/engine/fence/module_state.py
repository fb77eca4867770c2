"""What the forward of modules saw in them, so that a recompute sees the same and leaves no trace.

Of every module: its plain attributes and flags (a dropout rate, `training`, a counter, an active adapter), lists and dicts of
such, and which tensors are its parameters and buffers (functional_call, adapters and MAML put others in their place for a
while). A recompute gets all of these as they were, and what it changes itself is undone. Bytes that were changed in place cannot
be brought back: that is a `StateModified`, a `RecomputeMismatch` which names the tensor.

Buffers and small frozen parameters that a forward writes itself (counters, moving averages, the vectors of a power iteration)
are copied before, and the recompute writes into copies of the copies: each is updated once. Which these are is learned in the
first two forwards; from then on the copies are kept, and charged, with a frame's inputs. Running statistics of torch's BatchNorm
need no copy: a momentum of zero leaves them bit for bit, and the same kernel runs. Other parameters that a forward changes behind
autograd's back may only be changed to the same bytes again (weights that are clamped).

What DistributedDataParallel wraps runs again without it. Parameters that FSDP2 gathers and frees are left to it;
what an optimizer changes is their sharded form, which is looked at.

Attributes that are tensors or objects: see reached.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_
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
    take_new,
)
from gpuckpt.pytorch.engine.fence.holders import PLAIN, Variable
from gpuckpt.pytorch.engine.fence.norms import freeze
from gpuckpt.pytorch.engine.fence.reached import Reached
from gpuckpt.pytorch.engine.fence.tensors import TensorUse
from gpuckpt.pytorch.engine.fence.watched import Watched
from gpuckpt.pytorch.engine.verify import differ, sum_of, unread

__all__ = ["ModuleState"]


class ModuleState:
    """What a forward that begins now sees. `kept`: tensors that belong to no model, which a frame has to keep with its inputs;
    `fates`: whether it is still learned which buffers are written, and those that are known; given where work is run again."""

    __slots__ = (
        "_adjusted",
        "_again",
        "_copies",
        "_hooks",
        "_modules",
        "_others",
        "_plain",
        "_seen",
        "_sharded",
        "_storages",
        "_sums",
        "_tensors",
        "_trained",
        "_versions",
        "_watched",
        "fates",
        "kept",
    )

    def __init__(self, watched: Watched, reached: Reached, fates: tuple[bool, frozenset[int]] | None) -> None:
        self._watched = watched
        self.fates = on_trial, written = fates or (watched.trials > 0, frozenset(watched.written))
        self._modules: list[Any] = [part.ref() for part in watched.parts]
        # Nearly all attributes are plain, and none of them changes: each loop here costs every checkpoint.
        held_by = [module.__dict__ for module in self._modules]
        self._seen: list[list[Any]] = [
            [held.get(name, ABSENT) for name in part.names] for part, held in zip(watched.parts, held_by, strict=True)
        ]
        self._plain = [
            part.known(seen) or self._look_at(number, seen, held, reached)
            for number, (part, seen, held) in enumerate(zip(watched.parts, self._seen, held_by, strict=True))
        ]
        self._hooks = [hooks_of(held) for held in held_by]
        dicts = self._dicts()
        tensors = [dicts[part][is_buffer].get(name) for part, is_buffer, name, _ in watched.places]
        self._versions, self._storages = _stamps(tensors)
        self._trained = [tensor is not None and tensor.requires_grad for tensor in tensors]
        self._sharded = [_version_of(ref) for ref, _, _ in watched.sharded]
        self._copies: dict[int, torch.Tensor] = {}  # of buffers that may be written; while that is not known, of all
        if on_trial or written:
            with torch.no_grad():
                for number in range(len(tensors)) if on_trial else sorted(written):
                    tensor = tensors[number]
                    if tensor is not None and watched.places[number].is_state and not tensor.requires_grad:
                        self._copies[number] = tensor.detach().clone()
        # Of other parameters, what their bytes add up to, and which of them a forward changed unseen (through `.data`).
        looked_at = tensors if on_trial else ()
        self._sums = [None if number in self._copies else sum_of(each) for number, each in enumerate(looked_at)]
        self._adjusted = watched.adjusted
        # A leaf belongs to a model or to the caller. Anything else was computed, and lives by being kept.
        computed = [number for number, tensor in enumerate(tensors) if tensor is not None and not tensor.is_leaf]
        self.kept: list[torch.Tensor] = [tensor for tensor in tensors if tensor is not None and not tensor.is_leaf]
        self._tensors: list[Any] = tensors
        for index, number in enumerate(computed):
            self._tensors[number] = index
        self._again: dict[int, int] = {}  # of buffers that are known to be written: where among `kept` their copies are
        if not on_trial:
            self._again = {number: len(self.kept) + place for place, number in enumerate(self._copies)}
            self.kept += self._copies.values()
            self._copies = {}
        # Whether there is something else to put in a place than what stood there.
        self._others = bool(computed or self._copies or self._again)

    def _look_at(self, number: int, values: list[Any], held: dict[str, Any], reached: Reached) -> bool:
        """Take down the attributes of module `number`; whether all of them are to be put back as they are."""
        part = self._watched.parts[number]
        looked = self._seen[number] = [
            value if type(value) in PLAIN else self._look(number, held, name, value, reached)
            for name, value in zip(part.names, values, strict=True)
        ]
        plain = all(map(is_, looked, values))
        if plain:
            part.know(values)
        return plain

    def _look(self, number: int, held: dict[str, Any], name: str, value: Any, reached: Reached) -> Any:
        taken = captured(value)
        if taken is not ELSEWHERE:
            return taken
        uses = self._watched.uses
        use = uses.get((number, name))
        if use is None:
            use = uses[number, name] = TensorUse()
        reached.variable(Variable(held, name), value, use, whole=True)
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
        if not self.fates[0]:
            return
        watched, dicts = self._watched, self._dicts()
        watched.rewritten = None
        adjusted = []
        for number, place in enumerate(watched.places):
            tensor = self._tensors[number]
            if place.is_buffer or number in self._copies or not isinstance(tensor, torch.Tensor):
                continue
            if version_number(tensor) != self._versions[number]:
                watched.rewritten = place.name
            elif sum_of(tensor) != self._sums[number]:
                adjusted.append(number)
        self._adjusted = watched.adjusted = adjusted
        self._sums = []
        for number in list(self._copies):
            part, is_buffer, name, _ = watched.places[number]
            tensor = dicts[part][is_buffer].get(name)
            if (
                tensor is not self._tensors[number]
                or version_number(tensor) != self._versions[number]
                or differ(tensor, self._copies[number])  # through `.data`
            ):
                watched.written.add(number)
            else:
                del self._copies[number]
        if watched.rewritten is None:  # what the first batch decides is changed in one forward alone
            watched.trials = 0 if for_good else max(0, watched.trials - 1)

    def enter(self, kept: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Let the modules be as they were; returns what lets them be as they are now, with nothing in them of what ran between.

        Raises `StateModified` where bytes were changed in place.
        """
        watched = self._watched
        self._check()
        held_by = [module.__dict__ for module in self._modules]
        attributes = [held.copy() for held in held_by]
        unlike = [
            number
            for number, (held, part, seen, plain) in enumerate(
                zip(held_by, watched.parts, self._seen, self._plain, strict=True)
            )
            if not plain or len(held) != part.count or not all(map(is_, map(held.get, part.names), seen))
        ]
        contents = {id(pair[0]): pair for number in unlike for pair in containers(held_by[number])}
        hooks = [hooks_of(held) for held in held_by]
        dicts = self._dicts()
        stood = [(dicts[part][is_buffer], name) for part, is_buffer, name, _ in watched.places]
        before = [held.get(name, ABSENT) for held, name in stood]
        rebuilt = self._rebuild()
        for number in unlike:
            restore(held_by[number], watched.parts[number].names, self._seen[number], contents)
        for held, seen_hooks in zip(held_by, self._hooks, strict=True):
            restore_hooks(held, seen_hooks)
        for number in watched.wrappers:
            held_by[number]["forward"] = forward_inside(self._modules[number])
        if self._others or not all(map(is_, before, self._tensors)):
            self._place(stood, kept)
        refrozen = [
            tensor
            for tensor, trained in zip(self._tensors, self._trained, strict=True)
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad != trained and tensor.is_leaf
        ]
        for tensor in refrozen:  # frozen or unfrozen since: what is saved depends on it
            tensor.requires_grad_(not tensor.requires_grad)
        adjusted = [number for number in self._adjusted if isinstance(self._tensors[number], torch.Tensor)]
        copies = [self._tensors[number].detach().clone() for number in adjusted]
        stopped = [keep_sharding_state(self._modules[number]) for number in watched.with_shards]
        frozen = freeze(self._modules[number] for number in watched.norms)
        new = take_new((held, part.buffers) for (_, held), part in zip(dicts, watched.parts, strict=True))
        compared = unread(buffer for norm, _, _ in frozen for buffer in norm._buffers.values() if buffer is not None)

        def leave() -> None:
            compared()
            for keep in stopped:
                keep()
            for children, before_children in rebuilt:
                refill(children, before_children)
            for tensor in refrozen:
                tensor.requires_grad_(not tensor.requires_grad)
            for norm, momentum, count in frozen:
                norm.momentum, norm.num_batches_tracked = momentum, count
            now = [held.get(name, ABSENT) for held, name in stood]
            if not all(map(is_, now, before)):
                for (held, name), tensor in zip(stood, before, strict=True):
                    if tensor is ABSENT:
                        held.pop(name, None)
                    else:
                        held[name] = tensor
            for held, name, buffer in new:
                held[name] = buffer
            for held, was in zip(held_by, attributes, strict=True):
                if len(held) != len(was) or not all(map(is_, held.values(), was.values())):
                    held.clear()
                    held.update(was)
            for container, content in contents.values():
                refill(container, content)
            for held, before_hooks in zip(held_by, hooks, strict=True):
                restore_hooks(held, before_hooks)
            pairs = zip(adjusted, copies, strict=True)
            again = [(number, were) for number, were in pairs if differ(self._tensors[number], were)]
            for number, were in again:
                self._tensors[number].data.copy_(were)
            if again:
                raise self._changed_again(again[0][0])

        return leave

    def _place(self, stood: Sequence[tuple[dict[str, Any], str]], kept: Sequence[torch.Tensor]) -> None:
        """Let parameters and buffers be those of forward; for buffers that forward writes, copies of what they were."""
        for number, (held, name) in enumerate(stood):
            tensor = self._tensors[number]
            if number in self._copies or number in self._again:
                copy = self._copies[number] if number in self._copies else kept[self._again[number]]
                of_buffer = self._watched.places[number].is_buffer
                held[name] = copy.clone() if of_buffer else torch.nn.Parameter(copy.clone(), requires_grad=False)
            elif isinstance(tensor, int):
                held[name] = kept[tensor]
            elif tensor is not None:
                held[name] = tensor

    def _changed_again(self, number: int) -> StateModified:
        part, _, name, _ = self._watched.places[number]
        return StateModified(
            f"parameter {name!r} of {self._watched.parts[part].owner} is changed by the checkpointed work itself, through "
            "`.data`, and running it again changes it again; do that outside of what is checkpointed"
        )

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
        looked_at = self._tensors
        if self._others:  # a copy, or kept, which autograd watches
            unseen = self._copies.keys() | self._again.keys()
            looked_at = [
                None if number in unseen or isinstance(tensor, int) else tensor
                for number, tensor in enumerate(self._tensors)
            ]
        versions, storages = _stamps(looked_at)
        if versions != self._versions or storages != self._storages:
            for number, tensor in enumerate(looked_at):
                was, now = (self._versions[number], self._storages[number]), (versions[number], storages[number])
                if tensor is not None and was != now:
                    part, is_buffer, name, _ = watched.places[number]
                    raise _modified("buffer" if is_buffer else "parameter", name, watched.parts[part].owner, tensor)
        for (ref, owner, name), version in zip(watched.sharded, self._sharded, strict=True):
            if _version_of(ref) != version:
                raise _modified("sharded parameter", name, owner, ref())


def _stamps(tensors: Sequence[torch.Tensor | None]) -> tuple[list[int | None], list[int | None]]:
    """Of each how often it was changed in place, and which storage it is in."""
    return (
        [None if tensor is None else version_number(tensor) for tensor in tensors],
        [None if tensor is None else _storage(tensor) for tensor in tensors],
    )


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
