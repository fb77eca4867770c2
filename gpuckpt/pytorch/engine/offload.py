"""A spilled stage: what it saves goes to host memory as it is saved, and comes back for its backward.

One `Spill` is one run of one stage. Each storage is copied to the host budget once, however many saved tensors look into it,
and the device holds nothing of it until backward reaches the stage. The first of its tensors that is asked for brings all of
them back, charged to the device's budget, where each stays until its autograd node is done: that is what the plan counts, and
one batch of copies. The copies on the host go with the nodes.

What stays where it is: storages that the budget holds already (the stage before saved them, or a frame its input), arguments
that other stages get as well, parameters, and tensors that are not strided. Copies are made on the current stream and waited
for: transfers are synchronous, and the planner accounts for that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import graph_task_id, keep_graph, queue_callback, untraced
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes_after
from gpuckpt.pytorch.engine.hooks import enter, redirect_saves
from gpuckpt.pytorch.engine.residency import is_movable, is_resident
from gpuckpt.pytorch.engine.saved_storage import HeldTensor
from gpuckpt.pytorch.engine.storage_index import index_of

__all__ = ["SPILL", "Spill", "Spilled"]

SPILL = "spill"
"""The name of the option in a plan."""


class Spilled:
    """One saved tensor whose bytes are on the host; `here` while they are back."""

    __slots__ = ("__weakref__", "_spill", "device", "here", "there")

    holding = None  # nothing of it can be given up by a budget that is full

    def __init__(self, spill: Spill, there: HeldTensor, device: torch.device) -> None:
        self._spill = spill
        self.there = there
        self.device = device
        self.here: HeldTensor | None = None

    def load(self) -> torch.Tensor:
        """The tensor as it was saved. Raises `BudgetExceeded` where what the stage saved does not fit."""
        spill = self._spill
        with spill.lock:
            in_backward = graph_task_id() >= 0
            if self.here is None:
                if in_backward:
                    # What this backward turns out not to need would stay until the graph is gone.
                    queue_callback(spill.forgetting())
                spill.bring_back()
            held = self.here
            assert held is not None
            if not in_backward:
                spill.forget()  # a node's saved tensors are being inspected: one is given, and none kept
            elif keep_graph():
                self.here = None  # the node outlives this backward, and would keep the bytes with it
        return held.load()


class Spill:
    """One run of a stage, of one call or several, whose saved tensors go from `budget` to `host`."""

    def __init__(self, budget: Budget, host: Budget) -> None:
        self.lock = threading.RLock()
        self._budget = budget
        self._here, self._there = index_of(budget), index_of(host)
        self._stay: set[int] = set()
        self._parts: list[weakref.ref[Spilled]] = []

    def run(self, arguments: Iterable[torch.Tensor], *, replayed: bool) -> AbstractContextManager[object]:
        """The context to run a call of the stage in. What looks into `arguments`, which other stages get as well, stays. In a
        replay the frame's hooks stay too, and only who holds is another."""
        # Addresses name these storages for as long as the call runs.
        self._stay = {tensor.untyped_storage()._cdata for tensor in arguments if tensor.layout is torch.strided}
        return redirect_saves(self.hold) if replayed else enter(self._budget, self.hold, _load)

    @untraced
    def hold(self, tensor: torch.Tensor) -> HeldTensor | Spilled:
        """Copy the storage of `tensor` to the host, or hold it where it is (see the module). Raises `BudgetExceeded`."""
        here = self._here
        if (
            not is_movable(tensor)
            or is_resident(tensor)
            or tensor.untyped_storage().nbytes() == 0
            or tensor.untyped_storage()._cdata in self._stay
            or here.holds(tensor)
        ):
            return here.hold(tensor)
        try:
            there = self._there.hold_copy(tensor)
        except BudgetExceeded as error:
            error.hint = f"the host budget has no room for what a spilled stage saves: {error.hint}"
            raise
        part = Spilled(self, there, tensor.device)
        self._parts.append(weakref.ref(part))
        return part

    def bring_back(self) -> None:
        """Bring back all that is still waited for. After a failure nothing is back."""
        parts = [part for ref in self._parts if (part := ref()) is not None]
        brought: dict[int, tuple] = {}
        try:
            for part in parts:
                if part.here is None:
                    part.here = self._here.bring(part.there, part.device, brought)
        except BaseException as error:
            drop_stale_nodes_after(error)
            self.forget()
            raise

    def forget(self) -> None:
        """Let go of what is back; the host keeps its copies."""
        with self.lock:
            for ref in self._parts:
                part = ref()
                if part is not None:
                    part.here = None

    def forgetting(self) -> Callable[[], None]:
        """`forget`, without keeping this spill alive."""
        ref = weakref.ref(self)

        def forget() -> None:
            spill = ref()
            if spill is not None:
                spill.forget()

        return forget


@untraced
def _load(held: HeldTensor | Spilled) -> torch.Tensor:
    return held.load()
