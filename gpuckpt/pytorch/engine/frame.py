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

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuckpt.errors import BudgetExceeded, CheckpointError, RecomputeMismatch
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import graph_task_id, keep_graph, queue_callback, untraced
from gpuckpt.pytorch.engine.early_stop import RunsOtherwise, replaying
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes_after
from gpuckpt.pytorch.engine.fence.contexts import ContextValues
from gpuckpt.pytorch.engine.hooks import enter, redirect_saves
from gpuckpt.pytorch.engine.kept.current import paused
from gpuckpt.pytorch.engine.replay import EarlyStop, FrameReplay, Recomputed, Replayed, Slot
from gpuckpt.pytorch.engine.saved_input import saved_input
from gpuckpt.pytorch.engine.saved_storage import writes_late
from gpuckpt.pytorch.engine.subclasses import Carried
from gpuckpt.pytorch.engine.verify import Verify

__all__ = ["Frame"]


_RETAINED = (
    "this backward runs with retain_graph or create_graph (gradient penalties, second derivatives): what forward kept stays for "
    "its whole length, where plans count on its going piece by piece, so that such a step needs a larger budget"
)
_MOST_LATE = 2  # tensors that an operation saves before its kernel runs, of those whose kernels write into them


class Frame:
    """One piece of work that is run now and replayed in backward.

    `replay(tensors)` does the work again from the tensors that were given to `save`, in that order. It must not refer to
    the frame. `budget` holds what is recomputed; None: nothing is charged. Not `evictable`: a full budget recomputes no more.
    `partial`: a replay runs only what it takes to make what is waited for (see kept/parts.py); tensors before number `cut` are
    then waited for apart from the others, after them. `on_save`: called with each tensor that is saved in forward. `made`: how
    many frames there have been.
    """

    evictable = True
    partial = False
    cut = 0
    on_save: Callable[[torch.Tensor], None] | None = None
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
        self.slots: list[weakref.ref[Slot]] = []
        self._wanted: Slot | None = None
        self._reached = 0  # how many tensors the latest replay saw saved
        self._lock = threading.RLock()
        self._context = ContextValues()  # backward may run elsewhere: on CUDA, in a thread of autograd's

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
    def _number(self, tensor: torch.Tensor) -> Slot:
        slot = Slot(self, len(self.slots))
        slot.describe(tensor)
        if self.on_save is not None:
            self.on_save(tensor)
        self.slots.append(weakref.ref(slot))
        return slot

    def bring(self, wanted: Slot) -> None:
        """Recompute `wanted`; to the end of the work where its kernel writes into it, and has not run where a replay stops."""
        if wanted.held is None:
            self.recompute(wanted)
        if wanted.index >= self._reached - _MOST_LATE and writes_late():
            wanted.held = None
            self.recompute(wanted, to_the_end=True)

    def recompute(self, wanted: Slot, to_the_end: bool = False) -> None:
        """Replay, and fill the slots that backward still needs, `wanted` among them. After a failure no slot holds anything.

        Raises `BudgetExceeded` where they do not fit, `RecomputeMismatch` where the work is not what it was.
        """
        self._forget_other_half(wanted)
        replay = FrameReplay(self, wanted, to_the_end)
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
                enter(self._budget, replay.pack, Recomputed.load),
                replaying(replay),
                paused(),
            ):
                self._context.run(self._replay, tensors)
            if replay.ended:
                self._reached = replay.count
                return
            if to_the_end and replay.count == len(self.slots):
                self._reached = replay.count + _MOST_LATE
                return
            raise RecomputeMismatch(
                f"checkpointed work saved {len(self.slots)} tensors in forward and {replay.count} when it was run again; it "
                "must do the same both times (global state, data-dependent branches and caches are the usual reasons)"
            )
        except EarlyStop:
            self._reached = replay.count
            return
        except RunsOtherwise:
            replay.drop()
        except BaseException as error:
            drop_stale_nodes_after(error)
            if replay.ended and isinstance(error, Exception) and not isinstance(error, CheckpointError):
                self._reached = replay.count
                return
            replay.drop()
            if isinstance(error, BudgetExceeded) and keep_graph() and _RETAINED not in error.hint:
                error.hint = f"{_RETAINED}; {error.hint}"
            if replay.check is None or not isinstance(error, Exception) or isinstance(error, BudgetExceeded):
                raise  # else part of the work may have met what stood for the rest: the whole of it tells
        finally:
            self._wanted = outer
            replay.close()
        self.partial, self.cut = False, 0
        self.recompute(wanted, to_the_end)

    def _forget_other_half(self, wanted: Slot) -> None:
        """Backward is done with the one where the other is asked for; what nothing has asked for would stay."""
        for index, ref in enumerate(self.slots if self.cut else ()):
            slot = ref()
            if slot is not None and (index < self.cut) != (wanted.index < self.cut):
                slot.held = None

    def forget(self) -> None:
        """Let go of all that was recomputed."""
        with self._lock:
            for ref in self.slots:
                slot = ref()
                if slot is not None:
                    slot.held = None


@untraced
def _unpack(slot: Slot) -> torch.Tensor:
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


def _forget_after_backward(frame: Replayed) -> None:
    ref = weakref.ref(frame)  # the frame itself would keep its inputs that long

    def forget() -> None:
        frame = ref()
        if frame is not None:
            frame.forget()

    queue_callback(forget)
