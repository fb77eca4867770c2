"""A spilled stage: what it saves goes to host memory as it is saved, and comes back for its backward.

One `Spill` is one run of one stage. Each storage is copied to the host budget once, however many saved tensors look into it,
and the device holds nothing of it until backward reaches the stage. The first of its tensors that is asked for brings all of
them back, charged to the device's budget, where each stays until its autograd node is done: that is what the plan counts, and
one batch of copies. The copies on the host go with the nodes.

What stays where it is: storages that the budget holds already (the stage before saved them, or a frame its input), arguments
that other stages get as well, parameters, and tensors that are not strided. Copies are made on the current stream and waited
for; they overlap nothing, and the plan counts on nothing else.
"""

from __future__ import annotations

import statistics
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import CheckpointBudget
from gpuckpt.pytorch._torch_internals import untraced
from gpuckpt.pytorch.saved_tensors import enter, holder_of, instead, is_resident
from gpuckpt.pytorch.stale import drop_stale_nodes_after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuckpt.pytorch.holdings import Held
    from gpuckpt.pytorch.kinds import Clock

__all__ = ["SPILL", "Link", "Spill", "Spilled", "host_budget_of", "measure_link"]

SPILL = "spill"
"""The name of the option in a plan."""

_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph
_graph_task_id = torch._C._current_graph_task_id  # -1 outside of any backward

_SMALL_BYTES, _SMALL_COUNT = 4096, 16
_LARGE_BYTES = 8 << 20
_REPEATS = 3


class Spilled:
    """One saved tensor whose bytes are on the host; `here` while they are back."""

    __slots__ = ("__weakref__", "_spill", "device", "here", "there")

    holding = None  # nothing of it can be given up by a budget that is full

    def __init__(self, spill: Spill, there: Held, device: torch.device) -> None:
        self._spill = spill
        self.there = there
        self.device = device
        self.here: Held | None = None

    def load(self) -> torch.Tensor:
        """The tensor as it was saved. Raises `BudgetExceeded` where what the stage saved does not fit."""
        spill = self._spill
        with spill.lock:
            in_backward = _graph_task_id() >= 0
            if self.here is None:
                if in_backward:
                    # What this backward turns out not to need would stay until the graph is gone.
                    torch.autograd.Variable._execution_engine.queue_callback(spill.forgetting())
                spill.bring_back()
            held = self.here
            assert held is not None
            if not in_backward:
                spill.forget()  # somebody looks at a node's saved tensors: one is given, and none kept
            elif _keep_graph():
                self.here = None  # the node outlives this backward, and would keep the bytes with it
        return held.load()


class Spill:
    """One run of a stage, of one call or several, whose saved tensors go from `budget` to `host`."""

    def __init__(self, budget: CheckpointBudget, host: CheckpointBudget) -> None:
        self.lock = threading.RLock()
        self._budget = budget
        self._here, self._there = holder_of(budget), holder_of(host)
        self._stay: set[int] = set()
        self._parts: list[weakref.ref[Spilled]] = []

    def run(self, arguments: Iterable[torch.Tensor], *, replayed: bool) -> AbstractContextManager[object]:
        """The context to run a call of the stage in. What looks into `arguments`, which other stages get as well, stays. In a
        replay the frame's hooks stay too, and only who holds is another."""
        # Addresses name these storages for as long as the call runs.
        self._stay = {tensor.untyped_storage()._cdata for tensor in arguments if tensor.layout is torch.strided}
        return instead(self.hold) if replayed else enter(self._budget, self.hold, _load)

    @untraced
    def hold(self, tensor: torch.Tensor) -> Held | Spilled:
        """Copy the storage of `tensor` to the host, or hold it where it is (see the module). Raises `BudgetExceeded`."""
        here = self._here
        if (
            tensor.layout is not torch.strided
            or type(tensor) is not torch.Tensor
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
def _load(held: Held | Spilled) -> torch.Tensor:
    return held.load()


def host_budget_of(host: CheckpointBudget | int | str, budget: CheckpointBudget) -> CheckpointBudget:
    """The budget on the host to spill to: `host` itself, or one of that size, pinned where it feeds a CUDA device.

    Raises `ValueError` for a budget that is not on the host, keeps no copies, is `budget` itself, or the one that `budget`
    spills to when it is full: the peak there would be nobody's promise.
    """
    if isinstance(host, CheckpointBudget):
        if host is budget:
            raise ValueError("host_budget is the budget itself; spilling needs a second one")
        if host is budget.spill_to:
            raise ValueError("host_budget is the budget's own spill_to; what is spilled by plan needs one of its own")
        if host.device != "cpu" or host.hold != "pool":
            raise ValueError(
                f"host_budget is on {host.device!r} with hold={host.hold!r}; expected a size, or "
                'CheckpointBudget(..., device="cpu", hold="pool")'
            )
        return host
    allocator = None
    if budget.device != "cpu":
        from gpuckpt.memory.cupy_pool import pinned_buffer

        allocator = pinned_buffer
    return CheckpointBudget(host, device="cpu", hold="pool", allocator=allocator)


class Link(NamedTuple):
    """What moving one storage costs, one way: `latency_s`, and its bytes by `bytes_per_s`."""

    bytes_per_s: float
    latency_s: float


def measure_link(device: torch.device, host: CheckpointBudget, clock: Clock) -> Link:
    """Time spills of tensors of `device`, small and large, there and back; one way is half of that."""
    large = torch.ones(_LARGE_BYTES, dtype=torch.uint8, device=device)
    small = [torch.ones(_SMALL_BYTES, dtype=torch.uint8, device=device) for _ in range(_SMALL_COUNT)]
    with _like(host, 2 * _LARGE_BYTES) as (budget, there):
        latency_s = _round_trip_s(small, budget, there, clock) / (2 * _SMALL_COUNT)
        large_s = _round_trip_s([large], budget, there, clock) / 2
    return Link(_LARGE_BYTES / max(large_s - latency_s, large_s / 2), latency_s)


@contextmanager
def _like(host: CheckpointBudget, nbytes: int) -> Iterator[tuple[CheckpointBudget, CheckpointBudget]]:
    """A pair of budgets for trials, so that the books of the real ones stay as they are."""
    there = CheckpointBudget(nbytes, device="cpu", hold="pool", allocator=host.allocator)
    yield CheckpointBudget(nbytes, device="cpu"), there
    there.close()


def _round_trip_s(tensors: list[torch.Tensor], budget: CheckpointBudget, host: CheckpointBudget, clock: Clock) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):  # the first warms up
        began_s = clock.now()
        spill = Spill(budget, host)
        parts = [spill.hold(tensor) for tensor in tensors]
        spill.bring_back()
        seconds.append(clock.now() - began_s)
        del parts, spill
    return statistics.median(seconds[1:])
