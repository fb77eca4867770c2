"""The judge: what a plan holds and how long it takes, step by step, in a runtime that keeps to `Keep` and `Recompute`.

The rules, which the runtime follows to the byte:
- Forward runs the top level in order. `Keep` holds what the stage saves; a frame holds its input and its stages' extras.
- Backward runs in reverse. Before the backward of a frame's last stage the frame runs its children forward again, up to the
  last thing that is held: a frame that *ends* a sub-plan is then not run, and of a stage that ends one not its tail.
- What an option makes again is held from before the backward of its stage to the end of that; where it does so in two steps, the
  first half is let go before the second is made.
- While the backward of a stage runs, what checkpoints inside of it recompute is held as well.
- When the backward of a stage is done its saves are let go; when that of all stages of a frame is, the frame's input.
- What a stage holds whose result forward drops goes with that, and a frame with the last of its stages; when the next stage has
  what it starts from. A recompute holds nothing for it.
- A storage is charged once however many hold it, and let go with its last holder.
- An extra that an earlier stage made is what forward made. When the frame that holds it runs its maker again, that makes another
  of the same size, which the stages next to it share; the two are two storages.
- What an option spills goes to the host, and so does the input of a frame that says so, except storages that are held already,
  which stay held. It comes back, charged again, for the backward, with whose end its copy on the host goes.
- Within a frame that stops the work (`Variant.moved_s` is part of its seconds). At top level one link copies while stages
  run: out from the start of the next stage on (of a frame: of its own first), and what is out is let go before the next copy
  out is asked for or the last stage starts, which wait for it; stages that cannot be recomputed (code between blocks) do not
  count. What has not been let go by the end of forward stays. Backward brings back what a frame or stage needs when it
  reaches that, unless it is on its way, and then asks for what is offloaded next before it; a stage of which an option
  makes a part again asks for what the stage before it has offloaded.

Held bytes therefore only rise in forward and recompute, and fall in backward. `total` adds, by the step: the stage's
input and output while it runs, its workspace, and the gradients that come and go.

Every node is held exactly once, so the walk takes time linear in the tree even when the plan's forwards are quadratic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from gpuckpt.planning.chain import KEEP, Chain, Stage
from gpuckpt.planning.transfers import HostBytes, Traffic, Transfer
from gpuckpt.planning.tree import SPILL, DroppedRuns, Node, RangeMax, Step, check_tree

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """What a plan does.

    Attributes:
        peak_bytes, peak_step: the most bytes held and the step where that is first reached.
        trace: (step, bytes held after it), in order of execution.
        forward_counts: how often each stage's forward runs in one training step.
        recompute_s: seconds of forward run again in backward; step_s: seconds of everything.
        total_peak_bytes, total_peak_step: the same as the peak, for all bytes alive (see the module).
        host_peak_bytes: the most bytes spilled to the host at one time.
        transfers: the copies of the top level, in the order in which they were asked for.
    """

    peak_bytes: int
    peak_step: str
    trace: tuple[tuple[str, int], ...]
    forward_counts: tuple[int, ...]
    recompute_s: float
    step_s: float
    total_peak_bytes: int
    total_peak_step: str
    host_peak_bytes: int
    transfers: tuple[Transfer, ...] = ()


def simulate(chain: Chain, tree: Iterable[Node]) -> Simulation:
    """Run `tree` on `chain`. `InvalidPlan` when the tree is no plan for the chain.

    >>> from gpuckpt.planning import Keep, Recompute, Stage
    >>> chain = Chain((Stage("a", 1.0, 2.0, (0, 1), (0,)), Stage("b", 1.0, 2.0, (2,), (1,))), (400, 100, 600))
    >>> simulate(chain, [Keep(0), Keep(1)]).peak_bytes
    1100
    >>> found = simulate(chain, [Recompute((Keep(0),)), Keep(1)])
    >>> found.peak_bytes, found.recompute_s, found.forward_counts
    (1000, 1.0, (2, 1))
    """
    run = _Run(chain, check_tree(chain, tree))
    run.step()
    counts = tuple(accumulate(run.count_changes))[:-1]
    return Simulation(
        run.peak_bytes,
        run.peak_step,
        tuple(run.trace),
        counts,
        run.recompute_s,
        run.step_s,
        run.total_peak_bytes,
        run.total_peak_step,
        run.host.peak_bytes,
        run.traffic.transfers,
    )


class _Run:
    """The state of one simulated training step."""

    def __init__(self, chain: Chain, steps: list[Step]) -> None:
        self.chain = chain
        self.steps = steps
        # Of an extra that a stage makes, what a recompute makes anew is numbered after all others.
        self.made = chain.made_extras
        self.footprints = chain.footprints * 2 if self.made else chain.footprints
        self.holders = [0] * len(self.footprints)
        self.held = _Held(self.holders)
        self.kept: dict[int, tuple[int, ...]] = {}  # what a node holds, by its number
        self.held_bytes = 0
        self.peak_bytes = 0
        self.peak_step = "start"
        self.total_peak_bytes = 0
        self.total_peak_step = "start"
        self.trace: list[tuple[str, int]] = []
        self.host = HostBytes(chain.storages * 2 if self.made else chain.storages)
        self.spilled: dict[int, _SpilledIds] = {}  # by stage, within frames
        self.traffic = Traffic(self)
        self.last_block = max(chain.blocks, default=-1)
        self.count_changes = [0] * (len(chain) + 1)
        self.recompute_s = 0.0
        self.step_s = 0.0
        self.forward_sums = [0.0, *accumulate(stage.forward_s for stage in chain.stages)]
        self.transients = RangeMax([self._transient_bytes(i) for i in range(len(chain))])
        self.dropped = DroppedRuns(chain.stages)
        self.leaving: list[tuple[int, int]] = []  # nodes of the top level, with the stage before which they are dropped

    def step(self) -> None:
        self._forward(0, len(self.steps), None, len(self.chain))
        self._drop(None)
        # Whoever is on top of the stack goes backward next; `~i` marks a frame whose children are done.
        stack = self._children(0, len(self.steps), staying=True)
        root = len(self.chain)
        while stack:
            i = stack.pop()
            if i < 0:
                self.release(self.kept.pop(~i))
                self.traffic.forget(~i)
                self.record(f"end of frame {self._span(self.steps[~i])}")
            elif self.steps[i].variant is None:
                if self.steps[i].depth == 0:
                    root = self.steps[i].first
                    self.traffic.reach(i, after=0)
                self._forward(i + 1, self.steps[i].end, self.steps[i], root)
                stack.append(~i)
                stack.extend(self._children(i + 1, self.steps[i].end, staying=True))
            else:
                self._backward(i)

    def _children(self, start: int, end: int, staying: bool = False) -> list[int]:
        children = []
        while start < end:
            if not staying or self.dropped.at(self.steps[start].first, self.steps[start].last) is None:
                children.append(start)
            start = self.steps[start].end
        return children

    def _drop(self, stage: int | None, start: tuple[int, ...] = ()) -> None:
        """Let go of what forward drops before `stage` runs, which has its inputs, `start`, by then; None: by the end."""
        going = [pair for pair in self.leaving if stage is None or pair[0] <= stage]
        if going:
            self.hold(start)
            self.record("forward")
            self.leaving = [pair for pair in self.leaving if pair not in going]
            for _, node in going:
                self.release(self.kept.pop(node))
            self.release(start)

    def _forward(self, start: int, end: int, frame: Step | None, root: int) -> None:
        """Run the nodes `start..end` forward and hold what they hold; `frame` is what recomputes them, if anything, and `root`
        the first stage of the outermost frame around it."""
        label = "forward" if frame is None else f"recompute {self._span(frame)}:"
        # While a frame recomputes, the gradient of its last stage's output waits.
        gradient_bytes = 0 if frame is None else self.chain.stages[frame.last].output_bytes
        for i in self._children(start, end):
            step = self.steps[i]
            stage = self.chain.stages[step.first]
            dropped_at = self.dropped.at(step.first, step.last)
            if frame is None and dropped_at is not None:
                self.leaving.append((dropped_at, i))
            elif dropped_at is not None and step.ends:
                continue  # nothing waits for it
            dropped = frame is not None and dropped_at is not None
            if frame is None and step.variant is not None:
                self._drop(step.first, () if step.variant in (KEEP, SPILL) else (*stage.inputs, *stage.extras))
            if frame is None and stage.recomputable:
                self.traffic.start_stage(last=step.first == self.last_block, sends=step.moved)
            if step.variant is not None:
                option = stage.option(step.variant)
                saves = self.kept[i] = () if dropped else self._anew(option.saves, stage.extras, root)
                spilled = self._anew(option.spilled, stage.extras, root)
                if spilled and frame is None:
                    spilled = tuple(x for x in spilled if x not in saves)
                    self.traffic.finished = self.traffic.offload(i, step.first, spilled, option.moved_s, stage.name)
                away = self._spill(step.first, saves, spilled) if spilled and frame is not None else ()
                self.hold(saves)
                stopped_s = (
                    stage.tail_s if frame is not None and step.ends else option.moved_s if frame is None else 0.0
                )
                self._spend(step.first, step.last, option.forward_s - stopped_s, frame)
                self.hold(away)  # all of it may still be there when the last of it goes
                self._alive(f"{label} {stage.name}", gradient_bytes + self._transient_bytes(step.first))
                self.release(away)
                self.record(f"{label} {stage.name}" + ("" if step.variant == KEEP else f" ({step.variant})"))
                continue
            inputs = self._anew(stage.inputs, (), root)
            extras = self.chain.extras_of(step.first, step.last)
            if step.moved:
                moved = tuple(x for x in inputs if x not in extras)
                inputs = tuple(x for x in inputs if x not in moved)
                leaving = self.traffic.offload(i, step.first, moved, stage.input_moved_s or 0.0, self._span(step))
            self.kept[i] = () if dropped else (*inputs, *extras)
            self.hold(self.kept[i])
            self.record(f"{label} input of {self._span(step)}")
            if frame is None:
                self._drop(step.first)
                if step.moved:
                    self.traffic.copy_out(leaving)
                for number in range(step.first, step.last + 1):
                    if number > step.first:
                        self.traffic.start_stage(last=number == self.last_block, sends=False)
                    self._spend(number, number, self.chain.stages[number].forward_s, None)
                    self._alive(f"{label} {self._span(step)}", self._transient_bytes(number))
            elif not step.ends:
                seconds = self.forward_sums[step.last + 1] - self.forward_sums[step.first]
                self._spend(step.first, step.last, seconds, frame)
                transient = self._transient_bytes(step.first)
                if step.last > step.first:
                    transient = max(transient, self.transients.over(step.first + 1, step.last))
                self._alive(f"{label} {self._span(step)}", gradient_bytes + transient)

    def _anew(self, ids: tuple[int, ...], extras: tuple[int, ...], root: int) -> tuple[int, ...]:
        """`ids` as a stage with those `extras` sees them where all stages from `root` on are run again."""
        if not self.made:
            return ids
        after = len(self.chain.storages)
        return tuple(i + after if i not in extras and self.made.get(i, -1) >= root else i for i in ids)

    def _backward(self, node: int) -> None:
        step = self.steps[node]
        stage = self.chain.stages[step.first]
        option = stage.option(step.variant or KEEP)
        if step.depth == 0 and (option.spilled or option.remade):
            self.traffic.reach(node, after=step.first - 1 if option.remade else step.first)
            self.step_s -= option.moved_s
        self.step_s += option.backward_s
        spilled = self.spilled.pop(step.first, None)
        if spilled is not None:
            self.hold(spilled.away)
            self.record(f"bring back {stage.name}")
        remade = self._anew(option.remade, stage.extras, step.first)
        if remade:
            self.hold(remade)
            self.recompute_s += option.again_s
            self._alive(f"recompute in {stage.name}", stage.output_bytes + self._transient_bytes(step.first))
            self.record(f"recompute in {stage.name} ({option.name})")
        gradients_bytes = stage.output_bytes + (self.chain.stages[step.first - 1].output_bytes if step.first else 0)
        self._run_back(stage, gradients_bytes)
        if option.remade_later:
            self.release(remade)
            remade = self._anew(option.remade_later, stage.extras, step.first)
            self.hold(remade)
            self._alive(f"recompute in {stage.name}", stage.output_bytes + self._transient_bytes(step.first))
            self.record(f"recompute in {stage.name} ({option.name}, second half)")
            self._run_back(stage, gradients_bytes)
        self.release(self.kept.pop(node))
        self.traffic.forget(node)
        self.release(remade)
        if spilled is not None:
            self.release(spilled.away)
            self.release(spilled.here)
            self.host.release(spilled.away)
        self.record(f"backward {stage.name}")

    def _run_back(self, stage: Stage, gradients_bytes: int) -> None:
        """A stage's backward, or half of it."""
        self._alive(f"backward {stage.name}", gradients_bytes + stage.workspace_bytes + stage.again_bytes)
        if stage.again_bytes:
            self.record(f"recompute inside {stage.name}", stage.again_bytes)

    def _spill(self, stage: int, saves: tuple[int, ...], spilled: tuple[int, ...]) -> tuple[int, ...]:
        """Send to the host what is `spilled` and nothing else holds; the ids of that. What is held already is held on."""
        ids = set(spilled).difference(saves)
        here = tuple(i for i in ids if self.holders[i])
        away = tuple(i for i in ids if not self.holders[i])
        self.spilled[stage] = _SpilledIds(here, away)
        self.hold(here)
        self.host.hold(away)
        return away

    def _spend(self, first: int, last: int, seconds: float, frame: Step | None) -> None:
        self.step_s += seconds
        self.recompute_s += 0.0 if frame is None else seconds
        self.count_changes[first] += 1
        self.count_changes[last + 1] -= 1

    def hold(self, ids: tuple[int, ...]) -> None:
        for i in set(ids):
            if self.holders[i] == 0:
                self.held_bytes += self.footprints[i]
            self.holders[i] += 1

    def release(self, ids: tuple[int, ...]) -> None:
        for i in set(ids):
            self.holders[i] -= 1
            if self.holders[i] == 0:
                self.held_bytes -= self.footprints[i]

    def _transient_bytes(self, stage: int) -> int:
        """Input and output of a running stage, as far as they are not held, and its workspace."""
        return self.chain.running_bytes(stage, self.held) + self.chain.stages[stage].workspace_bytes

    def _alive(self, label: str, beyond_bytes: int) -> None:
        if self.held_bytes + beyond_bytes > self.total_peak_bytes:
            self.total_peak_bytes = self.held_bytes + beyond_bytes
            self.total_peak_step = label

    def record(self, label: str, beyond_bytes: int = 0) -> None:
        held_bytes = self.held_bytes + beyond_bytes
        self.trace.append((label, held_bytes))
        if held_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_step = held_bytes, label

    def _span(self, step: Step) -> str:
        first, last = self.chain.stages[step.first].name, self.chain.stages[step.last].name
        return first if step.first == step.last else f"{first}..{last}"


@dataclass(frozen=True, slots=True)
class _SpilledIds:
    """Of what a stage spills: the ids that were held here already, and those that went to the host."""

    here: tuple[int, ...]
    away: tuple[int, ...]


class _Held:
    """`id in _Held(holders)`: whether anyone holds that storage."""

    def __init__(self, holders: list[int]) -> None:
        self.holders = holders

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and self.holders[i] > 0
