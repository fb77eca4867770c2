"""A stage under an option: what it keeps in forward, and a recompute that runs no more than it takes to make the rest.

The first forward of a stage under a plan notes its flow, and later ones follow it: they call the same operations in the same
order, or keep nothing. A recompute follows it too. Should the data flow otherwise all the same, then an operation that runs, or
autograd where it is given a tensor, meets one that stands for what was left out; the work is then run again as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gpuckpt.pytorch._torch_internals import LeanDispatchMode, untraced
from gpuckpt.pytorch.engine.early_stop import RunsOtherwise, running
from gpuckpt.pytorch.engine.kept.current import is_open, reader, reading
from gpuckpt.pytorch.engine.kept.flow import UNWATCHED, Flow, Ran, Way, casts_weight, changed_by, read_by
from gpuckpt.pytorch.engine.kept.operations import Operation, draws_of, shapes_of
from gpuckpt.pytorch.engine.kept.options import KeptPart
from gpuckpt.pytorch.engine.kept.policy import PREFER, can_be_kept
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["asked_for", "keeping_part", "making_part"]


class _SeeReads(TorchFunctionMode):
    """Within the context `flow` is hidden where Python is given the contents of a tensor without an operator: what they decide,
    or are multiplied with, cannot be followed."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow

    @untraced
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _READS:
            self._flow.hide()
        return func(*args, **(kwargs or {}))


_READS = frozenset(
    {
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor.__cuda_array_interface__.__get__,
    }
)


class keeping_part(LeanDispatchMode):
    """Within the context, `record` keeps what `part` says, while it is open. `flow`: of this work, as it was noted before, or, if
    not `known`, to be noted now. `saved`: the tensors that autograd has saved of the work so far; what is made after the last of
    them is not kept."""

    def __init__(self, record: Record, part: KeptPart, flow: Flow, saved: Collection[Any], *, known: bool) -> None:
        super().__init__()
        self._follows = True  # the work has done so far what was noted
        record.flow = flow
        self._record = record
        self._kept = part.kept
        self.flow = flow
        self._known = known
        self._saved = saved
        self._number = self._keepable = 0
        self._reads = None if known else _SeeReads(flow)

    def __enter__(self) -> Any:
        if self._reads is not None:
            self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._reads is not None:
            self._reads.__exit__(*error)
        record = self._record
        for number, call in list(record.part.items()):
            if call.saved_before >= len(self._saved) or not call.kept or not self._follows:
                del record.part[number]
        if not self._known:
            self.flow.close()
        if not self._follows:
            record.flow = None
        if not self._follows or error[0] is not None:
            self.flow.steady = False

    @untraced
    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op in UNWATCHED or not self._follows or not is_open(self._record):
            return op(*args, **kwargs)
        if casts_weight(op, args):
            output = op(*args, **kwargs)
            if not self._known:
                self.flow.given(output)
            return output
        if self._known:
            number = self._number
            self._number += 1
            ran = self.flow.ran[number] if number < len(self.flow.ran) else None
            if ran is None or ran.op is not op:
                self._follows = False
            elif ran.keepable in self._kept or ran.is_special:
                return self._run(number, ran, args, kwargs)
            return op(*args, **kwargs)
        if not isinstance(op, OpOverload):
            self.flow.hide()
            return op(*args, **kwargs)
        keepable = can_be_kept(op) is None
        ran = Ran(op, self._keepable if keepable else -1)
        self._keepable += keepable
        output = self._run(len(self.flow.ran), ran, args, kwargs)
        self.flow.note(ran, args, kwargs, output)
        return output

    def _run(self, number: int, ran: Ran, args: tuple, kwargs: dict[str, Any]) -> Any:
        op, record = ran.op, self._record
        if op._schema.is_mutable and record.part:
            for storage in changed_by(op, args, kwargs):
                for call in record.part.values():
                    call.will_change(storage, op, record)
        draws = draws_of(op, args, kwargs)
        output = op(*args, **kwargs)
        if draws is not None and draws.were_made():
            record.draws[number] = draws
        if ran.keepable in self._kept:
            call = Operation(op, shapes_of(args), PREFER, len(self._saved))
            call.keep(output, record, None)
            record.part[number] = call
        return output


class making_part(LeanDispatchMode):
    """Within the context, of the work that `run` reads only that runs which saved tensors `slots` need: what its record has kept
    is returned, and what nobody needs is left out. `kept`: numbers of the operations that count as kept; None: all that are.
    `poison`: what stands for the rest is not a number.

    Raises `RunsOtherwise` where work does not do what was noted: then it has to run as a whole."""

    def __init__(
        self, run: reading, slots: Collection[int], kept: Collection[int] | None = None, *, poison: bool = False
    ) -> None:
        super().__init__()
        self._run = run
        self._poison = poison
        record: Record = run.record  # type: ignore[assignment]
        flow: Flow | None = record.flow
        if flow is None:
            raise RunsOtherwise
        chosen = {n: call for n, call in record.part.items() if kept is None or flow.ran[n].keepable in kept}
        self._given = {number: call.load() for number, call in chosen.items()}
        self._draws = record.draws
        needed = flow.needed(slots, self._given.keys())
        self._ran = [(ran, number in needed or ran.way is Way.LOOKS) for number, ran in enumerate(flow.ran)]
        self._number = 0
        self._empty: set[int] = set()  # addresses of storages that stand for what is left out
        self._refs: list[StorageWeakRef] = []

    def check(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raise `RunsOtherwise` where one of `tensors` stands for what was left out."""
        for tensor in tensors:
            for part in parts_of(tensor):
                if part.untyped_storage()._cdata in self._empty:
                    raise RunsOtherwise

    @untraced
    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op in UNWATCHED or reader() is not self._run or casts_weight(op, args):
            return op(*args, **kwargs)
        number = self._number
        self._number += 1
        ran, runs = self._ran[number] if number < len(self._ran) else (None, True)
        if ran is None or ran.op is not op:
            raise RunsOtherwise
        if runs and number not in self._given:
            if self._empty and ran.way is not Way.LOOKS:
                self.check(read_by(op, args, kwargs))
            return op(*args, **kwargs)
        if (draws := self._draws.get(number)) is not None:
            draws.repeat()
        if number in self._given:
            return self._given[number]()
        if ran.way is Way.WRITES:
            return args[0]
        output = ran.empty()
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors if self._poison else ():
            tensor.fill_(torch.nan if tensor.is_floating_point() or tensor.is_complex() else 1)
        refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._refs += refs
        self._empty.update(ref.cdata for ref in refs)
        return output


def asked_for(run: reading) -> AbstractContextManager[Any]:
    """The context in which the replay that this thread begins runs only what it takes for what it waits for."""
    replay = running()
    slots = None if replay is None else replay.waits_for()
    if replay is None or slots is None:
        return nullcontext()
    part = making_part(run, slots)
    replay.check = part.check
    return part
