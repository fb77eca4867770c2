"""The frame: what a checkpoint is made of, on `torch.autograd.graph.saved_tensors_hooks`.

1. `save` saves the tensors to start from as a node of autograd would, outside the frame's own hooks, so that an enclosing
   budget or frame holds them like any other saved tensor.
2. Under `hooks()` autograd's saved tensors are numbered, and nothing is kept.
3. The first unpack replays the work under hooks that put tensor number i into the budget, and stops after the last one
   that backward still needs (early stop; fused operations say what they will save before they compute, see early_stop.py).
4. What was recomputed dies with the autograd node that asked for it; where the node outlives the backward, at the end of that
   backward at the latest.

A budget that is full may drop what was recomputed (the policy "recompute"), oldest first: it is then computed again when
it is asked for, so that a frame gets by with less than all its saved tensors, for more work.

torch.utils.checkpoint keeps what it recomputes in a dictionary of its own, where no budget sees it; here nested frames,
budgets and other hooks compose without a special case.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from gpuckpt.errors import BudgetExceeded, RecomputeMismatch
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import graph_task_id, keep_graph, queue_callback, untraced
from gpuckpt.pytorch.engine.early_stop import replaying
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes_after
from gpuckpt.pytorch.engine.hooks import enter, redirect_saves, redirected_hold
from gpuckpt.pytorch.engine.kept.current import paused
from gpuckpt.pytorch.engine.residency import is_resident
from gpuckpt.pytorch.engine.saved_input import saved_input
from gpuckpt.pytorch.engine.saved_storage import SavedStorage, modified, writes_late
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.engine.subclasses import Carried
from gpuckpt.pytorch.engine.verify import Verify, compare, seen, version_of

__all__ = ["Frame"]


_MOST_LATE = 2  # tensors that an operation saves before its kernel runs, of those whose kernels write into them


class _EarlyStop(BaseException):
    """All that was waited for has been recomputed. A BaseException, so that user code does not catch it by mistake."""


class Recoverable(Protocol):
    """What fills a slot: a tensor that is held, here or on the host."""

    @property
    def holding(self) -> Any: ...

    def load(self) -> torch.Tensor: ...


class _Slot:
    """Stands in the graph for saved tensor number `index` of a frame; filled by a recompute."""

    __slots__ = ("__weakref__", "frame", "held", "index", "resident", "seen")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index
        self.held: Recoverable | None = None

    def describe(self, tensor: torch.Tensor) -> None:
        """Note what a replay has to reproduce, and of a parameter the version of its storage."""
        self.seen = seen(tensor, self.frame._verify)
        self.resident = version_of(tensor) if is_resident(tensor) else None

    def evict(self, how: str) -> int:
        """Drop what a recompute can bring again; see `gpuckpt.memory.eviction.Evictable`."""
        lock = self.frame._lock
        if how != "recompute" or not lock.acquire(blocking=False):
            return 0
        try:
            held = self.held
            if held is None or not isinstance(held.holding, SavedStorage) or self is self.frame._wanted:
                return 0
            holding = weakref.ref(held.holding)
            nbytes = held.holding.nbytes
            self.held = held = None
            return nbytes if holding() is None else 0
        finally:
            lock.release()


class Frame:
    """One piece of work that is run now and replayed in backward.

    `replay(tensors)` does the work again from the tensors that were given to `save`, in that order. It must not refer to
    the frame. `budget` holds what is recomputed; None: nothing is charged. Not `evictable`: a full budget recomputes no more.
    `made`: how many frames there have been.
    """

    evictable = True
    made = 0

    def __init__(
        self, replay: Callable[[list[torch.Tensor]], Any], budget: Budget | None, verify: Verify | None = None
    ) -> None:
        Frame.made += 1
        self._replay = replay
        self._budget = budget
        self._verify = verify
        self._inputs: list[Any] = []
        self._trained: list[bool] = []  # of each whether it required a gradient
        self._carried: list[tuple[int, Carried]] = []  # of inputs that are instances of subclasses, by their number
        self.slots: list[weakref.ref[_Slot]] = []
        self._wanted: _Slot | None = None
        self._reached = 0  # how many tensors the latest replay saw saved
        self._lock = threading.RLock()
        self._context = contextvars.copy_context()  # backward may run elsewhere: on CUDA, in a thread of autograd's

    def save(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` to start from, in whatever the active hooks save into. Raises `BudgetExceeded`."""
        for tensor in tensors:
            if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
                self._carried.append((len(self._inputs), Carried(tensor)))
            self._inputs.append(saved_input(tensor))
            self._trained.append(tensor.requires_grad)

    def hooks(self) -> enter:
        """The context to do the work in; the frame's budget is the current one in it."""
        return enter(self._budget, self._number, _unpack)

    @untraced
    def _number(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot(self, len(self.slots))
        slot.describe(tensor)
        self.slots.append(weakref.ref(slot))
        return slot

    def bring(self, wanted: _Slot) -> None:
        """Recompute `wanted`; to the end of the work where its kernel writes into it, and has not run where a replay stops."""
        if wanted.held is None:
            self.recompute(wanted)
        if wanted.index >= self._reached - _MOST_LATE and writes_late():
            wanted.held = None
            self.recompute(wanted, to_the_end=True)

    def recompute(self, wanted: _Slot, to_the_end: bool = False) -> None:
        """Replay, and fill the slots that backward still needs, `wanted` among them. After a failure no slot holds anything.

        Raises `BudgetExceeded` where they do not fit, `RecomputeMismatch` where the work is not what it was.
        """
        replay = _FrameReplay(self, wanted, to_the_end)
        tensors = [
            tensor if tensor.requires_grad == trained else tensor.detach().requires_grad_(trained)
            for tensor, trained in zip([saved.unpack() for saved in self._inputs], self._trained, strict=True)
        ]
        for number, carried in self._carried:
            tensors[number] = carried.by(tensors[number])
        outer, self._wanted = self._wanted, wanted
        try:
            with (
                torch.enable_grad(),
                redirect_saves(None),
                enter(self._budget, replay.pack, _Recomputed.load),
                replaying(replay),
                paused(),
            ):
                self._context.copy().run(self._replay, tensors)
            if to_the_end and replay.count == len(self.slots):
                self._reached = replay.count + _MOST_LATE
                return
            raise RecomputeMismatch(
                f"checkpointed work saved {len(self.slots)} tensors in forward and {replay.count} when it was run again; it "
                "must do the same both times (global state, data-dependent branches and caches are the usual reasons)"
            )
        except _EarlyStop:
            self._reached = replay.count
            return
        except BaseException as error:
            drop_stale_nodes_after(error)
            replay.drop()
            raise
        finally:
            self._wanted = outer
            replay.close()

    def forget(self) -> None:
        """Let go of all that was recomputed."""
        with self._lock:
            for ref in self.slots:
                slot = ref()
                if slot is not None:
                    slot.held = None


class _FrameReplay:
    """One more run of a frame's work: what autograd saves arrives in the order of forward and fills the slots that wait."""

    __slots__ = ("__weakref__", "_budget", "_frame", "_hold", "_last", "_made", "_slots", "_wanted", "count")

    def __init__(self, frame: Frame, wanted: _Slot, to_the_end: bool) -> None:
        budget = frame._budget
        self._frame = frame
        self._wanted = wanted
        self._slots = {index: slot for index, ref in enumerate(frame.slots) if (slot := ref()) is not None}
        last = max(index for index, slot in self._slots.items() if slot.held is None)
        self._last = len(frame.slots) if to_the_end else last  # one that does not come
        self._made: list[weakref.ref[_Recomputed]] = []
        self._hold = index_of(budget).hold
        evicts = budget is not None and frame.evictable and "recompute" in budget.over_cap
        self._budget = budget if evicts else None  # to offer slots to
        self.count = 0

    @untraced
    def pack(self, tensor: torch.Tensor) -> _Recomputed:
        index = self.count
        self.count += 1
        slot = self._slots.get(index)
        waited_for = slot is not None
        if slot is None:
            slot = _Slot(
                self._frame, index
            )  # no longer needed by backward, but perhaps by a derivative inside the work
        else:
            compare(slot.index, slot.seen, seen(tensor, self._frame._verify), tensor)
            if slot.resident is not None:
                version = version_of(tensor)
                # A leaf that the work makes itself is another storage each time, and its version says nothing.
                if version is not None and version[0] == slot.resident[0] and version[1] != slot.resident[1]:
                    raise modified(tensor)
        if slot.held is None:
            try:
                slot.held = (redirected_hold() or self._hold)(tensor)
            except BudgetExceeded:
                if self._budget is None or self._wanted.held is None or self._last == len(self._frame.slots):
                    raise
                raise _EarlyStop from None  # the rest when it is wanted
            if self._budget is not None and waited_for:
                self._budget.offer(slot)
        if index == self._last:
            raise _EarlyStop
        made = _Recomputed(slot)
        self._made.append(weakref.ref(made))
        return made

    def close(self) -> None:
        """The replay is over. Its graph served derivatives inside the work; what user code keeps of it keeps no bytes."""
        for ref in self._made:
            made = ref()
            if made is not None:
                made.slot = None
        self._made.clear()
        self._slots.clear()
        # Autograd keeps the hooks with what they returned, and with `pack` this object.
        self._frame = self._wanted = self._budget = self._hold = None  # type: ignore[assignment]

    def arrive(self, tensors: Sequence[torch.Tensor]) -> None:
        """`tensors` will be saved next, before anything else: take them now if nothing after them is waited for."""
        if self.count + len(tensors) > self._last:
            for tensor in tensors:
                self.pack(tensor)
            raise AssertionError("the last tensor ends a replay")

    def drop(self) -> None:
        """Let go of all that has arrived."""
        for slot in self._slots.values():
            slot.held = None


class _Recomputed:
    """Stands in the graph of a replay for a tensor that the replay saved, for as long as the replay runs.

    Work that differentiates inside (forces, gradient penalties) goes backward through that graph then. A lock would not do
    here: beyond 60 nested backwards autograd goes on in another thread, while the first one holds the frame's lock.
    """

    __slots__ = ("__weakref__", "slot")

    def __init__(self, slot: _Slot) -> None:
        self.slot: _Slot | None = slot

    @untraced
    def load(self) -> torch.Tensor:
        slot = self.slot
        if slot is None:
            raise RecomputeMismatch(
                "backward reached a tensor that checkpointed work made when it was run again and that outlived the recompute "
                "(kept in an attribute, a list or a hook); keep what the first forward makes, or detach() it"
            )
        held = slot.held
        if held is None:  # given up to a full budget in the meantime
            with slot.frame._lock:
                slot.frame.recompute(slot)
                held = slot.held
        assert held is not None
        return held.load()


@untraced
def _unpack(slot: _Slot) -> torch.Tensor:
    frame = slot.frame
    with frame._lock:
        in_backward = graph_task_id() >= 0
        if slot.held is None and in_backward:
            # What this backward turns out not to need would stay until the graph is gone.
            _forget_after_backward(frame)
        frame.bring(slot)
        held = slot.held
        assert held is not None
        if not in_backward:
            frame.forget()  # a node's saved tensors are being inspected: one is given, and none kept
        elif keep_graph():
            # The node outlives this backward (retain_graph), and would keep the bytes with it.
            slot.held = None
    return held.load()


def _forget_after_backward(frame: Frame) -> None:
    ref = weakref.ref(frame)  # the frame itself would keep its inputs that long

    def forget() -> None:
        frame = ref()
        if frame is not None:
            frame.forget()

    queue_callback(forget)
