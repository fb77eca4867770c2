"""Runs a model's stages, one call at a time, under a plan's tree.

The model calls its blocks itself; each call arrives here as `Walk.step`. Frames therefore open and close around calls that
come one by one: a frame that covers stages i..j saves what stage i receives, and of the later ones what they receive
besides their predecessor's output; its hooks are active inside the stages' calls only. In backward a frame replays its part
of the tree through a walk of its own, so nesting needs no special case.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuckpt.errors import InvalidPlan
from gpuckpt.memory import Budget
from gpuckpt.planning import KEEP, Keep, Node, Recompute
from gpuckpt.planning.tree import first_stage, last_stage
from gpuckpt.pytorch._torch_internals import version_number
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.fence.fence import Fence
from gpuckpt.pytorch.engine.frame import Frame
from gpuckpt.pytorch.engine.kept.current import paused, reading, recording
from gpuckpt.pytorch.engine.kept.flow import Flow
from gpuckpt.pytorch.engine.kept.options import is_option, part_of
from gpuckpt.pytorch.engine.kept.parts import asked_for, keeping_part
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.offload import SPILL, Offload, Spill
from gpuckpt.pytorch.engine.unread import is_entry, stand_in
from gpuckpt.pytorch.engine.verify import Verify
from gpuckpt.pytorch.profiling.call_hooks import run_module
from gpuckpt.pytorch.profiling.chain_finder import Outputs, tensors_in
from gpuckpt.pytorch.profiling.isolation import connected
from gpuckpt.pytorch.trace import stage_range

__all__ = ["Walk"]


class _FromStage:
    """Stands among the arguments for output number `index` of the stage before."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


_NOT_KEPT = object()
"""Stands among the arguments for a tensor that the stage does not read."""


class _FromFrame:
    """Stands among the arguments for kept tensor number `index` of the frame."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A call of a stage: among the leaves of its arguments, tensors and other values, or `_FromStage`s, or (kept) `_FromFrame`s.
    After the arguments come the tensors inside of objects, and those that its fence wants kept."""

    module: torch.nn.Module
    stage: int
    leaves: Sequence[Any]
    spec: Any
    objects: Objects
    fence: Fence

    def rewritten(self, kind: type, rewrite: Callable[[Any], Any]) -> _Arrival:
        """The same call with `rewrite` applied to leaves of a kind. Most calls of a deep plan have none: they stay."""
        if not any(isinstance(leaf, kind) for leaf in self.leaves):
            return self
        leaves = [rewrite(leaf) if isinstance(leaf, kind) else leaf for leaf in self.leaves]
        return _Arrival(self.module, self.stage, leaves, self.spec, self.objects, self.fence)


class _Open:
    """A frame whose stages are still arriving."""

    def __init__(self, node: Node, walk: Walk) -> None:
        self.program: list[_Arrival] = []
        self.last = last_stage(node)
        self.option = option = "" if isinstance(node, Recompute) else node.variant  # of the one stage that it covers
        # By id and version: what is kept already, and its number.
        self._known: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int]] = {}
        self._count = 0
        self._loose: set[int] = set()  # numbers of kept tensors that are cut from their graph
        program, loose, verify, preserve = self.program, self._loose, walk.verify, walk.preserve_rng_state
        budget, host, evictable, unread = walk.budget, walk.host, walk.evictable, walk.unread
        flows = walk.flows
        self._spill: Spill | None = None  # of its input
        self._offload = offload = walk.offload if walk.is_top(node) else None
        first = first_stage(node)
        if isinstance(node, Recompute) and node.variant == SPILL:
            assert offload is not None, "a walk was given all that its nodes need"
            self._spill = offload.spill(first)
        children = node.children if isinstance(node, Recompute) else (Keep(node.stage),)

        record = self.record = Record()

        def replay(kept: list[torch.Tensor]) -> None:
            if offload is not None:
                offload.reach(first, first - 1 if option else 0)
            kept = [connected(tensor) if number in loose else tensor for number, tensor in enumerate(kept)]
            arrivals = [call.rewritten(_FromFrame, lambda leaf: kept[leaf.index]) for call in program]
            inner = Walk(children, budget, verify, preserve, arrivals, host, evictable, None, unread, flows)
            run = reading(record)
            given = asked_for(run) if option else nullcontext()
            with run:
                for call in arrivals:
                    leaves = call.rewritten(_FromStage, lambda leaf: inner.previous.tensors[leaf.index]).leaves
                    count = call.spec.num_leaves
                    inside = count + call.objects.count
                    whole = leaves[:count]
                    if call.objects:
                        kept_inside = [stand_in() if leaf is _NOT_KEPT else leaf for leaf in leaves[count:inside]]
                        whole = call.objects.rebuilt(whole, kept_inside)
                    args, kwargs = pytree.tree_unflatten(whole, call.spec)
                    with call.fence.restored(leaves[inside:]), given:  # one call, under an option
                        inner.step(call.stage, call.module, args, kwargs, call.fence, leaves[inside:])

        self.frame = Frame(replay, budget, verify)
        self.frame.evictable = evictable
        self.frame.partial = bool(option)

    def receive(self, calls: Iterable[_Arrival], links: Container[int] = ()) -> None:
        """Save what the replay of the next stages needs besides the output of the stage before each. `links`: ids of what the
        first is given of that, if it opens the frame."""
        kept: list[torch.Tensor] = []
        self.program += [call.rewritten(torch.Tensor, lambda leaf: self._keep(leaf, kept, links)) for call in calls]
        if self._spill is None or not links:
            self.frame.save(kept)
            return
        for tensor in kept:
            with self._spill.run((), replayed=False) if id(tensor) in links else nullcontext():
                self.frame.save([tensor])
        assert self._offload is not None
        self._offload.send_input(self._spill)

    def _keep(self, tensor: torch.Tensor, kept: list[torch.Tensor], links: Container[int]) -> _FromFrame:
        key = id(tensor), version_number(tensor)
        known, number = self._known.get(key, (None, 0))
        if known is None or known() is not tensor:
            number = self._count
            self._count += 1
            self._known[key] = weakref.ref(tensor), number
            if tensor.requires_grad and not tensor.is_leaf and id(tensor) not in links:
                # What came past the stage before may be looked at by nobody (an entry of a cache): its graph would stay with it.
                self._loose.add(number)
                tensor = tensor.detach()
            kept.append(tensor)
        return _FromFrame(number)


class Walk:
    """One pass over the stages that `nodes` cover.

    `budget` holds what frames recompute. `previous`: what the latest stage returned. `ahead`: in a replay, the
    calls that will come. Frames then save all that their stages will be given as soon as they open, so that a replay that
    ends with a frame stops there (early stop) and does not run the frame's stages for the sake of the last one's arguments.
    `host`: holds what stages save that are kept under the option "spill", and inputs of frames; `offload`: lets copies of that
    overlap the work of other stages (None: each is waited for). Not `evictable`: frames recompute what the plan says, and no more
    where the budget is full. `unread`: classes of stages that read no tensor inside of objects among their arguments.
    `flows`: by stage, of those under an option; filled where they first run.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        budget: Budget | None,
        verify: Verify | None = None,
        preserve_rng_state: bool = True,
        ahead: Sequence[_Arrival] | None = None,
        host: Budget | None = None,
        evictable: bool = True,
        offload: Offload | None = None,
        unread: frozenset[type] = frozenset(),
        flows: dict[int, Flow] | None = None,
    ) -> None:
        self.budget = budget
        self.offload = offload
        self.unread = unread
        self.flows: dict[int, Flow] = {} if flows is None else flows
        self.evictable = evictable
        self.host = host
        self.verify = verify
        self.preserve_rng_state = preserve_rng_state
        self.previous = Outputs()
        self._ahead = ahead
        self._stages = [] if ahead is None else [call.stage for call in ahead]
        self._calls = 0
        self._opens: deque[Node] = deque()
        self._spilled: dict[int, Spill] = {}
        self._nodes = tuple(nodes)
        self._collect(self._nodes)
        self._open: list[_Open] = []

    def _collect(self, nodes: tuple[Node, ...]) -> None:
        """Which frames there are, in the order in which they begin, and which stages are spilled here; those within a frame are
        when it replays them. A stage of which only products are kept is a frame. Plans nest deeply: no recursion."""
        for node in nodes:
            if not isinstance(node, Recompute) and node.variant != KEEP:
                option = part_of(node.variant) if is_option(node.variant) else None
                if option is not None and not option.on_host:
                    continue
                if (option is None and node.variant != SPILL) or self.host is None or self.budget is None:
                    raise InvalidPlan(
                        f"the plan keeps stage {node.stage} under the option {node.variant!r}; what can be run is {KEEP!r}, "
                        f"what some operations return (such as 'kept-3+7'), and {SPILL!r} with a host_budget or 'kept-3+7@host'"
                    )
                offload = self.offload
                self._spilled[node.stage] = offload.spill(node.stage) if offload else Spill(self.budget, self.host)
            elif isinstance(node, Recompute) and node.variant != KEEP and self.offload is None:
                raise InvalidPlan(
                    f"the plan has the input of stage {first_stage(node)} on the host, which needs a host_budget, and a frame "
                    "that is in no other"
                )
        waiting = list(nodes[::-1])
        while waiting:
            node = waiting.pop()
            if isinstance(node, Recompute):
                self._opens.append(node)
                waiting.extend(reversed(node.children))
            elif is_option(node.variant):
                self._opens.append(node)

    def _opening(self, stage: int) -> list[_Open]:
        """The frames that begin with a call of `stage`, outermost first: also where stages before it were skipped."""
        found = []
        while self._opens and first_stage(self._opens[0]) <= stage:
            node = self._opens.popleft()
            if last_stage(node) >= stage:
                found.append(_Open(node, self))
        return found

    def is_top(self, node: Node) -> bool:
        """Whether a node is in no frame."""
        return any(each is node for each in self._nodes)

    def step(
        self,
        stage: int,
        module: torch.nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        fence: Fence | None = None,
        kept: Sequence[torch.Tensor] = (),
        recompute: bool = False,
    ) -> Any:
        """Run the next call, which is part of stage number `stage`: `module` with these arguments. A stage may be several
        calls in a row. In a replay everything is as forward saw it: `fence` is forward's, and `kept` what that wanted kept.
        `recompute`: this first call of a stage, and what follows of it, in a frame where the plan keeps it here."""
        while self._open and self._open[-1].last < stage:
            self._open.pop()
        if self.offload is not None:
            with paused():
                self.offload.start_stage(stage)
        opening = self._opening(stage)
        here = not self._open and not self._spilled and all(opened.option for opened in opening)
        if recompute and here and self.offload is None:
            opening = [_Open(Recompute((Keep(stage),)), self)]
        links = self.previous.unchanged()
        learning = None
        keeping: list[keeping_part] = []
        with ExitStack() as hooks:
            if opening or self._open:
                leaves, spec = pytree.tree_flatten((args, kwargs))
                objects = Objects(leaves)
                if fence is None:
                    fence = learning = Fence(module, leaves, self.preserve_rng_state)
                    kept = fence.kept
                inside: Sequence[Any] = objects.release()
                if type(module) in self.unread:
                    inside = [_NOT_KEPT if is_entry(tensor) else tensor for tensor in inside]
                given = objects.taken_out(leaves) if objects else leaves
                call = _Arrival(module, stage, [*given, *inside, *kept], spec, objects, fence)
            if (spill := self._spilled.get(stage)) is not None:  # before what opens here, and saves into it
                for opened in opening:
                    opened.record.begin()
                if self._ahead is None and not opening:
                    hooks.enter_context(recording(spill.choices.begin()))
                flat = pytree.tree_leaves((args, kwargs))
                within = [x for x in Objects(flat).tensors if type(module) not in self.unread or not is_entry(x)]
                read = Fence(module, flat, self.preserve_rng_state).kept if fence is None else kept
                shared = [tensor for tensor in (*tensors_in(flat), *within, *read) if id(tensor) not in links]
                if self.offload is not None:
                    self.offload.finish(spill)
                hooks.enter_context(spill.run(shared, replayed=self._ahead is not None))
                del flat, within, read, shared, spill
            if opening or self._open:
                with paused():
                    self._announce(call, opening, links, hooks)
                hooks.enter_context(recording(*[opened.record for opened in self._open]))
                keeping = [self._keeping(opened, call) for opened in opening if opened.option]
                del leaves, call, given, inside
            if learning is not None:
                hooks.enter_context(learning.watching())
            for mode in keeping:  # last: they see what the stage does, and nothing else
                hooks.enter_context(mode)
            self.previous = Outputs()  # only those who go on with it hold it from here on
            with stage_range(stage, recompute=self._ahead is not None):
                out = run_module(module, args, kwargs)
        # Noted by now. A call that returned at once says nothing of others.
        self.flows.update((stage, mode.flow) for mode in keeping if mode.flow.saved)
        if learning is not None:
            learning.learn()
        self.previous = Outputs(tensors_in(out))
        self._calls += 1
        return out

    def _keeping(self, opened: _Open, call: _Arrival) -> keeping_part:
        """The context in which a stage under an option keeps what that says."""
        part, flow = part_of(opened.option), self.flows.get(call.stage)
        known = flow is not None and flow.steady and flow.repeated
        if flow is None or not known:
            flow = Flow(flow)
            flow.begin([*tensors_in(call.leaves), *call.module.parameters(), *call.module.buffers()])
            opened.frame.on_save = flow.save
        opened.frame.cut = part.cut
        return keeping_part(opened.record, part, flow, opened.frame.slots, known=known)

    def _announce(self, call: _Arrival, opening: list[_Open], links: dict[int, int], hooks: ExitStack) -> None:
        """Tell the open frames and those that open now of a call, and enter their hooks, outermost first."""
        later = call.rewritten(torch.Tensor, lambda leaf: _FromStage(links[id(leaf)]) if id(leaf) in links else leaf)
        if self._ahead is None:
            for opened in self._open:
                opened.receive([later])
                hooks.enter_context(opened.frame.hooks())
        elif self._open:  # the hooks that count are the innermost
            hooks.enter_context(self._open[-1].frame.hooks())
        for opened in opening:
            opened.record.begin(away=call.stage in self._spilled)
            if self._ahead is None:
                opened.receive([call], links)
            else:
                following = self._ahead[self._calls + 1 : bisect_right(self._stages, opened.last)]
                opened.receive([call, *following], links)
            hooks.enter_context(opened.frame.hooks())
        self._open += opening
