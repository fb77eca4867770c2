"""A call of a stage that can be run again, as far as a recompute would run it, under the options that it is offered.

One forward keeps all that any option keeps; of each option the recompute is timed that it is for, and held against that forward:
it has to make the same tensors, bit for bit, while what it leaves out is not a number. An option that does not is not offered.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from gpuckpt.errors import CheckpointError
from gpuckpt.pytorch._torch_internals import untraced
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.early_stop import RunsOtherwise, replaying
from gpuckpt.pytorch.engine.fence.fence import Fence
from gpuckpt.pytorch.engine.kept.current import reading, recording
from gpuckpt.pytorch.engine.kept.flow import Flow
from gpuckpt.pytorch.engine.kept.options import KeptPart, part_of
from gpuckpt.pytorch.engine.kept.parts import keeping_part, making_part
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.verify import checksum
from gpuckpt.pytorch.profiling.call_hooks import run_module
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.clock import Clock
from gpuckpt.pytorch.profiling.isolation import fresh
from gpuckpt.pytorch.profiling.save_recorder import SaveRecorder, identity
from gpuckpt.pytorch.profiling.sharding import sharding_unchanged

__all__ = ["Sample", "option_seconds", "recompute_s"]


class Sample(NamedTuple):
    """A call of a stage: its inputs, what it saw, what it decided, and the shapes of what it saved. `checkpoints`: whether it
    made some of its own; `options`: names of those that keep a part of it; `alive`: numbers of what it saved that are still there
    when it is done."""

    module: nn.Module
    inputs: Any
    fence: Fence
    record: Record
    shapes: list[tuple[int, ...]]
    name: str
    checkpoints: bool
    options: tuple[str, ...] = ()
    alive: frozenset[int] = frozenset()

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The context to run it in again."""
        with self.fence.restored(self.fence.kept), reading(self.record):
            yield


class _Done(BaseException):
    """All that was waited for has been saved."""


class _Watch:
    """Ends a run of a stage where a recompute of `slots` would. `sums`: checksums of these, if they are to be taken."""

    check: Callable[[Sequence[torch.Tensor]], None] | None = None

    def __init__(self, slots: Collection[int], sums: dict[int, int] | None = None) -> None:
        self._slots = slots
        self._last = max(slots)
        self._sums = sums
        self._count = 0

    @untraced
    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._sums is not None and self._count in self._slots:
            self._sums[self._count] = checksum(tensor)
        self._count += 1
        if self.ended:
            raise _Done
        return tensor.detach()

    @property
    def ended(self) -> bool:
        return self._count > self._last

    def arrive(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._count + len(tensors) > self._last:
            for tensor in tensors:
                self.pack(tensor)

    def waits_for(self) -> Collection[int]:
        return self._slots


def recompute_s(
    module: nn.Module,
    inputs: Any,
    slots: Collection[int],
    clock: Clock,
    given: AbstractContextManager[Any] | None = None,
    sums: dict[int, int] | None = None,
) -> float:
    """Seconds of a run that ends with the last of the saved tensors `slots`; none without any: nothing has to be run again.
    `given`: the context that gives back what is kept."""
    if not slots:
        return 0.0
    args, kwargs = fresh(inputs)
    watch = _Watch(slots, sums)
    with sharding_unchanged(module), given or nullcontext():
        began_s = clock.now()
        try:
            with saved_tensors_hooks(watch.pack, identity), replaying(watch):
                run_module(module, args, kwargs)
        except _Done:
            pass
        except Exception as error:
            if not watch.ended or isinstance(error, CheckpointError):
                raise  # else what ended it, of which TorchScript's interpreter makes another error
        return clock.now() - began_s


def option_seconds(
    sample: Sample, gather: Callable[[], None], clock: Clock, repeats: int
) -> dict[str, tuple[float, float]]:
    """By option the seconds by which a forward that keeps what it does takes longer than others, and those of its recompute."""
    parts = {option: part_of(option) for option in sample.options}
    most = KeptPart(frozenset().union(*[part.kept for part in parts.values()]))
    flow, inputs = Flow(), fresh(sample.inputs)
    saved = SaveRecorder(flow=flow)
    flow.begin([*tensors_in(inputs), *Objects(pytree.tree_leaves(inputs)).tensors, *sample.fence.kept])
    flow.begin([*sample.module.parameters(), *sample.module.buffers()])
    record = Record()
    keeping = keeping_part(record, most, flow, saved.shapes, known=False)
    _forward_s(sample, inputs, gather, clock, saved.hooks(), recording(record), keeping)
    sums = {slot: checksum(tensor) for slot, tensor in saved.numbered() if slot in sample.alive}
    del record, keeping, saved, inputs
    more_s: list[float] = []
    again_s: dict[str, list[float]] = {option: [] for option in parts}
    for turn in range(repeats):
        plain_s = _forward_s(sample, fresh(sample.inputs), gather, clock)
        record, count = Record(), list[None]()
        hooks = saved_tensors_hooks(partial(_count, count), identity)
        keeping = keeping_part(record, most, flow, count, known=True)
        inputs = fresh(sample.inputs)
        more_s.append(_forward_s(sample, inputs, gather, clock, hooks, recording(record), keeping) - plain_s)
        for option, part in list(parts.items()):
            gather()
            found: dict[int, int] | None = None if turn else {}
            with suppress(RunsOtherwise, Exception):  # whatever fails with what stands for the rest is no option
                again_s[option].append(_option_s(sample, record, part, clock, found))
            if len(again_s[option]) <= turn or (found is not None and found != sums):
                del parts[option]
    return {option: (statistics.median(more_s), statistics.median(again_s[option])) for option in parts}


@untraced
def _count(count: list[None], tensor: torch.Tensor) -> None:
    count.append(None)


def _forward_s(
    sample: Sample, inputs: Any, gather: Callable[[], None], clock: Clock, *contexts: AbstractContextManager[Any]
) -> float:
    """Seconds of one forward, in these contexts."""
    args, kwargs = inputs
    gather()
    with sample.as_it_was(), ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        began_s = clock.now()
        run_module(sample.module, args, kwargs)
        return clock.now() - began_s


def _option_s(sample: Sample, record: Record, part: KeptPart, clock: Clock, sums: dict[int, int] | None) -> float:
    """Seconds of a recompute that is given back what the option keeps, one half after the other."""
    seconds = 0.0
    for late in (True, False):
        slots = {number for number in sample.alive if (number >= part.cut) == late}
        again = reading(record)
        given = making_part(again, slots, part.kept, poison=sums is not None)
        with sample.fence.restored(sample.fence.kept), again:
            seconds += recompute_s(sample.module, sample.inputs, slots, clock, given, sums)
    return seconds
