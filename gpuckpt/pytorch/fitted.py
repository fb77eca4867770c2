"""`Fitted`: a model that runs under a plan.

The model stays the same object: its class, parameter names, `state_dict`, hooks and optimizers are untouched, and calling it
runs under the plan. Inputs of a new shape are measured and planned when they first appear. Calls without gradients run
plainly.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.errors import BudgetExceeded, CheckpointError, InvalidChain
from gpuckpt.memory import Budget
from gpuckpt.planning import Chain, Plan, plan_chain, with_spill
from gpuckpt.planning.report import PlanReport, explain
from gpuckpt.pytorch._torch_internals import keep_graph, queue_callback, untraced
from gpuckpt.pytorch.engine.frame import Verify
from gpuckpt.pytorch.engine.hooks import enter
from gpuckpt.pytorch.engine.offload import SPILL
from gpuckpt.pytorch.engine.residency import mark_resident
from gpuckpt.pytorch.peak_check import Promise
from gpuckpt.pytorch.plan_runner import Walk
from gpuckpt.pytorch.profiling.call_hooks import Bypass, Interception, run_module, set_call
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.clock import WallClock
from gpuckpt.pytorch.profiling.link_speed import Link, measure_link
from gpuckpt.pytorch.profiling.measure import run_measured
from gpuckpt.pytorch.profiling.runner import Measured

__all__ = ["Fitted", "Planned"]


@dataclass(frozen=True)
class Planned:
    """A plan for inputs of one shape, and the measured model that it was made for."""

    measured: Measured
    plan: Plan

    @property
    def chain(self) -> Chain:
        return self.measured.chain


class _Step:
    """One forward of a fitted model: the walk along the plan, and how many calls of stages have come."""

    __slots__ = ("calls", "planned", "walk")

    def __init__(self, planned: Planned, walk: Walk) -> None:
        self.planned = planned
        self.walk = walk
        self.calls = 0


class Fitted:
    """A model that runs under a plan. Made by `fit`; calling it is calling the model.

    Attributes: `model`, `budget`, `host_budget` (None: nothing is spilled); of the latest call's input shape `plan` and `chain`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        strategy: str,
        preserve_rng_state: bool,
        verify: Verify | None,
        repeats: int,
        host_budget: Budget | None = None,
    ) -> None:
        self.model = model
        self.budget = budget
        self.host_budget = host_budget
        hint = "the model did not save what it saved when it was measured; does it depend on its data, or does someone else use "
        self._held = Promise(f"{hint}this budget?")
        self._spilled = Promise(f"{hint}the host budget?")
        self._link: Link | None = None
        self._strategy = strategy
        self._preserve_rng_state = preserve_rng_state
        self._verify = verify
        self._repeats = repeats
        self._planned: dict[Any, Planned] = {}
        self._latest: Planned | None = None
        self._began = False  # whether there has been a step
        self._retained = False  # a graph was kept for a second backward, and its bytes with it
        self._local = threading.local()
        self._intercepted: dict[nn.Module, Interception] = {}
        self._bypass: Any = None  # the handle of the hook that notices calls that were not intercepted
        self._parts = list(model.modules())
        self._parameters = list(model.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def latest(self) -> Planned:
        """What the latest call ran under."""
        if self._latest is None:
            raise CheckpointError("nothing is planned yet: call plan_for(*inputs), or the model")
        return self._latest

    @property
    def measured_peak_bytes(self) -> int:
        """The most bytes that the budget has held for the latest step."""
        return self._held.measured_bytes

    @property
    def promised_peak_bytes(self) -> int:
        """What the plan said of it."""
        return self._held.promised_bytes

    @property
    def measured_host_peak_bytes(self) -> int:
        """The most bytes that the host budget has held for the latest step; 0 without one."""
        return self._spilled.measured_bytes

    @property
    def promised_host_peak_bytes(self) -> int:
        """What the plan said of it."""
        return self._spilled.promised_bytes

    @property
    def plan(self) -> Plan:
        return self.latest.plan

    @property
    def chain(self) -> Chain:
        return self.latest.chain

    def plan_for(self, *args: Any, **kwargs: Any) -> Planned:
        """The plan for these inputs; measured and planned where their shapes are new.

        Raises `BudgetExceeded`, with the smallest budget that would do, where no plan fits.
        """
        if not all(interception.active for interception in self._intercepted.values()):
            self._unwrap()  # a block was compiled since: what was measured is not what runs
            self._planned.clear()
        key = self._signature(args, kwargs)
        planned = self._planned.get(key)
        if planned is None:
            before = self._unwrap()  # measured as it runs without us
            try:
                planned = self._make_plan(args, kwargs)
                before += [self.model, *planned.measured.modules]
            finally:
                self._wrap(before)
            self._planned[key] = planned
        self._latest = planned
        return planned

    def report(self) -> PlanReport:
        """What the latest plan does with each stage, and why; promised against measured. Print it, or take `to_json()`."""
        if not self._began:
            return explain(self.chain, self.plan)
        return explain(self.chain, self.plan, self.measured_peak_bytes, self.measured_host_peak_bytes)

    def _make_plan(self, args: tuple, kwargs: dict[str, Any]) -> Planned:
        unit_bytes = self.budget.unit_bytes
        mark_resident([*self._parameters, *self.model.buffers()])
        copies = self.budget.hold == "pool"
        measured = run_measured(self.model, args, kwargs, unit_bytes, WallClock(), self._repeats, copies)
        if measured.random and not self._preserve_rng_state:
            raise InvalidChain(
                f"stage {measured.random[0]!r} of {type(self.model).__name__} draws random numbers and would draw others when it "
                "is recomputed; fit with preserve_rng_state=True"
            )
        if self.host_budget is not None:
            if self._link is None:
                device = next((tensor.device for tensor in self._parameters), torch.device(self.budget.device))
                self._link = measure_link(device, self.host_budget, WallClock())
            spilling = with_spill(measured.chain, self._link.bytes_per_s, latency_s=self._link.latency_s, name=SPILL)
            measured = replace(measured, chain=spilling)
        host_bytes = None if self.host_budget is None else self.host_budget.max_bytes
        plan = plan_chain(measured.chain, self.budget.max_bytes, strategy=self._strategy, host_bytes=host_bytes)
        with suppress(BudgetExceeded):  # others hold some of the budget just now: then the step takes piece by piece
            self.budget.prefetch(plan.certificate.layout_bytes, next(iter(self._parameters), None))
        return Planned(measured, plan)

    def _wrap(self, modules: list[nn.Module]) -> None:
        for module in dict.fromkeys(modules):
            self._intercepted[module] = set_call(module, self._model_call if module is self.model else self._stage_call)
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
        return not torch.is_grad_enabled() or getattr(self._local, "step", None) is not None

    def unfit(self) -> nn.Module:
        """Give the model back as it was; it runs plainly again."""
        self._unwrap()
        self._planned.clear()
        return self.model

    @untraced
    def check_promise(self) -> None:
        """Raise `PromiseBroken` if the budget has held more for the latest step than its plan promised.

        Called at the end of every backward and before the next forward. Steps whose forwards overlap (two forwards, then two
        backwards) may hold the sum of what they promised. A backward with `retain_graph=True` holds longer than planned, so
        then nothing is promised but the cap. Only meaningful while nobody else's share of the budget changes.
        """
        if self._began:
            for promise, budget in self._promises():
                promise.check(budget, binding=not self._retained)

    def _promises(self) -> list[tuple[Promise, Budget]]:
        spilled = [] if self.host_budget is None else [(self._spilled, self.host_budget)]
        return [(self._held, self.budget), *spilled]

    def _begin(self, planned: Planned) -> None:
        """A step begins: from here on the budgets' peaks are its own, unless an earlier one is still going on."""
        self.check_promise()
        if not self._began or all(promise.idle(budget) for promise, budget in self._promises()):
            for promise, budget in self._promises():
                promise.begin(budget)
            self._retained = False
        self._began = True
        self._held.promised_bytes += planned.plan.certificate.peak_bytes
        self._spilled.promised_bytes += planned.plan.certificate.host_peak_bytes

    def _watch(self, out: Any) -> None:
        """See to it that the promise is checked when the backward from `out` ends."""

        def backward_begins(_: torch.Tensor) -> None:
            self._retained = self._retained or keep_graph()
            queue_callback(self.check_promise)

        for tensor in tensors_in(out):
            if tensor.grad_fn is not None:
                tensor.register_hook(backward_begins)

    @untraced
    def _model_call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(self._local, "step", None) is not None:
            return run_module(model, args, kwargs)
        planned = self.plan_for(*args, **kwargs)
        self._begin(planned)
        walk = Walk(planned.plan.tree, self.budget, self._verify, self._preserve_rng_state, host=self.host_budget)
        step = _Step(planned, walk)
        self._local.step = step
        try:
            self.budget.ledger.check_open()
            with enter(self.budget):
                self.budget.step("forward")
                out = run_module(model, args, kwargs)
            if step.calls != len(planned.measured.modules):
                raise InvalidChain(
                    f"{type(model).__name__} ran {step.calls} stages and {len(planned.measured.modules)} when it was measured "
                    "with inputs of the same shapes; a fitted model runs the same stages every time"
                )
        finally:
            self._local.step = None
        self.budget.step("backward")
        self._watch(out)
        return out

    @untraced
    def _stage_call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step: _Step | None = getattr(self._local, "step", None)
        if step is None or not torch.is_grad_enabled():
            return run_module(module, args, kwargs)
        measured = step.planned.measured
        number = step.calls
        if number >= len(measured.modules) or measured.modules[number] is not module:
            return run_module(module, args, kwargs)  # called once more, outside the chain
        step.calls += 1
        stage = measured.owned[number]
        self.budget.step(measured.chain.stages[stage].name)
        return step.walk.step(stage, module, args, kwargs)

    def _signature(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a plan depends on: shapes and kinds of the inputs, the mode of every module, autocast, what is trained."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        described = tuple(map(_describe, leaves))
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
        )
        training = tuple([module.training for module in self._parts])
        trained = tuple([parameter.requires_grad for parameter in self._parameters])
        return spec, described, autocast, training, trained


def _describe(leaf: Any) -> Any:
    """A number with a fraction (a temperature, a rate) decides no shape: another one is no reason to plan again."""
    if isinstance(leaf, torch.Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else None
        return leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if isinstance(leaf, int | str | bool | None) else type(leaf)
