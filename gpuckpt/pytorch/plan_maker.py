"""`PlanMaker`: the plans of one model, a plan for each kind of call.

A kind of call is known again by the sizes of what the model is called with, the mode of every module, autocast and what is
trained. Calls of a new kind are measured and planned when they first appear. Once two or three sizes were measured, what others
save follows from them (see profiling/other_sizes.py), and a step of a new length costs a plan and no measurement.

Ranks whose collectives meet inside of the model (see parallel/agree.py) have one plan for calls of every kind: other sizes and
modes run under it, and are promised no more than the cap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gpuckpt.errors import BudgetExceeded, InvalidChain, InvalidPlan
from gpuckpt.planning import Chain, Plan, certify, plan_chain, simulate, with_spill
from gpuckpt.planning.strategies import keep_all
from gpuckpt.planning.tree import flatten
from gpuckpt.pytorch._torch_internals import sharded_parameters
from gpuckpt.pytorch.engine.copies import Copies, copies_for
from gpuckpt.pytorch.engine.offload import SPILL
from gpuckpt.pytorch.engine.residency import mark_given, mark_resident
from gpuckpt.pytorch.link_speed import Link, measure_link
from gpuckpt.pytorch.other_calls import ExtraCall, at_most, skipped_calls, with_calls
from gpuckpt.pytorch.parallel.agree import Ranks, ranks_of
from gpuckpt.pytorch.peak_check import DevicePeak, StepPeaks
from gpuckpt.pytorch.planned import Planned
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.clock import WallClock
from gpuckpt.pytorch.profiling.measure import run_measured
from gpuckpt.pytorch.profiling.other_sizes import Observed, predict, without_sizes
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.profiling.signature import describe_call, describe_model
from gpuckpt.pytorch.terms import Terms
from gpuckpt.pytorch.whole_device.device_scope import Situation
from gpuckpt.pytorch.whole_device.optimizer_step import optimizers_of

__all__ = ["PlanMaker", "Planned"]

_MOST_PLANS = 64
_MOST_REPLANS = 2  # of one kind of call
_MOST_OBSERVED = 8  # sizes that others are predicted from
_MOST_DEVIANTS = 1024  # kinds of calls that are remembered to hold other bytes than expected
_MOST_NEW_NUMBERS = 16  # more new ints than ones that come again: a counter, and no number that decides bytes


class PlanMaker:
    """Measures and plans a model within `budget` and, where there is one, `host_budget`, each shared by `live` forwards.

    `plans`: by kind of call, the one used last at the end. `peaks`: what steps were promised to hold, and held. A budget that is
    a share of a plain step is without end until the first call was measured.
    """

    def __init__(self, model: nn.Module, terms: Terms) -> None:
        self.plans: OrderedDict[Any, Planned] = OrderedDict()
        self._model = model
        self._terms = terms
        self.device = terms.device_scope(model)
        self.budget = terms.budget_for(model, device=self.device)
        self.host_budget = terms.host_budget_for(self.budget)
        self.copies: Copies | None = None  # who copies to the host and back, once a device is known
        self.peaks = StepPeaks(self.budget, self.host_budget, terms.strict)
        if self.device is not None:
            self.peaks.device = DevicePeak(model, self.device, optimizers_of(terms.optimizer), self.peaks.check)
        self._in_situation: dict[tuple[int, Situation], Planned] = {}  # made of those in `plans`, by their ids
        self._shared: Planned | None = None  # the one plan of ranks that meet inside of the model
        self._observed: dict[Any, OrderedDict[tuple[int, ...], Measured]] = {}  # by kind without sizes, and by sizes
        self._unpredictable: set[Any] = set()  # kinds
        self._longer: dict[Any, Planned] = {}  # by kind, with calls that were seen later
        self._link: Link | None = None
        self._numbers_matter: set[Any] = set()  # kinds in which another int may take other bytes
        # By kind without sizes: how many more of their calls had a new int than one that was met before.
        self._new_numbers: dict[Any, int] = {}
        self._replanned: dict[Any, int] = {}
        self._latest: Any = None  # the kind of the latest call
        self._made_of: Any = None
        self._planned_before = False  # from the second time on ranks plan for themselves where they can
        self.start_anew()

    def start_anew(self) -> None:
        """The model was changed: what was measured holds no longer. A change that other ranks may not have made (a hook, an
        attribute) leaves the plan that is shared with them; its modules and their sharding are the same on all."""
        before = self._made_of
        self._parts = list(self._model.modules())
        self._parameters = list(self._model.parameters())
        self._made_of = [(id(part), type(part), len(sharded_parameters(part))) for part in self._parts]
        self.plans.clear()
        self._longer.clear()
        if self._shared is None or self._made_of != before:
            self._shared = None
            self._observed.clear()
            self._unpredictable.clear()

    @property
    def shared(self) -> bool:
        """Whether ranks that meet inside of the model run one plan: none of them may recompute anything else."""
        return self._shared is not None

    def kind_of(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What of a call its plan depends on, besides the situation of the device, which is looked at."""
        if self.device is not None:
            self.device.look_at(args, kwargs)
        kind = self._describe(args, kwargs, numbers=False)
        if kind not in self._numbers_matter:
            return kind
        like = without_sizes(kind)[0]
        if (new := self._new_numbers.get(like, 0)) >= _MOST_NEW_NUMBERS:
            return kind  # it counts steps: a plan for each would be made and never used again
        by_number = self._describe(args, kwargs, numbers=True)
        self._new_numbers[like] = max(0, new - 1) if by_number in self.plans else new + 1
        return by_number

    def known(self, kind: Any) -> Planned | None:
        """The plan for a kind of call, if it was made already; that call is the latest from now on."""
        planned = self.plans.get(kind)
        if planned is None and self._shared is not None:
            plan, host_bytes = self._shared.plan, self._host_bytes_of_one or 0
            held = replace(plan.certificate, peak_bytes=self._bytes_of_one, host_peak_bytes=host_bytes)
            plan = replace(plan, certificate=held)
            planned = self._keep(kind, replace(self._shared, plan=plan, predicted=True, flows={}))
        if planned is not None:
            self.plans.move_to_end(kind)
            self._latest = kind
        return planned

    def predicted(self, kind: Any) -> Planned | None:
        """A plan for a kind of call whose bytes follow from those of others; None where they do not, or do not fit."""
        like, sizes = without_sizes(kind)
        observed = self._observed.get(like)
        if not observed or self._terms.strict or kind in self._unpredictable:
            return None
        measured = predict([Observed(*pair) for pair in observed.items()], sizes)
        if measured is None:
            return None
        with suppress(BudgetExceeded):  # refused by what is measured, not by what is expected
            return self._add(kind, measured, predicted=True, ranks=Ranks())
        return None

    def make(self, kind: Any, args: tuple, kwargs: dict[str, Any]) -> Planned:
        """Measure and plan. Raises `BudgetExceeded`, with the smallest budget that would do, where no plan fits."""
        mark_given(tensors_in((args, kwargs)))
        # What functional_call computed to stand for a weight is saved and charged like any activation.
        mark_resident([tensor for tensor in (*self._parameters, *self._model.buffers()) if tensor.is_leaf])
        ranks = ranks_of(self._model, group=self._terms.group)
        if self.device is not None and ranks.groups:
            raise ValueError(
                f'scope="device" plans one device, and {type(self._model).__name__} is spread over ranks, whose buffers nobody '
                'counts; expected a model of one rank. Use scope="saved"'
            )
        try:
            measured = self._measure(args, kwargs)
        except Exception as error:
            if not self._planned_before and not ranks.inside:  # the others have measured, and wait
                ranks.plan(error, 0, partial(plan_chain))
            raise
        if kind in self._unpredictable:
            measured = at_most(measured)
        if not self._planned_before and self._terms.share is not None:
            plain_bytes = simulate(measured.chain, keep_all(measured.chain)).peak_bytes
            self.budget = self._terms.budget_for(self._model, plain_bytes)
            self.peaks = StepPeaks(self.budget, self.host_budget, self._terms.strict)
        like, sizes = without_sizes(kind)
        observed = self._observed.setdefault(like, OrderedDict())
        observed[sizes] = measured
        observed.move_to_end(sizes)
        if len(observed) > _MOST_OBSERVED:
            observed.popitem(last=False)
        if len(self._observed) > _MOST_PLANS:
            self._observed.pop(next(iter(self._observed)))
        if self.host_budget is not None and self._link is None:
            device = next((tensor.device for tensor in self._parameters), torch.device(self.budget.device))
            self.copies = copies_for(device)
            self._link = measure_link(device, self.host_budget, WallClock(), self.copies)
        ranks = ranks_of(self._model, measured.groups, self._terms.group)
        alone = self._planned_before and not ranks.inside
        planned = self._add(kind, measured, predicted=False, ranks=Ranks() if alone else ranks)
        longer = self._longer.get(kind)
        if longer is not None and _part_of(measured.modules, longer.measured.modules):
            planned = self._keep(kind, longer)  # a step that calls fewer than others did
        self._planned_before = True
        self._shared = planned if ranks.inside else None
        return planned

    def _add(self, kind: Any, measured: Measured, *, predicted: bool, ranks: Ranks) -> Planned:
        if (link := self._link) is not None:
            latency_s, staying = link.latency_s, measured.staying
            chain = with_spill(measured.chain, link.bytes_per_s, latency_s=latency_s, name=SPILL, staying=staying)
            measured = replace(measured, chain=chain)
        chain_or_error: Chain | Exception = measured.chain
        if measured.random and not self._terms.preserve_rng_state:
            chain_or_error = InvalidChain(
                f"stage {measured.random[0]!r} of {type(self._model).__name__} draws random numbers and would draw others when "
                "it is recomputed; fit with preserve_rng_state=True"
            )
        make: Callable[[Chain, int], Plan] = partial(self._plan, measured)
        saved = self._terms.plan
        if saved is not None and not predicted:
            error = _misfit(saved, measured.chain)
            if error is None:
                make = partial(self._as_saved, saved, measured)
            elif not self._planned_before:
                chain_or_error = error
        plan = ranks.plan(chain_or_error, self._bytes_of_one, make)
        with suppress(BudgetExceeded):  # others hold some of the budget just now: then the step takes piece by piece
            self.budget.prefetch(plan.certificate.layout_bytes)
        situation = None if self.device is None else self.device.situation
        return self._keep(kind, Planned(measured, plan, predicted, situation))

    def _keep(self, kind: Any, planned: Planned) -> Planned:
        self.plans[kind] = planned
        self._in_situation.clear()
        self._latest = kind
        if len(self.plans) > _MOST_PLANS:
            self.plans.popitem(last=False)
        return planned

    def within(self, planned: Planned, max_bytes: int) -> Planned:
        """The same kind of call, planned for other bytes. Raises `BudgetExceeded`, also where other ranks run the same plan."""
        if self.shared:
            hint = "all ranks whose collectives meet inside of the model run one plan, and none can plan for less alone"
            raise BudgetExceeded(planned.plan.certificate.peak_bytes, max_bytes, hint)
        return replace(planned, plan=self._plan(planned.measured, planned.chain, max_bytes))

    def for_device(self, planned: Planned) -> Planned:
        """`planned` as the situation of the device wants it, where the budget is for all of that. Raises `BudgetExceeded`."""
        if self.device is None or self.peaks.device is None:
            return planned
        situation = self.device.situation
        if planned.situation != situation:
            made = self._in_situation.get((id(planned), situation))
            if made is None:
                plan = self._plan(planned.measured, planned.chain, self._bytes_of_one)
                made = self._in_situation[id(planned), situation] = replace(planned, plan=plan, situation=situation)
            planned = made
        self.peaks.device.next_bytes = self.device.promised_bytes(planned.plan)
        return planned

    def called_more(self, planned: Planned, extra: Sequence[ExtraCall], *, failed: bool) -> None:
        """The latest step called stages more often than they were measured, or others like them: plan for these as well, where it
        is known what they hold and that fits. Steps that call fewer leave gaps. `failed`: it did not get to its end, and is
        measured if it is run again."""
        longer = with_calls(planned.measured, extra, self._names())
        if longer is not None and self._latest in self.plans:
            with suppress(BudgetExceeded):
                plan = self._plan(longer, longer.chain, self._bytes_of_one)
                found = self._longer[self._latest] = Planned(longer, plan, predicted=True)
                if len(self._longer) > _MOST_PLANS:
                    del self._longer[next(iter(self._longer))]
                if not failed:
                    self._keep(self._latest, found)

    def deviated(self, planned: Planned) -> None:
        """The latest step, under `planned`, held other bytes than expected: other contents, or another int. Measure again, though
        not for ever."""
        kind = self._latest
        if self.shared:  # and measured together, once
            return
        now = self.plans.get(kind)
        if now is not None and now is not planned and now is self._longer.get(kind):
            return  # made since, for what this step called
        if len(self._unpredictable) >= _MOST_DEVIANTS:
            self._unpredictable.clear()
            self._replanned.clear()
            self._numbers_matter.clear()
            self._new_numbers.clear()
        self._unpredictable.add(kind)
        if now is not None and now.predicted:
            del self.plans[kind]
            return
        self._numbers_matter.add(kind)
        self._replanned[kind] = self._replanned.get(kind, 0) + 1
        if self._replanned[kind] <= _MOST_REPLANS:
            self.plans.pop(kind, None)

    def _names(self) -> dict[nn.Module, str]:
        return {module: name for name, module in self._model.named_modules()}

    def _measure(self, args: tuple, kwargs: dict[str, Any]) -> Measured:
        terms, unit_bytes, copies = self._terms, self.budget.unit_bytes, self.budget.hold == "pool"
        measured = run_measured(self._model, args, kwargs, unit_bytes, WallClock(), terms.repeats, copies, terms.stages)
        skipped = skipped_calls(measured, self._model)
        return with_calls(measured, skipped, self._names()) or measured

    @property
    def _bytes_of_one(self) -> int:
        """What one forward may hold."""
        return self.budget.max_bytes // self._terms.live

    @property
    def _host_bytes_of_one(self) -> int | None:
        return None if self.host_budget is None else self.host_budget.max_bytes // self._terms.live

    def _plan(self, measured: Measured, chain: Chain, max_bytes: int) -> Plan:
        strategy, host_bytes = self._terms.strategy, self._host_bytes_of_one
        if self.device is not None:
            return self.device.plan(measured, max_bytes, strategy, host_bytes)
        return plan_chain(chain, max_bytes, strategy=strategy, host_bytes=host_bytes)

    def _as_saved(self, plan: Plan, measured: Measured, chain: Chain, max_bytes: int) -> Plan:
        found = certify(chain, plan.tree, max_bytes, plan.strategy)
        found = replace(found, certificate=replace(found.certificate, gap=plan.certificate.gap))
        return found if self.device is None else self.device.check(measured, found, max_bytes)

    def _describe(self, args: tuple, kwargs: dict[str, Any], *, numbers: bool) -> Any:
        return describe_call(args, kwargs, numbers=numbers), describe_model(self._parts, self._parameters)


def _part_of(calls: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    """Whether `calls` are among `others`, in their order."""
    remaining = iter(others)
    return all(any(module is other for other in remaining) for module in calls)


def _misfit(plan: Plan, chain: Chain) -> InvalidPlan | None:
    """Why a saved plan is not one for `chain`; None where it is."""
    if plan.fingerprint == chain.fingerprint():
        return None
    covered, measured = flatten(plan.tree)[-1].last + 1, len(chain)
    reason = f"it covers {covered} stages, and {measured} were measured"
    if covered == measured:
        reason = "stages have other names or options, or save other bytes"
        with suppress(InvalidPlan):
            holds_bytes, promised_bytes = simulate(chain, plan.tree).peak_bytes, plan.certificate.peak_bytes
            if holds_bytes != promised_bytes:
                reason = f"under it these stages would hold {holds_bytes} bytes, and it promised {promised_bytes}"
    return InvalidPlan(
        f"the plan given to fit was made for another chain than {chain.name!r} has with these inputs: {reason}. Give it the "
        "model, inputs and dtypes that it was made with, or leave plan= out and let fit plan anew"
    )
