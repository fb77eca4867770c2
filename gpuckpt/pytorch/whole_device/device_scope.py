"""`fit(scope="device")`: a budget for all that a step has on its device.

What stays (weights, buffers, the optimizer's state, also before its first step) leaves the rest of the budget to the step:
inputs, activations, gradients, temporaries. That rest is the cap of what autograd saves, and a plan keeps all of it within that
at every moment: each stage's temporaries count with what is held while they are there, and gradients from when they come. The
optimizer's own temporaries come when nothing else is left but gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import Chain, Plan, simulate
from gpuckpt.planning.device.gradients import (
    Gradient,
    check_total,
    plan_total,
    stages_of,
    stages_within,
    with_gradients,
)
from gpuckpt.planning.strategies import keep_all
from gpuckpt.pytorch._torch_internals import has_accumulate_hook
from gpuckpt.pytorch.engine.subclasses import parts_of
from gpuckpt.pytorch.profiling.chain_finder import tensors_in
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.whole_device.optimizer_step import OptimizerBytes, dry_step
from gpuckpt.units import format_bytes

__all__ = ["DeviceScope", "Situation"]

_CUDA_UNIT_BYTES = 512
_MOST_STATES = (
    4  # of the CPU's random numbers that a plan keeps where nothing draws: forward's, and in backward the present ones
)
_SCALARS_BYTES = 1024  # the loss, its gradient, and what operators make of Python's numbers


class Situation(NamedTuple):
    """What of the bytes of a step is not in its chain.

    `there`: numbers of the trained parameters that have a gradient when forward begins: they accumulate, or were set to zero in
    place. `in_backward`: gradients go into the optimizer as they come. `unforeseen_bytes`: what earlier steps took beyond their
    promise.
    """

    there: frozenset[int]
    inputs_bytes: int
    in_backward: bool
    unforeseen_bytes: int


class DeviceScope:
    """The budget of a model's whole step, `max_bytes` on one device.

    `resident`: bytes that are there all the time, by what they are; `left_bytes`: the rest. Raises `BudgetExceeded` where that
    cannot hold even the gradients, `ValueError` for optimizers of another model, and for a model on several devices.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], max_bytes: int) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        devices = {part.device for tensor in tensors for part in parts_of(tensor)}
        if len(devices) > 1:
            raise ValueError(
                f'scope="device" is for a model on one device; {type(model).__name__} is on '
                f'{", ".join(sorted(map(str, devices)))}. Fit it with scope="saved"'
            )
        own = {id(parameter) for parameter in model.parameters()}
        stepped = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
        if not any(id(parameter) in own for parameter in stepped):
            raise ValueError(
                f"the optimizer has none of the parameters of {type(model).__name__}; expected the one that steps this model"
            )
        self.max_bytes = max_bytes
        self.unit_bytes = 1 if devices <= {torch.device("cpu")} else _CUDA_UNIT_BYTES
        self.unforeseen_bytes = 0
        self._names: dict[int, list[str]] = {}
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._resident_ids: set[int] = set()
        weights, buffers = self._new_bytes(model.parameters()), self._new_bytes(model.buffers())
        steps = _dry_steps(optimizers, self.unit_bytes)
        self.resident = {
            "weights": weights,
            "buffers": buffers,
            "optimizer state": sum(step.state_bytes for step in steps),
        }
        self._step_bytes = max(step.step_bytes for step in steps)
        self._own_steps = {
            id(parameter): step.step_bytes
            for each, step in zip(optimizers, steps, strict=True)
            for group in each.param_groups
            for parameter in group["params"]
        }
        self._in_backward = len(optimizers) > 1 and all(map(has_accumulate_hook, self._parameters))
        self.situation = self.look_at((), {})
        self._check(self._optimizer_peak_bytes())

    @property
    def left_bytes(self) -> int:
        """What is left of the budget for all that comes and goes."""
        return self.max_bytes - sum(self.resident.values())

    def look_at(self, args: tuple, kwargs: dict[str, Any]) -> Situation:
        """The situation in which the model is called with these."""
        there = frozenset([number for number, p in enumerate(self._parameters) if p.grad is not None])
        storages = {
            part.untyped_storage()._cdata: self._rounded(part.untyped_storage().nbytes())
            for tensor in tensors_in((args, kwargs))
            for part in parts_of(tensor)
        }
        inputs_bytes = sum(nbytes for storage, nbytes in storages.items() if storage not in self._resident_ids)
        self.situation = Situation(there, inputs_bytes, self._in_backward, self.unforeseen_bytes)
        return self.situation

    def after_backward(self) -> None:
        """Backward has ended: are the gradients gone that were to be let go?"""
        self._in_backward = self._in_backward and all(parameter.grad is None for parameter in self._parameters)

    def total(self, measured: Measured, *, recomputes: bool = True) -> Chain:
        """The chain with all that comes and goes in the present situation, for `plan_chain(objective="total")`; with the states
        of random numbers, where the plan `recomputes` anything."""
        now, chain = self.situation, measured.chain
        known, last = stages_of(chain), len(chain) - 1
        gradients = []
        for number, parameter in enumerate(self._parameters):
            inside = {stage for name in self._names[id(parameter)] for stage in stages_within(name, known)}
            outside = {known[name][0] for name, users in measured.trained.items() if number in users and name in known}
            stages = tuple(sorted(inside | outside)) or (last,)
            stays = not now.in_backward and number not in now.there
            step_bytes = self._own_steps.get(id(parameter), 0) if now.in_backward else 0
            gradients.append(Gradient(stages, self._gradient_bytes(parameter), stays, step_bytes))
        storages = tuple([0 if i in measured.given else size for i, size in enumerate(chain.storages)])
        states = _MOST_STATES + len(measured.random) if recomputes and self.unit_bytes == 1 else 0
        states_bytes = states * torch.get_rng_state().nbytes
        others_bytes = self._there_bytes() + now.inputs_bytes + now.unforeseen_bytes + _SCALARS_BYTES
        return with_gradients(_with_storages(chain, storages), gradients, always_bytes=states_bytes + others_bytes)

    def plan(
        self, measured: Measured, max_bytes: int, strategy: str = "optimal", host_bytes: int | None = None
    ) -> Plan:
        """The fastest plan within `max_bytes` of what is left. Raises `BudgetExceeded`, in bytes of the whole device, with what
        takes how much."""
        self._check(self._optimizer_peak_bytes())
        try:
            total = self.total(measured, recomputes=False)
            if simulate(total, keep_all(total)).total_peak_bytes > max_bytes:
                total = self.total(measured)
            return plan_total(measured.chain, total, max_bytes, strategy, host_bytes)
        except BudgetExceeded as error:
            least = (
                f"{format_bytes(error.need)} for forward and backward, those included, under the plan that takes least"
            )
            self._check(error.need, least)
            raise

    def check(self, measured: Measured, plan: Plan, max_bytes: int) -> Plan:
        """A plan that was made elsewhere, if the whole step fits under it. Raises `BudgetExceeded`."""
        self._check(self._optimizer_peak_bytes())
        return check_total(measured.chain, self.total(measured), plan, max_bytes)

    def promised_bytes(self, plan: Plan) -> int:
        """The most bytes on the device in a step under `plan`."""
        moving_bytes = max(plan.certificate.total_peak_bytes, self._optimizer_peak_bytes())
        return sum(self.resident.values()) + moving_bytes

    def _optimizer_peak_bytes(self) -> int:
        now = self.situation
        step_bytes = 0 if now.in_backward else sum(map(self._gradient_bytes, self._parameters)) + self._step_bytes
        return step_bytes + now.inputs_bytes + now.unforeseen_bytes + _SCALARS_BYTES

    def _there_bytes(self) -> int:
        return sum(self._gradient_bytes(self._parameters[number]) for number in self.situation.there)

    def _check(self, moving_bytes: int, what: str | None = None) -> None:
        """Raises `BudgetExceeded` where `moving_bytes`, by default of the optimizer's step, do not fit into what is left."""
        if moving_bytes <= self.left_bytes:
            return
        now = self.situation
        staying = {
            **self.resident,
            "inputs": now.inputs_bytes,
            "what earlier steps took unforeseen": now.unforeseen_bytes,
        }
        if what is None and not now.in_backward:
            gradients_bytes = sum(map(self._gradient_bytes, self._parameters))
            what = (
                f"gradients {format_bytes(gradients_bytes)}, optimizer's temporaries {format_bytes(self._step_bytes)}"
            )
        listed = [f"{name} {format_bytes(nbytes)}" for name, nbytes in staying.items() if nbytes]
        need = sum(self.resident.values()) + moving_bytes
        raise BudgetExceeded(
            need, self.max_bytes, f"of a whole step: {', '.join(filter(None, [*listed, what]))}"
        ) from None

    def _gradient_bytes(self, parameter: torch.Tensor) -> int:
        return self._rounded(parameter.numel() * parameter.element_size())

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.unit_bytes) * self.unit_bytes

    def _new_bytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of those storages that were not counted yet."""
        found = 0
        for tensor in tensors:
            for part in parts_of(tensor):
                storage = part.untyped_storage()
                if storage._cdata not in self._resident_ids:
                    self._resident_ids.add(storage._cdata)
                    found += self._rounded(storage.nbytes())
        return found


def _with_storages(chain: Chain, storages: tuple[int, ...]) -> Chain:
    return Chain(chain.stages, storages, chain.unit_bytes, chain.name)


def _dry_steps(optimizers: list[torch.optim.Optimizer], unit_bytes: int) -> list[OptimizerBytes]:
    """Of each optimizer; those that are alike, one for each of many parameters, once."""
    known: dict[str, OptimizerBytes] = {}
    found = []
    for optimizer in optimizers:
        groups = [
            [{**group, "params": [(p.shape, p.stride(), p.dtype, p.device, p.requires_grad) for p in group["params"]]}]
            for group in optimizer.param_groups
        ]
        key = repr((type(optimizer), groups))
        if key not in known:
            known[key] = dry_step(optimizer, unit_bytes)
        found.append(known[key])
    return found
