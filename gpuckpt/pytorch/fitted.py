"""`Fitted`: a model that runs under a plan.

The model stays the same object: its class, parameter names, `state_dict`, hooks and optimizers are untouched, and calling it
runs under the plan. Inputs of a new shape are planned when they first appear, and so is a model that was changed.
Calls without gradients, and inside of torch.func's transforms, run plainly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gpuckpt.errors import BudgetExceeded, CheckpointError, InvalidChain
from gpuckpt.memory import Budget
from gpuckpt.planning import Chain, Plan
from gpuckpt.planning.report import PlanReport, explain
from gpuckpt.pytorch._torch_internals import innermost_transform, untraced
from gpuckpt.pytorch.checkpoint import checkpoint
from gpuckpt.pytorch.engine.failed_backward import drop_stale_nodes
from gpuckpt.pytorch.engine.hooks import enter, plain_call
from gpuckpt.pytorch.engine.kept.current import in_checkpoint
from gpuckpt.pytorch.engine.offload import Offload
from gpuckpt.pytorch.engine.residency import mark_computed, mark_given
from gpuckpt.pytorch.peak_check import Deviation, StepPeaks
from gpuckpt.pytorch.plan_maker import PlanMaker
from gpuckpt.pytorch.plan_runner import Walk
from gpuckpt.pytorch.planned import Planned
from gpuckpt.pytorch.profiling.call_hooks import Bypass, Interception, run_module, set_call
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.signature import Fingerprint
from gpuckpt.pytorch.step_progress import StepProgress
from gpuckpt.pytorch.terms import Terms
from gpuckpt.pytorch.trace import PlanTrace

__all__ = ["Fitted"]

_NOTHING_YET = "nothing is planned yet: call the model, or plan_for(*inputs)"


class Fitted:
    """A model that runs under a plan. Made by `fit`; used like the model: calling it is calling the model, and what it does not
    have itself (`parameters()`, `train()`, `to()`, `state_dict()`, ...) is the model's.

    Attributes: `model`; of the latest call's inputs `plan` and `chain`; `deviations`, steps that held more than their plan had
    promised, under a cap that held. Before anything is planned (`fit(model, None, ...)`, and no batch yet) there is no budget
    either, and asking for one of these is a `CheckpointError`.
    """

    def __init__(self, model: nn.Module, terms: Terms) -> None:
        lazy = next(
            (name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)), None
        )
        if lazy is not None:
            raise InvalidChain(
                f"{type(model).__name__}: {lazy!r} gets its shape in the first forward (a lazy module), and there is nothing to "
                "measure before; call the model once on a batch, then fit it"
            )
        self.model = model
        self._terms = terms
        self._made: PlanMaker | None = None  # by the first call that is planned, as are the peaks
        self._latest: Planned | None = None
        self._trace = PlanTrace()
        self._local = threading.local()
        self._intercepted: dict[nn.Module, Interception] = {}
        self._bypass: Any = None  # the handle of the hook that notices calls that were not intercepted
        self._fingerprint = Fingerprint(model)

    def wait(self) -> None:
        """Plan for the first batch that the model is called with."""
        self._wrap([self.model])
        self._fingerprint.refresh()

    @property
    def _maker(self) -> PlanMaker:
        if self._made is None:
            raise CheckpointError(_NOTHING_YET)
        return self._made

    @property
    def _peaks(self) -> StepPeaks:
        return self._maker.peaks

    @property
    def budget(self) -> Budget:
        """What holds the model's saved tensors."""
        return self._maker.budget

    @property
    def host_budget(self) -> Budget | None:
        """What stages spill to; None where nothing is offloaded."""
        return self._maker.host_budget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.model, name)

    @property
    def latest(self) -> Planned:
        """What the latest call ran under."""
        if self._latest is None:
            raise CheckpointError(_NOTHING_YET)
        return self._latest

    @property
    def measured_peak_bytes(self) -> int:
        """The most bytes that the budget has held for the latest step."""
        return self._peaks.held.measured_bytes

    @property
    def promised_peak_bytes(self) -> int:
        """What the plan said of it."""
        return self._peaks.held.promised_bytes

    @property
    def measured_host_peak_bytes(self) -> int:
        """The most bytes that the host budget has held for the latest step; 0 without one."""
        return self._peaks.offloaded.measured_bytes

    @property
    def promised_host_peak_bytes(self) -> int:
        """What the plan said of it."""
        return self._peaks.offloaded.promised_bytes

    @property
    def promised_device_bytes(self) -> int:
        """What the latest step was promised to take of its device; 0 without scope="device"."""
        return 0 if self._peaks.device is None else self._peaks.device.promised_bytes

    @property
    def measured_device_bytes(self) -> int:
        """What it took, where that was counted and no step before it took as much; else what the last such step took, or 0."""
        return 0 if self._peaks.device is None else self._peaks.device.measured_bytes

    @property
    def deviations(self) -> list[Deviation]:
        """Steps that held more than their plan had promised, oldest first; the last 1024 of them."""
        return list(self._peaks.deviations)

    @property
    def plan(self) -> Plan:
        return self.latest.plan

    @property
    def chain(self) -> Chain:
        return self.latest.chain

    def plan_for(self, *args: Any, **kwargs: Any) -> Planned:
        """The plan for these inputs; measured and planned where their shapes are new, the model was changed, or the latest step
        held more than its plan had promised.

        Raises `BudgetExceeded`, with the smallest budget that would do, where no plan fits.
        """
        if not all(interception.active for interception in self._intercepted.values()) or self._fingerprint.changed():
            waiting = self._unwrap()  # a block was compiled, wrapped or added since: what was measured is not what runs
            if self._made is None:
                self._wrap(waiting)
            else:
                self._made.start_anew()
            self._fingerprint = Fingerprint(self.model)
        if self._made is None:
            self._made = PlanMaker(self.model, self._terms)
        if self._peaks.deviated:
            self._peaks.deviated = False
            self._maker.deviated(self.latest)
        kind = self._maker.kind_of(args, kwargs)
        planned = self._maker.known(kind) or self._maker.predicted(kind)
        if planned is None:
            before = self._unwrap()  # measured as it runs without us
            try:
                planned = self._maker.make(kind, args, kwargs)
                before += self._watched(planned)
            finally:
                self._wrap(before)
                self._fingerprint.refresh()  # our own hook is no change
        elif not self._intercepted:  # changed, and under the plan that all ranks share
            self._wrap(self._watched(planned))
            self._fingerprint.refresh()
        planned = self._maker.for_device(planned)
        if planned is not self._latest:
            self._trace.tell(planned.chain, planned.plan)
        self._latest = planned
        return planned

    def report(self) -> PlanReport:
        """What the latest plan does with each stage, and why; promised against measured. Print it, or take `to_json()`."""
        began = self._peaks.began
        peaks = (self.measured_peak_bytes, self.measured_host_peak_bytes) if began else (None, None)
        return replace(explain(self.chain, self.plan, *peaks), predicted=self.latest.predicted)

    def _beside_others(self, planned: Planned) -> Planned:
        """The same for a forward that begins while earlier ones wait for their backward: within what they do not hold. Autograd
        goes backward through the latest forward first, so that by the time an earlier one recomputes, this one is done."""
        room_bytes = self.budget.max_bytes - (held_bytes := self.budget.used_bytes)
        if self._peaks.idle or planned.plan.certificate.peak_bytes <= room_bytes:
            return planned
        try:
            return self._maker.within(planned, room_bytes)
        except BudgetExceeded as error:
            error.hint = (
                f"earlier forwards that wait for their backward hold {held_bytes} of {self.budget.max_bytes} bytes; fit(live=2) "
                f"plans for two at a time. {error.hint}"
            )
            raise

    def _watched(self, planned: Planned) -> list[nn.Module]:
        """The modules whose calls are planned, and those like them that did not run when the model was measured."""
        return [self.model, *planned.measured.modules, *planned.measured.idle]

    def _wrap(self, modules: list[nn.Module]) -> None:
        try:
            for module in dict.fromkeys(modules):
                call = self._model_call if module is self.model else self._stage_call
                self._intercepted[module] = set_call(module, call)
        except BaseException:
            self._unwrap()  # all or none: a block belongs to another model that is fitted
            raise
        if self._intercepted and self._bypass is None:
            self._bypass = self.model.register_forward_pre_hook(Bypass(self._is_intercepted), prepend=True)

    def _unwrap(self) -> list[nn.Module]:
        modules = list(self._intercepted)
        for interception in self._intercepted.values():
            interception.restore()
        self._intercepted.clear()
        if self._bypass is not None:
            self._bypass.remove()
            self._bypass = None
        return modules

    def _is_intercepted(self) -> bool:
        return not torch.is_grad_enabled() or bool(innermost_transform() or getattr(self._local, "step", None))

    @property
    def active(self) -> bool:
        """Whether the model runs under the plan: not after `unfit()`, nor once it was fitted anew."""
        return bool(self._intercepted)

    def suspend(self) -> Callable[[], None]:
        """Let the model run plainly, until what is returned is called."""
        modules = self._unwrap()
        return lambda: self._wrap(modules)

    def unfit(self) -> nn.Module:
        """Give the model back as it was; it runs plainly again."""
        self._unwrap()
        if self._made is not None:
            self._made.plans.clear()
        return self.model

    @untraced
    def check_promise(self) -> None:
        """Note a step that held more than promised, or for which the budget had to make room (`strict`: `PromiseBroken`).

        Called at the end of every backward and before the next forward. Steps whose forwards overlap (two forwards, then two
        backwards) may hold what waits, and what the latest promised. A backward with `retain_graph=True` holds longer, so then
        nothing is promised but the cap. Only meaningful while nobody else's share of the budget changes.
        """
        if self._made is not None:
            self._peaks.check()

    @untraced
    def _model_call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(self._local, "step", None) is not None:
            return run_module(model, args, kwargs)
        if innermost_transform():
            with plain_call(f"a fitted {type(model).__name__}", None if self._made is None else self.budget):
                return run_module(model, args, kwargs)
        if self._made is not None:
            if not self._peaks.idle:
                drop_stale_nodes()  # of a backward that was interrupted: their bytes wait for nothing
            self._peaks.check()
        mark_given(given := tensors_in((args, kwargs)))
        planned = self._beside_others(self.plan_for(*args, **kwargs))
        certificate = planned.plan.certificate
        self._peaks.begin(certificate.peak_bytes, certificate.host_peak_bytes)
        tree, evictable = planned.plan.tree, not self._maker.shared
        verify, rng, unread = self._terms.verify, self._terms.preserve_rng_state, planned.measured.unread
        offload = None
        if self.host_budget is not None and (copies := self._maker.copies) is not None:
            offload = Offload(self.budget, self.host_budget, copies, planned.chain.blocks, tree)
        walk = Walk(tree, self.budget, verify, rng, None, self.host_budget, evictable, offload, unread, planned.flows)
        spare_bytes = self.budget.max_bytes - self._peaks.held.promised_bytes
        step = StepProgress(planned, walk, frozenset(map(id, given)), spare_bytes, self.budget.used_bytes)
        self._local.step = step
        failed = True
        try:
            self.budget.ledger.check_open()
            with enter(self.budget):
                self.budget.step("forward")
                out = run_module(model, args, kwargs)
                failed = False
            if self._terms.strict and step.count != len(planned.measured.modules):
                raise InvalidChain(
                    f"{type(model).__name__} ran {step.count} stages and {len(planned.measured.modules)} when it was measured "
                    "with inputs of the same shapes; fitted with strict=True it has to run the same stages every time"
                )
        except BudgetExceeded as error:
            if self._maker.shared and planned.predicted:
                error.hint += (
                    "; ranks whose collectives meet inside of the model run one plan, made for the inputs that fit was given: "
                    "fit with the largest that will come"
                )
            raise
        finally:
            self._local.step = None
            if step.extra and not self._maker.shared:
                self._maker.called_more(planned, step.extra, failed=failed)
        self._fingerprint.learn()
        if step.count < len(planned.measured.modules) and (fewer := step.fewer_calls()) is not None:
            self._peaks.amend(fewer.peak_bytes, fewer.host_peak_bytes)
        self.budget.step("backward")
        self._peaks.watch(tensors_in(out))
        return out

    @untraced
    def _stage_call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step: StepProgress | None = getattr(self._local, "step", None)
        if step is None or not torch.is_grad_enabled() or step.running or in_checkpoint():
            return run_module(module, args, kwargs)
        measured = step.planned.measured
        number = step.planned_call(module)
        if number is None and (self._maker.shared or not step.extra_call(module)):
            return run_module(module, args, kwargs)
        mark_computed((*args, *kwargs.values()), step.given)
        if number is None:
            return self._recomputed(module, args, kwargs)
        stage = measured.owned[number]
        self.budget.step(measured.chain.stages[stage].name)
        recompute = not self._maker.shared and step.is_behind(number, self.budget.used_bytes)
        step.running = True
        try:
            return step.walk.step(stage, module, args, kwargs, recompute=recompute)
        finally:
            step.running = False

    def _recomputed(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call that was not planned, in a frame of its own."""
        rng, verify = self._terms.preserve_rng_state, self._terms.verify
        return checkpoint(partial(run_module, module), args, kwargs, preserve_rng_state=rng, verify=verify)
