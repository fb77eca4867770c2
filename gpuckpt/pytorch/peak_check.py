"""What budgets have held for the latest step, and what the step's plan promised."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gpuckpt.errors import PromiseBroken
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import graph_task_id, keep_graph, queue_callback, untraced
from gpuckpt.pytorch.whole_device.device_scope import DeviceScope
from gpuckpt.pytorch.whole_device.step_ledger import ledger_of

__all__ = ["Deviation", "DevicePeak", "Promise", "StepPeaks"]

_MOST_DEVIATIONS = 1024


class Deviation(NamedTuple):
    """A step that held more than its plan promised, or for which room had to be made, under a cap that held. `on_host`: of the
    host budget; `of_device`: all bytes of a step on its device (`fit(scope="device")`), which nothing caps."""

    promised_bytes: int
    measured_bytes: int
    on_host: bool
    of_device: bool = False


class Promise:
    """The promise about one budget. Only meaningful while nothing else is charged to the budget or released.

    Attributes: `promised_bytes`, of the latest step, or of all those that overlap; `measured_bytes`, the most the budget held
    for them.
    """

    def __init__(self, budget: Budget, name: str) -> None:
        self.budget = budget
        self.promised_bytes = 0
        self.measured_bytes = 0
        self._name = name
        self._others_bytes = 0  # held by others when the latest step began
        self._noted_bytes = 0  # the most that was held for the latest step before its peak was put back
        self._earlier_bytes = self._begun_bytes = 0  # when the latest step began: promised, and held for others
        self._refusals = budget.ledger.refusals

    @property
    def idle(self) -> bool:
        """Whether nothing is held for any step."""
        return self.budget.used_bytes <= self._others_bytes

    def begin(self) -> None:
        """From here on the budget's peak is that of the steps that follow."""
        self._others_bytes = self.budget.used_bytes
        self._noted_bytes = 0
        self.budget.reset_peak()
        self.promised_bytes = 0

    def add(self, peak_bytes: int) -> None:
        """A step that holds that much at most begins. The backward of an earlier one, whose tensors wait, comes after its own."""
        self._earlier_bytes, self._begun_bytes = self.promised_bytes, self.budget.used_bytes - self._others_bytes
        self.amend(peak_bytes)

    def amend(self, peak_bytes: int) -> None:
        """The step that began last holds that much, as its forward has shown."""
        self.promised_bytes = max(self._earlier_bytes, self._begun_bytes + peak_bytes)

    def broken(self) -> bool:
        """Measure: was more held than promised?"""
        since_bytes = self.budget.peak_bytes - self._others_bytes
        self.measured_bytes = max(since_bytes, self._noted_bytes)
        return since_bytes > self.promised_bytes

    def noted(self) -> None:
        """What was held is told once; from here on the budget's peak is that of what follows."""
        self._noted_bytes = self.measured_bytes
        self.budget.reset_peak()

    def refused(self) -> bool:
        """Whether the budget was asked for more than it had since this was last looked at."""
        before, self._refusals = self._refusals, self.budget.ledger.refusals
        return self._refusals > before

    def error(self) -> PromiseBroken:
        """The error for a step that held more than promised."""
        hint = (
            "the model did not save what it saved when it was measured; does it depend on its data, or does someone else use "
            f"{self._name}?"
        )
        return PromiseBroken(self.promised_bytes, self.measured_bytes, hint)


class DevicePeak:
    """The promise about all bytes of a step, where anybody counts them: on CUDA torch's allocator, on the CPU a `StepLedger` of
    the model that is entered around the step.

    Attributes: `promised_bytes` of the latest step, `next_bytes` of the one to come; `measured_bytes`, 0 where nobody counted.
    """

    def __init__(
        self,
        model: nn.Module,
        scope: DeviceScope,
        optimizers: Sequence[torch.optim.Optimizer],
        check: Callable[[], None],
    ) -> None:
        self.scope = scope
        self.promised_bytes = self.next_bytes = self.measured_bytes = 0
        self._model = weakref.ref(model)
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._counter: Any = None
        self._seen_bytes = 0
        self._began = False
        check_weakly = weakref.WeakMethod(check)

        def stepped(*_: Any) -> None:
            now = check_weakly()
            if now is not None and self._began and graph_task_id() == -1:  # in backward it is not over yet
                now()

        for optimizer in optimizers:
            optimizer.register_step_post_hook(stepped)

    def begin(self) -> None:
        """A step begins."""
        self.promised_bytes, self._began = self.next_bytes, True
        self._look()

    def broken(self) -> bool:
        """Measure: has the step taken more than promised? If so, the next ones are planned with what came on top."""
        self.scope.after_backward()
        before, now = self._seen_bytes, self._look()
        if not self._began or now <= before:  # an earlier step took as much
            return False
        self.measured_bytes = now
        if now <= self.promised_bytes:
            return False
        self.scope.unforeseen_bytes += now - self.promised_bytes
        return True

    def _look(self) -> int:
        """The most bytes since someone began to count."""
        if self._device.type == "cuda":
            self._seen_bytes = max(self._seen_bytes, torch.cuda.max_memory_allocated(self._device))
            return self._seen_bytes
        model = self._model()
        ledger = None if model is None else ledger_of(model)
        if ledger is not self._counter:
            self._counter, self._seen_bytes = ledger, 0
        if ledger is not None:
            self._seen_bytes = ledger.peak_total_bytes(self.scope.unit_bytes)
        return self._seen_bytes


class StepPeaks:
    """The promises of a fitted model's steps, on the device and on the host.

    A step that holds more than promised while the cap holds is a deviation, which is noted; with `strict` it is an error.
    `deviated`: one was noted since the flag was last put back.
    """

    def __init__(self, budget: Budget, host: Budget | None, strict: bool) -> None:
        self.held = Promise(budget, "this budget")
        self.offloaded = Promise(budget if host is None else host, "the host budget")
        self.deviations: deque[Deviation] = deque(maxlen=_MOST_DEVIATIONS)
        self.deviated = False
        self.device: DevicePeak | None = None
        self.began = False  # whether there has been a step
        self.retained = False  # a graph was kept for a second backward, and its bytes with it
        self._strict = strict
        self._has_host = host is not None

    def _promises(self) -> list[Promise]:
        return [self.held, self.offloaded] if self._has_host else [self.held]

    @property
    def idle(self) -> bool:
        """Whether no step is going on."""
        return not self.began or all(promise.idle for promise in self._promises())

    def begin(self, peak_bytes: int, host_peak_bytes: int) -> None:
        """A step begins: from here on the budgets' peaks are its own, unless an earlier one is still going on."""
        self.check()
        if self.idle:
            for promise in self._promises():
                promise.begin()
            self.retained = False
        self.began = True
        self.held.add(peak_bytes)
        self.offloaded.add(host_peak_bytes)
        if self.device is not None:
            self.device.begin()

    def amend(self, peak_bytes: int, host_peak_bytes: int) -> None:
        """The forward of the latest step has shown what the step holds."""
        self.held.amend(peak_bytes)
        self.offloaded.amend(host_peak_bytes)

    @untraced
    def check(self) -> None:
        """Measure the latest step. Raises `PromiseBroken` for a deviation where the promise is strict."""
        if not self.began:
            return
        for promise in self._promises():
            broken, refused = promise.broken() and not self.retained, promise.refused()
            if broken or (refused and not self._strict):
                promise.noted()
                if self._strict:
                    raise promise.error()
                noted = Deviation(promise.promised_bytes, promise.measured_bytes, promise is not self.held)
                if not self.deviations or self.deviations[-1] != noted:
                    self.deviations.append(noted)
                self.deviated = True
        if self.device is not None and self.device.broken():
            promised_bytes, measured_bytes = self.device.promised_bytes, self.device.measured_bytes
            if self._strict:
                hint = "workspaces within operators, or other tensors on the device; the next step is planned with them"
                raise PromiseBroken(promised_bytes, measured_bytes, hint)
            self.deviations.append(Deviation(promised_bytes, measured_bytes, False, True))

    def watch(self, outputs: Sequence[torch.Tensor]) -> None:
        """See to it that the promise is checked when the backward from `outputs` ends."""

        @untraced
        def backward_begins(_: torch.Tensor) -> None:
            self.retained = self.retained or keep_graph()
            queue_callback(self.check)

        for tensor in outputs:
            if tensor.grad_fn is not None:
                tensor.register_hook(backward_begins)
