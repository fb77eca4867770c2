"""What goes to the host and comes back: what a spilled stage saves, and the input of a frame.

One `Spill` is one run of one stage, or the input of one frame. Each storage has one copy in the host budget, however many saved
tensors look into it. The first of its tensors that backward asks for brings all of them back, charged to the device's budget,
where each stays until its autograd node is done: that is what the plan counts. The copies on the host go with the nodes.

At a plan's top level an `Offload` lets copies overlap the work of other stages, by the rules in `gpuckpt.planning.simulate`:
what a stage saved is held here until the next copy out is asked for or the last stage starts, which wait for it; and when
backward reaches a frame or a spilled stage, what is offloaded next before it is asked for. Within a frame copies are made on
the current stream and waited for.

What stays where it is: storages that the budget holds already (the stage before saved them, or a frame its input), arguments
that other stages get as well, parameters, and tensors that are not strided.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import Budget
from gpuckpt.planning.tree import SPILL, Node, Recompute, first_stage
from gpuckpt.pytorch._torch_internals import graph_task_id, keep_graph, queue_callback, untraced
from gpuckpt.pytorch.engine.copies import Copies, Copy, CopySide
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes_after
from gpuckpt.pytorch.engine.hooks import enter, redirect_saves
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.residency import is_movable, is_resident
from gpuckpt.pytorch.engine.saved_storage import HeldTensor, SavedStorage, flat_bytes, modified
from gpuckpt.pytorch.engine.storage_index import Source, index_of

__all__ = ["SPILL", "Offload", "Spill", "Spilled"]


class Spilled:
    """One saved tensor whose bytes are on the host; `here` while they are on the device, still or again."""

    __slots__ = ("__weakref__", "_spill", "device", "here", "source", "there")

    holding = None  # nothing of it can be given up by a budget that is full

    def __init__(self, spill: Spill, there: HeldTensor, device: torch.device) -> None:
        self._spill = spill
        self.there = there
        self.device = device
        self.here: HeldTensor | None = None
        self.source: Source | None = None  # where its bytes were

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
            else:
                if keep_graph():  # the node outlives this backward, and would keep the bytes with it
                    spill.leave()
                    self.here = None
                spill.reached()
        return held.load()


class Spill:
    """One run of a stage, of one call or several, whose saved tensors go from `budget` to `host`.

    `copies`: who copies while other work runs; None: each copy is waited for. `left`: what was saved is held here no more.
    `choices`: for what `once` returns in a stage that no frame runs again; it stays here as long as the rest is needed.
    """

    def __init__(self, budget: Budget, host: Budget, copies: Copies | None = None, stage: int = 0) -> None:
        self.lock = threading.RLock()
        self.stage = stage
        self.left = copies is None
        self.offload: Offload | None = None
        self.choices = Record()
        self._copies = copies
        self._budget = budget
        self._here, self._there = index_of(budget), index_of(host)
        self._stay: set[int] = set()
        self._parts: list[weakref.ref[Spilled]] = []
        self._rooms: dict[int, SavedStorage] = {}  # by what holds the bytes here: where on the host they go
        self._leaving: list[Copy] = []
        self._coming: dict[int, tuple[torch.Tensor, SavedStorage, Copy | None]] | None = (
            None  # by what holds the copy on the host
        )

    def run(self, arguments: Iterable[torch.Tensor], *, replayed: bool) -> AbstractContextManager[object]:
        """The context to run a call of the stage in. What looks into `arguments`, which other stages get as well, stays. In a
        replay the frame's hooks stay too, and only who holds is another."""
        # Addresses name these storages for as long as the call runs.
        self._stay = {tensor.untyped_storage()._cdata for tensor in arguments if tensor.layout is torch.strided}
        return redirect_saves(self.hold) if replayed else enter(self._budget, self.hold, _load)

    @untraced
    def hold(self, tensor: torch.Tensor) -> HeldTensor | Spilled:
        """Have the storage of `tensor` copied to the host, or hold it where it is (see the module). Raises `BudgetExceeded`."""
        here = self._here
        if (
            not is_movable(tensor)
            or is_resident(tensor)
            or tensor.untyped_storage().nbytes() == 0
            or tensor.untyped_storage()._cdata in self._stay
        ):
            return here.hold(tensor)
        known = here.holds(tensor)
        if self._copies is None:
            if known:
                return here.hold(tensor)
            part = Spilled(self, self._on_host(lambda: self._there.hold_copy(tensor)), tensor.device)
        else:
            held = here.hold(tensor)
            assert isinstance(held.holding, SavedStorage)
            room = self._rooms.get(id(held.holding))
            if room is None:
                if known:
                    return held
                nbytes = tensor.untyped_storage().nbytes()
                room = self._rooms[id(held.holding)] = self._on_host(lambda: self._there.room(nbytes))
            part = Spilled(self, self._there.look(tensor, room), tensor.device)
            part.here = held
        self._parts.append(weakref.ref(part))
        return part

    def _on_host(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except BudgetExceeded as error:
            error.hint = f"the host budget has no room for what a spilled stage saves: {error.hint}"
            raise

    def _alive(self) -> list[Spilled]:
        return [part for ref in self._parts if (part := ref()) is not None]

    @property
    def needed(self) -> bool:
        """Whether anything that it sends to the host is still waited for."""
        return any(ref() is not None for ref in self._parts)

    def send(self) -> None:
        """Begin to copy what was saved to the host."""
        assert self._copies is not None
        for part in self._alive():
            held = part.here
            if held is None or (room := self._rooms.pop(id(held.holding), None)) is None:
                continue
            assert held.tensor is not None
            assert room.flat is not None
            assert isinstance(held.holding, SavedStorage)
            source = held.holding.flat
            if source is None:
                source = flat_bytes(held.tensor.untyped_storage(), part.device)
            what = f"what stage {self.stage} saved, on its way to the host"
            places = CopySide(room.flat, room.block), CopySide(source, held.holding.block)
            self._leaving.append(self._copies.copy(*places, what))
        self._rooms.clear()

    def let_go(self) -> None:
        """Wait for the copies on the host, and hold nothing here any more. Raises `OffloadFailed`, and `SavedTensorModified`
        where bytes changed before they were out."""
        with self.lock:
            self._finish()
            self.forget()

    def _finish(self) -> None:
        leaving, self._leaving = self._leaving, []
        for copy in leaving:
            copy.wait()
        for part in self._alive():
            held = part.here
            if held is not None and held.tensor is not None:
                if held.tensor._version != held.version:
                    raise modified(held.tensor)
                part.source = Source(held.tensor)
        self.left = True

    def leave(self) -> None:
        """In a backward after which the graph stays: send what was saved, so that what is here can be let go piece by piece."""
        if not self.left:
            self.send()
            self._finish()
            queue_callback(self.forgetting())

    def ask_back(self) -> None:
        """Begin to bring back all that is still needed. Raises `BudgetExceeded`, and then nothing is on its way."""
        with self.lock:
            if self._coming is not None or not self.left:
                return
            coming: dict[int, tuple[torch.Tensor, SavedStorage, Copy | None]] = {}
            for part in self._alive():
                there = part.there.holding
                assert isinstance(there, SavedStorage)
                if part.here is not None or id(there) in coming:
                    continue
                if part.source is not None and (known := self._here.find(part.source, part.device)) is not None:
                    coming[id(there)] = (*known, None)  # others, who came later, hold it still
                    continue
                assert there.flat is not None, "a copy lies in a pool"
                flat, holding = self._here.room_for(there.nbytes, part.device)
                assert self._copies is not None
                what = f"what stage {self.stage} saved, on its way back"
                copy = self._copies.copy(CopySide(flat, holding.block), CopySide(there.flat, there.block), what)
                coming[id(there)] = flat, holding, copy
            self._coming = coming
            if graph_task_id() >= 0:
                queue_callback(self.forgetting())

    def bring_back(self) -> None:
        """Bring back all that is still waited for. After a failure nothing is back."""
        try:
            if self._copies is None:
                brought: dict[int, tuple] = {}
                for part in self._alive():
                    if part.here is None:
                        part.here = self._here.bring(part.there, part.device, brought)
                return
            self.ask_back()
            coming, self._coming = self._coming or {}, None
            for _, _, copy in coming.values():
                if copy is not None:
                    copy.wait()
            for part in self._alive():
                if part.here is None:
                    flat, holding, _ = coming[id(part.there.holding)]
                    part.here = self._here.look_back(part.there, flat, holding)
        except BaseException as error:
            drop_stale_nodes_after(error)
            self.forget()
            raise

    def reached(self) -> None:
        """Backward is here: what is offloaded next before it is asked for."""
        if self.offload is not None:
            self.offload.reach(self.stage)

    def forget(self) -> None:
        """Let go of what is back, or on its way; the host keeps its copies."""
        with self.lock:
            self._coming = None
            if self.left:
                for part in self._alive():
                    part.here = None

    def forgetting(self) -> Callable[[], None]:
        """`forget`, without keeping this spill alive."""
        ref = weakref.ref(self)

        def forget() -> None:
            spill = ref()
            if spill is not None:
                spill.forget()

        return forget


class Offload:
    """What the top level of one forward, under `tree`, sends to the host. `starts`: numbers of the stages whose start lets go and
    sends: blocks, not the code between them."""

    def __init__(self, budget: Budget, host: Budget, copies: Copies, starts: Set[int], tree: Iterable[Node]) -> None:
        self._budgets = budget, host
        self._copies = copies
        self._starts = starts
        frames = [node for node in tree if isinstance(node, Recompute) and node.variant == SPILL]
        # What is out is let go before these.
        self._lets_go = {first_stage(node) for node in frames} | {max(starts, default=-1)}
        # All weak: what a spill saved keeps it alive, and with it this.
        self._spills: list[weakref.ref[Spill]] = []  # in the order of forward
        self._finished: list[weakref.ref[Spill]] = []  # to be sent when the next stage starts
        self._leaving: list[weakref.ref[Spill]] = []  # to be let go
        self._stage = -1

    def spill(self, stage: int) -> Spill:
        """For what stage number `stage` saves, or the input of a frame that starts with it."""
        spill = Spill(*self._budgets, self._copies, stage)
        spill.offload = self
        return spill

    def finish(self, spill: Spill) -> None:
        """The calls of a stage that spills have begun: what it saves is sent when the next stage starts."""
        if not any(ref() is spill for ref in self._finished):
            self._finished.append(weakref.ref(spill))
            self._spills.append(weakref.ref(spill))

    def send(self, spill: Spill) -> None:
        """Send what a spill has, to be let go before the next is sent."""
        spill.send()
        self._leaving.append(weakref.ref(spill))

    def send_input(self, spill: Spill) -> None:
        """`send`, for the input of a frame, which was saved just now."""
        self._spills.append(weakref.ref(spill))
        self.send(spill)

    def start_stage(self, stage: int) -> None:
        """A call of stage number `stage` starts: if it is the first, what the stage before saved is sent, and before that, or the
        last stage, what is out is let go."""
        if stage == self._stage or stage not in self._starts:
            return
        self._stage = stage
        if self._finished or stage in self._lets_go:
            leaving, self._leaving = self._leaving, []
            for ref in leaving:
                if (spill := ref()) is not None:
                    spill.let_go()
        finished, self._finished = self._finished, []
        for ref in finished:
            if (spill := ref()) is not None:
                self.send(spill)

    def reach(self, stage: int, after: int = 0) -> None:
        """Backward reaches stage number `stage`, or a frame that starts with it: ask for what is offloaded next before it, if
        that begins with stage number `after` or a later one."""
        if graph_task_id() < 0:
            return
        for ref in reversed(self._spills):
            spill = ref()
            if spill is not None and spill.stage < stage and spill.needed:
                if spill.stage >= after:
                    with suppress(BudgetExceeded):  # then it comes when it is needed
                        spill.ask_back()
                return


@untraced
def _load(held: HeldTensor | Spilled) -> torch.Tensor:
    return held.load()
