"""Kinds of stages: what has the same code and the same shapes is measured together.

Of each kind the first stage runs a second time, for its workspace, and to see that it does the same twice; all of a kind
share one median time, so that a planner sees N equal blocks as equal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Stage, Variant
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.kept.options import part_of
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.profiling.allocation_trace import LiveBytes
from gpuckpt.pytorch.profiling.call_hooks import run_module
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.clock import Clock
from gpuckpt.pytorch.profiling.inner_checkpoints import InnerCheckpoints
from gpuckpt.pytorch.profiling.isolation import fresh
from gpuckpt.pytorch.profiling.op_trace import OpTrace
from gpuckpt.pytorch.profiling.sample import Sample, option_seconds, recompute_s
from gpuckpt.pytorch.profiling.save_recorder import SaveRecorder
from gpuckpt.pytorch.profiling.sharding import gathered_around

__all__ = ["MOST_SAMPLES", "Measured", "StageKind", "join", "kind_key", "run_again"]

MOST_SAMPLES = 3  # times `repeats`: so often at most is one kind of stage timed


@dataclass(frozen=True)
class Measured:
    """A chain, the modules whose calls make up its stages (in calling order), the number of each call's stage, the names of calls
    that draw random numbers, ids of storages that cannot go to the host, the process groups of the collectives that the
    forward calls, modules like those that did not run (see `chain_finder.idle_siblings`), classes whose calls read no tensor
    inside of the objects that they are given (see engine/unread.py), ids of storages that are the model's own arguments, and
    which of the parameters that are trained (by their number) code outside of blocks uses, by the name of its stage."""

    chain: Chain
    modules: tuple[nn.Module, ...]
    owned: tuple[int, ...]
    random: tuple[str, ...]
    staying: frozenset[int] = frozenset()
    groups: tuple[Any, ...] = ()
    idle: tuple[nn.Module, ...] = ()
    unread: frozenset[type] = frozenset()
    given: frozenset[int] = frozenset()
    trained: Mapping[str, frozenset[int]] = field(default_factory=dict)


@dataclass
class StageKind:
    """Stages of the same code and shapes: what is known of one holds for all."""

    saved: int  # how many tensors autograd saves in it
    workspace_bytes: int = 0
    gradients_bytes: int = 0
    again_bytes: int = 0
    samples: list[Sample] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # which of the chain's calls
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    # By option: seconds beyond a plain forward, and of the recompute.
    option_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    stopped_s: list[float] = field(default_factory=list)  # of the forward up to the last saved tensor

    def measure(self, model: nn.Module, clock: Clock, repeats: int, inner: InnerCheckpoints, *, options: bool) -> None:
        """Run the samples, calls in `model`, again: the first for its workspace, all for their time. Not `options` where ranks
        meet inside of the work: one that drops an option alone would leave the others waiting."""
        first = self.samples[0]
        with gathered_around(model, first.module, tensors_in(first.inputs)):
            if clock.exact:
                self.count(first, clock, inner.budget.unit_bytes, options=options)
            else:
                self.workspace_bytes, self.gradients_bytes = run_again(first, inner.budget.unit_bytes)
            if first.checkpoints:
                self.again_bytes = _again_bytes(first, inner)
        if clock.exact:
            self.samples.clear()
            return
        while self.samples:
            sample = self.samples.pop(0)
            with gathered_around(model, sample.module, tensors_in(sample.inputs)) as gather:
                self.time(sample, gather, clock, repeats)
        with gathered_around(model, first.module, tensors_in(first.inputs)) as gather:
            if options and first.options:
                self.option_s = option_seconds(first, gather, clock, repeats)

    def count(self, sample: Sample, clock: Clock, unit_bytes: int, *, options: bool) -> None:
        """By a clock on which all runs take the same: seconds of a stage, and of all its options, as its one run shows them."""
        trace = OpTrace(Record(), clock)
        times: list[float] = []
        self.workspace_bytes, self.gradients_bytes = run_again(
            sample, unit_bytes, trace, lambda: times.append(clock.now())
        )
        forward_began_s, forward_ended_s, backward_began_s, backward_ended_s = times
        self.forward_s.append(forward_ended_s - forward_began_s)
        self.backward_s.append(backward_ended_s - backward_began_s)
        with sample.as_it_was():
            self.stopped_s.append(recompute_s(sample.module, sample.inputs, range(self.saved), clock))
        trace.flow.close()
        if options and [ran.op for ran in trace.flow.ran] == [ran.op for ran in sample.record.flow.ran]:
            for option in sample.options:
                self.option_s[option] = 0.0, trace.recompute_s(part_of(option), sample.alive)

    def measured(self, stage: Stage, *, last: bool) -> Stage:
        """`stage` with a call of this kind more, its `last`, and what is known of that."""
        stage = replace(
            stage,
            forward_s=stage.forward_s + statistics.median(self.forward_s),
            backward_s=stage.backward_s + statistics.median(self.backward_s),
            workspace_bytes=max(stage.workspace_bytes, self.workspace_bytes),
            gradients_bytes=max(stage.gradients_bytes, self.gradients_bytes),
            again_bytes=max(stage.again_bytes, self.again_bytes),
            tail_s=self.tail_s if last else stage.tail_s,
        )
        return replace(stage, variants=self.options_of(stage))

    def options_of(self, stage: Stage) -> tuple[Variant, ...]:
        """The options of a stage of this kind, with their seconds."""
        found = []
        for option in stage.variants:
            if option.name in self.option_s and stage.recomputable:
                more_s, again_s = self.option_s[option.name]
                found.append(
                    replace(
                        option,
                        forward_s=stage.forward_s + max(0.0, more_s),
                        backward_s=stage.backward_s + again_s,
                        again_s=again_s,
                    )
                )
        return tuple(found)

    @property
    def tail_s(self) -> float:
        """Seconds of the forward that a recompute is spared; none where the two medians differ by noise the other way."""
        return max(0.0, statistics.median(self.forward_s) - statistics.median(self.stopped_s))

    def time(self, sample: Sample, gather: Callable[[], None], clock: Clock, repeats: int) -> None:
        """Time one stage of this kind: `repeats` times for the first, once for each of the others up to a limit."""
        wanted = min(repeats if not self.forward_s else 1, MOST_SAMPLES * repeats - len(self.forward_s))
        for _ in range(wanted):
            args, kwargs = fresh(sample.inputs)
            gather()
            with sample.as_it_was():
                began_s = clock.now()
                out = run_module(sample.module, args, kwargs)
                self.forward_s.append(clock.now() - began_s)
            roots, leaves = _ends(sample.module, (args, kwargs), out)
            grads = [torch.ones_like(root) for root in roots]
            began_s = clock.now()
            if roots and leaves:
                torch.autograd.grad(roots, leaves, grads, allow_unused=True)
            self.backward_s.append(clock.now() - began_s)
            gather()
            with sample.as_it_was():
                self.stopped_s.append(recompute_s(sample.module, sample.inputs, range(self.saved), clock))


def run_again(
    sample: Sample, unit_bytes: int, trace: OpTrace | None = None, note: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Run a stage a second time; it must save the same again. Returns the bytes of its workspace, and those that gradients of its
    parameters add to it at the worst moment. `trace`: notes its operations; `note`: called when forward and backward begin and
    end."""
    module, shapes = sample.module, sample.shapes
    args, kwargs = fresh(sample.inputs)
    saved, live = SaveRecorder(flow=None if trace is None else trace.flow), LiveBytes(unit_bytes)
    if trace is not None:
        inside = Objects(pytree.tree_leaves((args, kwargs))).tensors
        trace.flow.begin([*tensors_in((args, kwargs)), *inside, *sample.fence.kept])
        trace.flow.begin([*module.parameters(), *module.buffers()])
    torch.clear_autocast_cache()
    with sample.as_it_was(), live, saved.hooks(), nullcontext() if trace is None else trace.recorded():
        note()
        out = run_module(module, args, kwargs)
        note()
    if saved.shapes != shapes:
        raise InvalidChain(
            f"stage {sample.name!r} ({type(module).__name__}) saved {len(shapes)} tensors when it ran and {len(saved.shapes)}, "
            "or of other shapes, when it ran again on the same inputs, so that it cannot be recomputed. It keeps state between "
            "calls: a cache (Hugging Face: use_cache=False), a counter, a data-dependent branch"
        )
    roots, leaves = _ends(module, (args, kwargs), out)
    with live:
        grads = [torch.ones_like(root) for root in roots]
    forward_end = live.mark()
    kept = live.numbers([*(tensor for tensor, _ in saved.tensors), *tensors_in(out)])
    saved.tensors.clear()
    del out
    note()
    with live:
        found = torch.autograd.grad(roots, leaves, grads, allow_unused=True) if roots and leaves else ()
    note()
    own = {id(parameter) for parameter in module.parameters()}
    passing = [grad for grad, leaf in zip(found, leaves, strict=False) if grad is not None and id(leaf) not in own]
    gradients = live.numbers([*(grad for grad in found if grad is not None), *grads])
    forward_bytes = live.peak_bytes(0, forward_end, kept | gradients)
    workspace_bytes = max(forward_bytes, live.peak_bytes(forward_end, live.mark(), gradients))
    with_own_bytes = live.peak_bytes(forward_end, live.mark(), live.numbers([*passing, *grads]))
    return workspace_bytes, max(0, with_own_bytes - workspace_bytes)


def _again_bytes(sample: Sample, inner: InnerCheckpoints) -> int:
    """What checkpoints inside of a stage hold in its backward."""
    args, kwargs = fresh(sample.inputs)
    inner.watch()
    inner.share(tensors_in((args, kwargs)))
    with sample.as_it_was(), inner.entered():
        out = run_module(sample.module, args, kwargs)
    roots, leaves = _ends(sample.module, (args, kwargs), out)
    grads = [torch.ones_like(root) for root in roots]
    del out
    if not roots or not leaves:
        return 0
    return inner.again_bytes(lambda: torch.autograd.grad(roots, leaves, grads, allow_unused=True))


def _ends(module: nn.Module, inputs: Any, out: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where a stage's backward begins and what it leads to."""
    roots = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
    given = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return roots, list({id(tensor): tensor for tensor in [*given, *trained]}.values())


def join(stages: list[Stage], owned: list[int], changed: set[int]) -> list[int]:
    """Make the latest call, which changed those storages in place, one stage with the calls that made them. Returns the number of
    each call's stage, `owned` so far."""
    while owned[-1] - 1 in owned:
        last, first = stages.pop(), stages.pop()
        remade = changed.isdisjoint((*first.inputs, *first.extras))
        # Where the first returns its own input (a flatten, a dropout that is off), that was changed as well.
        stages.append(_joined(first, last, recomputable=first.recomputable and remade))
        owned = [min(owner, len(stages) - 1) for owner in owned]
        if remade:
            break
    return owned


def _joined(first: Stage, last: Stage, *, recomputable: bool) -> Stage:
    """Two calls in a row as one stage."""
    return replace(
        last,
        name=f"{first.name}+{last.name}",
        saves=tuple(dict.fromkeys((*first.saves, *last.saves))),
        inputs=first.inputs,
        variants=(),
        extras=tuple(dict.fromkeys((*first.extras, *last.extras))),
        recomputable=recomputable,
    )


def kind_key(module: nn.Module, inputs: Any, saved_bytes: list[int]) -> Any:
    leaves, spec = pytree.tree_flatten(inputs)
    given = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else type(leaf)
        for leaf in leaves
    )
    parameters = tuple((p.shape, p.dtype, p.requires_grad) for p in module.parameters())
    modes = tuple(part.training for part in module.modules())
    return str(module), parameters, modes, given, str(spec), tuple(saved_bytes)
