"""`OpTrace`: one run of a stage, operation by operation, and the options that follow from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt.planning import Stage, Variant
from gpuckpt.pytorch.engine.kept.current import is_open, recording
from gpuckpt.pytorch.engine.kept.flow import UNWATCHED, Flow, Ran, Way, casts_weight, changed_by, tensors_of
from gpuckpt.pytorch.engine.kept.options import KeptPart, option_name
from gpuckpt.pytorch.engine.kept.policy import can_be_kept
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.kept.search import SavedSlot, StageRun, choose
from gpuckpt.pytorch.engine.subclasses import parts_of
from gpuckpt.pytorch.profiling.clock import Clock, flops_of
from gpuckpt.pytorch.profiling.save_recorder import Storages

__all__ = ["OpTrace"]

# Floating point operations that take as long as a byte in or out.
_CPU_INTENSITY, _DEVICE_INTENSITY = 4.0, 200.0

_Storage = tuple[StorageWeakRef, int]  # with its bytes


class OpTrace(TorchDispatchMode):
    """Within the context, notes the operations of work whose `record` is open, and holds nothing. `clock`: what each takes
    is noted too."""

    def __init__(self, record: Record, clock: Clock | None = None) -> None:
        super().__init__()
        self.flow = record.flow = Flow()
        self._record = record
        self._clock = clock
        self._seconds: list[float] = []
        self._casts: list[tuple[int, float]] = []  # of weights: how many operations had run before, and seconds
        self._costs: list[float] = []
        self._outputs: dict[int, list[_Storage]] = {}  # of operations that can be kept
        self._changed: set[int] = set()  # addresses of storages that were changed in place
        self._keepable = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The context in which this thread's work is what the trace notes."""
        with recording(self._record), self:
            yield

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op in UNWATCHED or not is_open(self._record):
            return op(*args, **kwargs)
        if not isinstance(op, OpOverload):
            self.flow.hide()
            return op(*args, **kwargs)
        number, began_s = len(self.flow.ran), 0.0 if self._clock is None else self._clock.now()
        output = op(*args, **kwargs)
        seconds = 0.0 if self._clock is None else self._clock.now() - began_s
        if casts_weight(op, args):
            self._casts.append((number, seconds))
            self.flow.given(output)
            return output
        self._seconds.append(seconds)
        if op._schema.is_mutable:
            self._changed.update(storage._cdata for storage in changed_by(op, args, kwargs))
        keepable = can_be_kept(op) is None
        self.flow.note(Ran(op, self._keepable if keepable else -1), args, kwargs, output)
        self._keepable += keepable
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if keepable:
            parts = [part.untyped_storage() for tensor in tensors for part in parts_of(tensor)]
            self._outputs[number] = [(StorageWeakRef(storage), storage.nbytes()) for storage in parts]
        self._costs.append(_cost(op, args, kwargs, output, tensors))
        return output

    def recompute_s(self, part: KeptPart, slots: Collection[int]) -> float:
        """Seconds of a recompute of saved tensors `slots` that is given back what `part` keeps, one half after the other: of the
        operations that it runs, which end with the last that it waits for."""
        kept = {number for number, ran in enumerate(self.flow.ran) if ran.keepable in part.kept}
        views = {number for number, ran in enumerate(self.flow.ran) if ran.way is Way.LOOKS}  # which run in any case
        seconds = 0.0
        for late in (True, False):
            half = [slot for slot in slots if (slot >= part.cut) == late]
            if half:
                end = max(self.flow.saved[slot].ran_before for slot in half)
                seconds += sum(self._seconds[number] for number in views | self.flow.needed(half, kept) if number < end)
                seconds += sum(cast_s for number, cast_s in self._casts if number < end)
        return seconds

    def options(
        self, stage: Stage, slots: Sequence[tuple[int, tuple[int, ...]]], storages: Storages
    ) -> tuple[Variant, ...]:
        """What the stage may keep, its input held and the rest made again; without their seconds. `slots`: what autograd saved,
        by number the ids of its storages."""
        held = {*stage.inputs, *stage.extras}
        if not self.flow.seen:
            return ()
        waited = [
            SavedSlot(number, own, self.flow.saved[number].ran_before)
            for number, ids in slots
            if (own := tuple([i for i in ids if i not in held]))
        ]
        saved = {i for slot in waited for i in slot.storages}
        sizes = {i: storages.held_bytes(i) for i in saved}
        outputs: dict[int, tuple[int, ...]] = {}
        for number, made in self._outputs.items():
            if self.flow.decided is not None and number >= self.flow.decided:
                break
            if not self._changed.isdisjoint(ref.cdata for ref, _ in made) or held.intersection(_known(made, storages)):
                continue
            known = _known(made, storages)
            # A recompute ends before what is made after the last saved tensor.
            if saved.isdisjoint(known) or set(stage.output).intersection(known) or number >= waited[-1].ran_before:
                continue
            for ref, nbytes in made:
                sizes.setdefault(_id(ref, storages), nbytes)
            outputs[number] = tuple([_id(ref, storages) for ref, _ in made])
        if not outputs:
            return ()
        found = []
        for choice in choose(StageRun(self.flow, self._costs, outputs, waited, sizes)):
            kept = storages.of_gone([pair for number in sorted(choice.kept) for pair in self._outputs[number]])
            name = option_name([self.flow.ran[number].keepable for number in choice.kept], choice.cut)
            remade, later = (tuple([i for i in stage.saves if i in ids]) for ids in (choice.remade, choice.later))
            saves = tuple(dict.fromkeys((*stage.inputs, *stage.extras, *kept)))
            found.append(Variant(name, saves, 0.0, 0.0, remade=remade, remade_later=later))
        return tuple(found)


def _known(made: Collection[_Storage], storages: Storages) -> list[int]:
    return [i for ref, _ in made if (i := storages.known_id(ref)) is not None]


def _id(ref: StorageWeakRef, storages: Storages) -> int:
    """The id of a storage, or a number of its own below all ids."""
    known = storages.known_id(ref)
    return -ref.cdata if known is None else known


def _cost(op: OpOverload, args: tuple, kwargs: dict[str, Any], output: Any, made: Sequence[torch.Tensor]) -> float:
    if op.is_view:
        return 0.0
    given = tensors_of(args, kwargs)
    moved_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in (*given, *made) if tensor.layout is torch.strided
    )
    on_cpu = all(tensor.device.type == "cpu" for tensor in made)
    return flops_of(op, args, kwargs, output) + moved_bytes * (_CPU_INTENSITY if on_cpu else _DEVICE_INTENSITY)
