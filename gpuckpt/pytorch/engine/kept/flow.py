"""`Flow`: which operations of one piece of work need what which others made, and which saved tensors come from which.

A recompute that is given back what some operations made, and is asked for a part of what autograd saved, runs only what that
takes. All others are called as in forward, and return tensors of the right shape that nobody reads: that is watched.

Data flows through storages: an operation needs those that have written into the storages of its arguments so far. Where it cannot
be seen (compiled code, a kernel that is given addresses, an operation that is no operator) there is no telling, and a recompute
runs everything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from gpuckpt.pytorch.engine.residency import is_resident
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["UNWATCHED", "Flow", "Ran", "SavedFrom", "Way", "casts_weight", "changed_by", "read_by", "tensors_of"]


# No part of the flow: autograd detaches as often as it likes, and only tensors without memory are asked for their device by an
# operator.
UNWATCHED = frozenset({torch.ops.aten.detach.default, torch.ops.prim.device.default})


def casts_weight(op: Any, args: tuple) -> bool:
    """Whether this call casts what belongs to the model. Autocast does so where it has not cached it, so that a run may have such
    calls and another none: they are no part of the flow."""
    return op is torch.ops.aten._to_copy.default and isinstance(args[0], torch.Tensor) and is_resident(args[0])


class Way(Enum):
    """What a recompute does with an operation whose results it does not need."""

    RUNS = "runs it all the same"
    LOOKS = "runs it: a view, which reads nothing"
    WRITES = "leaves out what it writes into its first argument"
    MAKES = "returns empty tensors"


class Ran:
    """One operation as it ran. `keepable`: its number among those whose outputs can be kept, -1 for others; `is_special`: it
    changes tensors, or draws random numbers; `needs`: numbers of operations; `made`: of each output its size, stride, dtype and
    device, or what is no tensor."""

    __slots__ = ("is_list", "is_special", "keepable", "made", "needs", "op", "way")

    def __init__(self, op: OpOverload, keepable: int) -> None:
        self.op = op
        self.keepable = keepable
        self.is_special = op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
        self.way = Way.RUNS
        self.needs: tuple[int, ...] = ()
        self.made: list[Any] = []
        self.is_list = False

    def empty(self) -> Any:
        """What stands for its results."""
        made = [each.empty() if isinstance(each, _EmptyTensor) else each for each in self.made]
        return made if self.is_list else made[0] if len(made) == 1 else tuple(made)


class _EmptyTensor(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class SavedFrom(NamedTuple):
    """A tensor that autograd saves: how many operations had run before, and the numbers of those that it comes from."""

    ran_before: int
    sources: tuple[int, ...]


class Flow:
    """The flow of one run of work. `ran`: its operations in order; `saved`: the tensors
    that autograd saved; `seen`: whether nothing was hidden, once it is over; `decided`: the first operation whose results
    decide what runs after it, or how large that is; `steady`: whether another run can be expected to do the same;
    `repeated`: whether the run `before` did, which a first forward that makes tables for later ones does not."""

    def __init__(self, before: Flow | None = None) -> None:
        self.ran: list[Ran] = []
        self.saved: list[SavedFrom] = []
        self.seen = True
        self.steady = True
        self.repeated = False
        self._before = [] if before is None else [ran.op for ran in before.ran]
        self.decided: int | None = None
        self._closed = False
        self._given: set[int] = set()
        self._writers: dict[int, tuple[int, ...]] = {}
        self._unwritten: set[int] = set()  # memory that no operation has written into
        self._unknown: set[int] = set()
        self._refs: list[StorageWeakRef] = []  # keep addresses from naming others

    def begin(self, given: Iterable[torch.Tensor]) -> None:
        """The work begins. `given`: tensors that are there before."""
        self._given.update(self._addresses(given))

    def given(self, tensor: torch.Tensor) -> None:
        """`tensor` is there, whichever way it came about."""
        if not self._closed:
            self._given.update(self._addresses([tensor]))
            self._refs += _refs([tensor])

    def hide(self) -> None:
        """Something ran that cannot be seen."""
        self.seen = False

    def note(self, ran: Ran, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """An operation has run."""
        number, op = len(self.ran), ran.op
        self.ran.append(ran)
        if self.decided is None and not _DECIDING.isdisjoint(op.tags):
            self.decided, self.steady = number, False
        written = {storage._cdata for storage in changed_by(op, args, kwargs)} if op._schema.is_mutable else set()
        inputs = self._addresses(read_by(op, args, kwargs))
        if op is torch.ops.aten.lift_fresh.default:
            self._given.update(inputs)  # torch.tensor(...), which is made of Python's values
        needs: set[int] = set()
        for address in inputs:
            writers = self._writers.get(address)
            needs.update(writers or ())
            if address in self._unwritten and address not in written:
                self.hide()
            if writers is None and address not in self._given:
                self._unknown.add(address)
                self._refs += _refs(tensors_of(args, kwargs))
        ran.needs = tuple(needs)
        if written:
            self._unwritten -= written
            own = written & self._writers.keys()
            for address in own:
                self._writers[address] += (number,)
            first = args[:1] if args and isinstance(args[0], torch.Tensor) else ()
            if own == written == set(self._addresses(first)) and len(op._schema.returns) <= 1:
                ran.way = Way.WRITES
            return
        ran.is_list = isinstance(output, list)
        outputs = list(output) if isinstance(output, tuple | list) else [output]
        tensors = [each for each in outputs if isinstance(each, torch.Tensor)]
        made = set(self._addresses(tensors)).difference(inputs)
        self._refs += _refs(tensors)
        self._writers.update(dict.fromkeys(made, (number,)))
        if op._schema.name in _EMPTY:
            self._unwritten |= made
        if any(t.layout is not torch.strided for t in tensors):
            return  # which was hidden
        ran.made = [
            _EmptyTensor(t.size(), t.stride(), t.dtype, t.device) if isinstance(t, torch.Tensor) else t for t in outputs
        ]
        if tensors and not made and len(tensors) == len(outputs):
            ran.way = Way.LOOKS
        elif len(made) == len(tensors) > 0 and op.namespace in _PURE and all(map(_is_plain, tensors)):
            ran.way = Way.MAKES

    def save(self, tensor: torch.Tensor) -> None:
        """Autograd saves `tensor`."""
        sources: tuple[int, ...] = ()
        for address in self._addresses([tensor]):
            sources += self._writers.get(address, ())
            if address in self._unwritten:
                self.hide()
            if address not in self._writers and address not in self._given:
                self._unknown.add(address)
                self._refs += _refs([tensor])
        self.saved.append(SavedFrom(len(self.ran), sources))

    def close(self, given: Iterable[torch.Tensor] = ()) -> None:
        """The work is done. `given`: what was there besides, as was found out meanwhile."""
        self._given.update(self._addresses(given))
        self._closed = True
        self.repeated = self._before == [ran.op for ran in self.ran]
        if not self._unknown <= self._given:
            self.hide()
        for each in (self._given, self._writers, self._unwritten, self._unknown, self._refs, self._before):
            each.clear()

    def needed(self, slots: Iterable[int], kept: Collection[int]) -> set[int]:
        """Numbers of the operations that have to run for saved tensors `slots`, where those in `kept` need not: what they made is
        there. All others, where something was hidden."""
        if not self.seen:
            return set(range(len(self.ran))).difference(kept)
        waiting = [number for number, ran in enumerate(self.ran) if ran.way is Way.RUNS]
        for slot in slots:
            waiting += self.saved[slot].sources
        found: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number not in found and number not in kept:
                found.add(number)
                waiting += self.ran[number].needs
        return found

    def _addresses(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        found = []
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                self.hide()
                continue
            found += [part.untyped_storage()._cdata for part in parts_of(tensor)]
        return found


def _refs(tensors: Iterable[torch.Tensor]) -> list[StorageWeakRef]:
    return [
        StorageWeakRef(part.untyped_storage())
        for tensor in tensors
        if tensor.layout is torch.strided
        for part in parts_of(tensor)
    ]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether an empty tensor of the same shape can stand for it."""
    return type(tensor) in _PLAIN and not (tensor.storage_offset() or tensor.is_conj() or tensor.is_neg())


_DECIDING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_PLAIN = (torch.Tensor, FakeTensor)
_PURE = ("aten", "prims", "gpuckpt")
_EMPTY = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
# Made like their argument, of which they read no element: noise of dropout, masks, zeros to add to.
_SHAPED = frozenset(
    f"aten::{name}"
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
    )
)


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, which nest one list deep."""
    found: list[torch.Tensor] = []
    for given in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(given, torch.Tensor):
            found.append(given)
        elif isinstance(given, list | tuple):
            found += [each for each in given if isinstance(each, torch.Tensor)]
    return found


def read_by(op: OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments of which it reads more than shape and type."""
    return [] if op._schema.name in _SHAPED else tensors_of(args, kwargs)


def changed_by(op: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.UntypedStorage]:
    """The storages that `op` writes into, as far as its schema tells."""
    found = []
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in pytree.tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                found += [part.untyped_storage() for part in parts_of(tensor)]
    return found
