"""Runs a model once and takes it apart: every stage is cut loose from the graph as it comes, noted, timed and dropped.

What lies before the first stage, after the last, or between two becomes a stage that can only be kept. A call that changes in
place what the one before returned (ReLU(inplace=True)) is one stage with it: run again from the input of the first, both do the
same. `measure` runs this on real tensors, or on fake ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Stage
from gpuckpt.pytorch._torch_internals import intercept_checkpoints, sharded_parameters, untraced, version_number
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.fence.fence import Fence
from gpuckpt.pytorch.engine.hooks import enter
from gpuckpt.pytorch.engine.kept.current import in_checkpoint, recording
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.residency import is_resident, mark_computed
from gpuckpt.pytorch.engine.unread import Unread, is_entry
from gpuckpt.pytorch.profiling.allocation_trace import Gradients, LiveBytes, gradients_of, least_workspace
from gpuckpt.pytorch.profiling.call_hooks import intercept, run_module, runs_compiled
from gpuckpt.pytorch.profiling.chain_finder import Found, Outputs, find_chain, idle_siblings, tensors_in
from gpuckpt.pytorch.profiling.clock import Clock
from gpuckpt.pytorch.profiling.inner_checkpoints import InnerCheckpoints, refuse_checkpoints
from gpuckpt.pytorch.profiling.isolation import DroppedResults, ParameterWrites, cut, cut_call, fresh, watch_draws
from gpuckpt.pytorch.profiling.op_trace import OpTrace
from gpuckpt.pytorch.profiling.sample import Sample
from gpuckpt.pytorch.profiling.save_recorder import SaveRecorder, Storages, residents_of, unpack
from gpuckpt.pytorch.profiling.sharding import sharding_unchanged
from gpuckpt.pytorch.profiling.stage_timing import MOST_SAMPLES, Measured, StageKind, join, kind_key

__all__ = ["Measured", "run_chain"]


class _Measurement:
    """What is known so far of the chain, while the model runs."""

    def __init__(
        self,
        model: nn.Module,
        given: set[int],
        found: Found,
        storages: Storages,
        clock: Clock,
        repeats: int,
        unit_bytes: int,
    ) -> None:
        self.model, self.parameters = model, list(model.parameters())
        self.given = given  # ids of the model's own arguments
        self.expected = found.modules
        self.whole = found.differentiates  # stages stay connected: the model's forward goes backward through them
        self.recorded: list[SaveRecorder] = []  # of each call; loads so far do not count
        self.names = {module: name for name, module in model.named_modules()}
        self.inner = InnerCheckpoints(unit_bytes)
        self.outside_again = False  # whether code outside of stages made checkpoints
        self.storages = storages
        self.clock, self.repeats = clock, repeats
        self.trained: dict[str, frozenset[int]] = {}
        self.stages: list[Stage] = []
        self.position = 0
        self.previous = Outputs()
        self.results = DroppedResults()
        self.owned: list[int] = []
        self.random: list[str] = []
        self.kinds: dict[Any, StageKind] = {}
        self.unread = Unread()
        self.outside = SaveRecorder(storages.stamp)  # since the last stage ended
        self.held: set[int] = set()  # storages that a stage so far, or a frame around it, may hold
        self.inside = False
        self.live = LiveBytes(unit_bytes)
        self.begin_outside()

    def begin_outside(self) -> None:
        """What comes now is outside of all stages."""
        self.outside_began_s, self.outside_began = self.clock.now(), self.live.position()

    @untraced
    def called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.live.paused():
            return self.stage(module, *args, **kwargs)

    def stage(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if in_checkpoint() or self.position >= len(self.expected) or self.expected[self.position] is not module:
            return run_module(module, args, kwargs)  # a call that is no part of the chain
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.close_outside(
            "prefix" if self.position == 0 else f"between {self.stages[-1].name} and {self.names[module]}", tensors
        )
        mark_computed(tensors, self.given)
        linked = set(self.previous.unchanged())
        # A frame holds what is resident for nothing.
        fence = Fence(module, leaves, preserve_rng_state=True)
        inside, direct = Objects(leaves).tensors, [*tensors, *fence.kept]
        held = [tensor for tensor in (*direct, *inside) if not is_resident(tensor)]
        inputs = self.storages.of([tensor for tensor in held if id(tensor) in linked])
        extras = self.storages.of([tensor for tensor in held if id(tensor) not in linked])
        # What compiled code reads is not seen.
        entries = [tensor for tensor in inside if is_entry(tensor) and not runs_compiled(module)]
        of_entries = set(self.storages.of(entries)).difference(
            self.storages.of([*direct, *(tensor for tensor in inside if not is_entry(tensor))])
        )
        number, name = len(self.stages), self.names[module]
        self.previous = Outputs()  # as under a plan: what nobody goes on with goes here
        past = self.results.begin([*direct, *inside])
        again = fresh((args, kwargs))  # before the stage may change them
        # A recompute casts weights again, whatever autocast has cached for other stages.
        torch.clear_autocast_cache()

        self.inside = True
        trace = OpTrace(record := Record())
        saved = SaveRecorder(self.storages.stamp, trace.flow)
        cut_args, cut_kwargs, hand_on = (args, kwargs, None) if self.whole else cut_call(args, kwargs, past)
        given = tensors_in((cut_args, cut_kwargs))
        before, has_drawn = list(map(version_number, given)), watch_draws()
        self.inner.watch()
        trace.flow.begin([*given, *Objects(given).tensors, *inside, *module.parameters(), *module.buffers()])
        reads = self.unread.watching(module, self.position, entries, of_entries)
        with saved.hooks(), recording(record), fence.watching(), reads, trace:
            out = run_module(module, cut_args, cut_kwargs)
        fence.learn(for_good=True)
        if fence.rewritten is not None:
            raise InvalidChain(
                f"stage {name!r} ({type(module).__name__}) changes its parameter {fence.rewritten!r} in place when it runs, so "
                "that it cannot run again: max_norm of nn.Embedding does that (do it after the optimizer's step instead), and "
                "values that the first batch decides (call the model once on a batch, then fit it)"
            )
        if hand_on is not None:
            hand_on()
        trace.flow.close(fence.kept)
        differentiates, saved.loads = bool(saved.loads), 0  # its own derivatives are its own affair
        self.recorded.append(saved)
        self.results.end(past, saved.alive, [*fence.copies, *record.tensors()])
        changed = [
            tensor
            for tensor, now, version in zip(tensors, given, before, strict=True)
            if version_number(now) != version
        ]
        extras += self.storages.of(fence.copies)
        extras += self.storages.of([tensor for tensor in record.tensors() if not is_resident(tensor)])
        if has_drawn():
            self.random.append(name)
        self.held.update(inputs, extras)
        saves = saved.storages(self.storages, self.held)
        self.held.update(saves)
        out = out if self.whole else cut(out, past)
        self.owned.append(number)
        outputs = tensors_in(out)
        self.stages.append(
            Stage(
                name=name,
                saves=saves,
                inputs=inputs,
                extras=extras,
                output=self.storages.of(outputs),
                output_bytes=sum(tensor.numel() * tensor.element_size() for tensor in outputs),
                recomputable=not changed,  # an input that is changed in place cannot be read again as it was
            )
        )
        sharded = any(map(sharded_parameters, module.modules()))  # gathered at other times in a recompute
        if not (changed or saved.dropped or self.whole or self.inner.any() or differentiates or sharded):
            variants = trace.options(self.stages[-1], saved.slots, self.storages)
            self.stages[-1] = replace(self.stages[-1], variants=variants)
        if changed and linked.issuperset(map(id, changed)):
            self.owned = join(self.stages, self.owned, set(self.storages.of(changed)))
        key = kind_key(module, again, [self.storages.sizes[i] for i in saves])
        kind = self.kinds.setdefault(key, StageKind(len(saved.shapes)))
        kind.calls.append(self.position)
        if len(kind.samples) <= MOST_SAMPLES * self.repeats:
            if kind.samples and not record.choices:
                again = kind.samples[0].inputs  # one copy for all of a kind
            options, alive = [option.name for option in self.stages[-1].variants], frozenset(n for n, _ in saved.slots)
            seen = fence, record, saved.shapes
            kind.samples.append(Sample(module, again, *seen, name, self.inner.any(), tuple(options), alive))
        self.position += 1
        self.previous = Outputs(outputs)
        self.inner.share((*tensors, *outputs))
        self.inside = False
        self.inner.watch()
        self.begin_outside()
        return out

    def keep_what_was_loaded(self) -> None:
        """The forward has gone backward through these stages: a plan knows of one backward, in which they would run again."""
        for number, saved in zip(self.owned, self.recorded, strict=True):
            if saved.loads:
                self.stages[number] = replace(self.stages[number], recomputable=False)

    def close_outside(self, name: str, ends: Sequence[torch.Tensor] = ()) -> None:
        """Turn what was saved outside of stages since the last one, on the way to `ends`, into a stage that is always kept."""
        seconds, again_bytes = self.clock.now() - self.outside_began_s, 0
        forward_bytes = self.live.made_since(self.outside_began, [tensor for tensor, _ in self.outside.tensors])
        workspace_bytes = gradients_bytes = 0
        if not self.whole and (roots := [tensor for tensor in ends if tensor.grad_fn is not None]):
            if self.inner.any():
                self.outside_again = True
                again_bytes = self.inner.again_bytes(lambda: self.backward(roots, retain_graph=True))
            workspace_bytes, gradients_bytes = self.backward_bytes(name, roots, retain_graph=True)
        saves, self.outside = self.outside.storages(self.storages, self.held), SaveRecorder(self.storages.stamp)
        self.held.update(saves)
        if saves or again_bytes or name in ("prefix", "suffix"):
            stage = Stage(name, seconds, 2 * seconds, saves, recomputable=False, again_bytes=again_bytes)
            workspace_bytes, gradients_bytes = least_workspace(forward_bytes, workspace_bytes, gradients_bytes)
            self.stages.append(replace(stage, workspace_bytes=workspace_bytes, gradients_bytes=gradients_bytes))

    def backward(self, roots: Sequence[torch.Tensor], *, retain_graph: bool) -> Gradients:
        """Go backward from `roots` to the end of the stage before, or to the model's parameters."""
        loads = [saved.loads for saved in self.recorded]
        with sharding_unchanged(self.model):  # forward may be under way: what it has gathered stays
            found = gradients_of(roots, self.previous.tensors, self.parameters, retain_graph=retain_graph)
        for saved, count in zip(self.recorded, loads, strict=True):
            saved.loads = count  # what a hook has kept of a stage leads into it: the model's forward does not
        return found

    def backward_bytes(self, name: str, roots: Sequence[torch.Tensor], *, retain_graph: bool) -> tuple[int, int]:
        """Go backward through the stage `name`: bytes that operators make on the way, and what gradients of parameters add."""
        live = LiveBytes(self.inner.budget.unit_bytes)
        with live:
            found = self.backward(roots, retain_graph=retain_graph)
        self.trained[name] = frozenset([number for number, gradient in enumerate(found[1]) if gradient is not None])
        return live.beside_gradients(*found)

    def close(self, out: Any) -> None:
        """What lies after the last stage, with its backward: usually a head and a loss, and with them much workspace."""
        counts = self.inner.any() or not self.outside_again
        self.close_outside("suffix")
        self.inside = True
        outputs = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
        # A model that returns its loss often returns logits and states as well, which have no backward.
        roots = [tensor for tensor in outputs if tensor.numel() == 1] or outputs
        began_s = self.clock.now()
        self.backward(roots, retain_graph=True)
        backward_s = self.clock.now() - began_s
        workspace_bytes = gradients_bytes = 0

        def backward() -> None:
            nonlocal workspace_bytes, gradients_bytes
            workspace_bytes, gradients_bytes = self.backward_bytes("suffix", roots, retain_graph=False)

        again_bytes = self.inner.again_bytes(backward)
        forward_bytes = self.stages[-1].workspace_bytes
        workspace_bytes, gradients_bytes = least_workspace(forward_bytes, workspace_bytes, gradients_bytes)
        self.stages[-1] = replace(
            self.stages[-1],
            backward_s=backward_s,
            workspace_bytes=workspace_bytes,
            gradients_bytes=gradients_bytes,
            again_bytes=again_bytes if counts else 0,  # what lies before may be reached by a skip
        )
        self.previous = Outputs()
        self.results.close()

    @untraced
    def note_outside(self, tensor: torch.Tensor) -> Any:
        if self.inside:
            return SaveRecorder().pack(tensor)
        token = self.outside.pack(tensor)
        token.held = self.inner.hold(tensor)
        return token

    def finished(self) -> tuple[Stage, ...]:
        """The stages, with what is known of their kinds."""
        stages = self.unread.dropped(self.stages, self.owned)
        last_calls = {number: call for call, number in enumerate(self.owned)}
        for kind in self.kinds.values():
            for call in kind.calls:
                number = self.owned[call]
                stages[number] = kind.measured(stages[number], last=last_calls[number] == call)
        if not self.whole:
            self.results.mark(stages, self.owned)
        made = Chain(tuple(stages), tuple(self.storages.sizes)).made_extras
        return tuple(
            [stage if made.keys().isdisjoint(stage.saves) else replace(stage, variants=()) for stage in stages]
        )


def run_chain(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    unit_bytes: int,
    clock: Clock,
    repeats: int,
    copies: bool = False,
    stages: Sequence[str] = (),
    residents: Sequence[torch.Tensor] | None = None,
) -> Measured:
    """The measuring itself; it leaves buffers and random number generators as the model left them. `residents`: see
    `residents_of`, which is asked by default."""
    tensors = tensors_in((args, kwargs))
    if residents is None:
        residents = residents_of(model, args, kwargs)
    fence = Fence(model, pytree.tree_leaves((args, kwargs)), preserve_rng_state=True)

    writes = ParameterWrites(model)
    with intercept_checkpoints(partial(refuse_checkpoints, model)), writes.undone():
        try:
            with fence.restored(fence.kept), writes:
                found = find_chain(model, args, kwargs, stages=stages)
        except InvalidChain:
            raise
        except Exception:  # a forward that needs autograd; any other reason is raised again
            with fence.restored(fence.kept), writes:
                found = find_chain(model, args, kwargs, grad=True, stages=stages)
        # What autocast remembers of a run without autograd is none of the chain's.
        torch.clear_autocast_cache()
        given = set(map(id, tensors))
        run = _Measurement(model, given, found, Storages(residents, copies, unit_bytes), clock, repeats, unit_bytes)
        hooks = enter(run.inner.budget, run.note_outside, unpack)  # entered, for checkpoints that are made there
        with torch.enable_grad(), intercept(dict.fromkeys(found.modules), run.called), hooks, writes:
            with run.live:
                out = run_module(model, args, kwargs)
            run.keep_what_was_loaded()
            run.close(out)
        del out
        # Not in the middle of the model's forward, whose hooks would see every stage several times.
        with torch.enable_grad():
            for kind in run.kinds.values():
                kind.measure(model, clock, repeats, run.inner, options=not found.groups)
    if run.position != len(found.modules):
        raise InvalidChain(
            f"{type(model).__name__} called {run.position} of {len(found.modules)} stages with autograd on; a chain runs the "
            "same stages whether or not gradients are wanted"
        )
    chain = Chain(run.finished(), tuple(run.storages.sizes), unit_bytes, type(model).__name__)
    staying = frozenset(run.storages.staying)
    idle = () if stages else idle_siblings(model, found)
    return Measured(
        chain,
        tuple(found.modules),
        tuple(run.owned),
        tuple(run.random),
        staying,
        found.groups,
        idle,
        run.unread.classes,
        run.storages.known(tensors),
        run.trained,
    )
