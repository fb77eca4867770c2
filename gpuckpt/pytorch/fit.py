"""`fit(model, example_inputs, budget)`: measure, plan, and run a model under the plan from then on.

The model stays the same object: its class, parameter names, `state_dict`, hooks and optimizers are untouched, and calling it
runs under the plan. Inputs of a new shape are measured and planned when they first appear. Calls without gradients run
plainly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.errors import CheckpointError, InvalidChain, PromiseBroken
from gpuckpt.memory import CheckpointBudget
from gpuckpt.planning import Chain, Plan, plan_chain
from gpuckpt.pytorch.frame import Verify
from gpuckpt.pytorch.measure import run_measured
from gpuckpt.pytorch.saved_tensors import mark_resident
from gpuckpt.pytorch.stages import set_call
from gpuckpt.pytorch.walk import Walk

__all__ = ["Fitted", "Planned", "fit"]


@dataclass(frozen=True)
class Planned:
    """A plan for inputs of one shape: the measured chain, the plan, and how calls map to the chain's stages."""

    chain: Chain
    plan: Plan
    modules: tuple[nn.Module, ...]
    owned: tuple[int, ...]


class Fitted:
    """A model that runs under a plan. Made by `fit`; calling it is calling the model.

    Attributes: `model`, `budget`, and of the latest call's input shape `plan` and `chain`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: CheckpointBudget,
        strategy: str,
        preserve_rng_state: bool,
        verify: Verify | None,
        repeats: int,
    ) -> None:
        self.model = model
        self.budget = budget
        self._strategy = strategy
        self._preserve_rng_state = preserve_rng_state
        self._verify = verify
        self._repeats = repeats
        self._planned: dict[Any, Planned] = {}
        self._latest: Planned | None = None
        self._local = threading.local()
        self._undo: dict[nn.Module, Callable[[], None]] = {}
        mark_resident([*model.parameters(), *model.buffers()])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def latest(self) -> Planned:
        """What the latest call ran under."""
        if self._latest is None:
            raise CheckpointError("nothing is planned yet: call plan_for(*inputs), or the model")
        return self._latest

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
        key = _signature(self.model, args, kwargs)
        planned = self._planned.get(key)
        if planned is None:
            before = self._unwrap()  # measured as it runs without us
            try:
                chain, modules, owned = run_measured(self.model, args, kwargs, self.budget.unit_bytes, self._repeats)
                plan = plan_chain(chain, self.budget.max_bytes, strategy=self._strategy)
                before += [self.model, *modules]
            finally:
                self._wrap(before)
            planned = self._planned[key] = Planned(chain, plan, tuple(modules), tuple(owned))
        self._latest = planned
        return planned

    def _wrap(self, modules: list[nn.Module]) -> None:
        for module in dict.fromkeys(modules):
            self._undo[module] = set_call(module, self._model_call if module is self.model else self._stage_call)

    def _unwrap(self) -> list[nn.Module]:
        modules = list(self._undo)
        for restore in self._undo.values():
            restore()
        self._undo.clear()
        return modules

    def unfit(self) -> nn.Module:
        """Give the model back as it was; it runs plainly again."""
        self._unwrap()
        self._planned.clear()
        return self.model

    def check_promise(self) -> None:
        """Raise `PromiseBroken` if the budget has held more than the latest plan promised.

        Called before and after every forward. Only meaningful while nobody else uses the budget.
        """
        promised, measured = self.plan.certificate.peak_bytes, self.budget.peak_bytes
        if measured > promised:
            raise PromiseBroken(
                promised,
                measured,
                "the model did not save what it saved when it was measured; does it depend on its data, or does someone else "
                "use this budget?",
            )

    def _model_call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(self._local, "walk", None) is not None:
            return model._call_impl(*args, **kwargs)
        if self._latest is not None and self.budget.used_bytes == 0:
            self.check_promise()  # of the step before, whose backward has ended
            self.budget.reset_peak()
        planned = self.plan_for(*args, **kwargs)
        walk = Walk(planned.plan.tree, self.budget, self._verify, self._preserve_rng_state)
        self._local.walk, self._local.calls = walk, 0
        try:
            with self.budget:
                self.budget.step("forward")
                out = model._call_impl(*args, **kwargs)
            if self._local.calls != len(planned.modules):
                raise InvalidChain(
                    f"{type(model).__name__} ran {self._local.calls} stages and {len(planned.modules)} when it was measured "
                    "with inputs of the same shapes; a fitted model runs the same stages every time"
                )
        finally:
            self._local.walk = None
        self.budget.step("backward")
        return out

    def _stage_call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walk, planned = getattr(self._local, "walk", None), self._latest
        if walk is None or planned is None or not torch.is_grad_enabled():
            return module._call_impl(*args, **kwargs)
        number = self._local.calls
        if number >= len(planned.modules) or planned.modules[number] is not module:
            return module._call_impl(*args, **kwargs)  # called once more, outside the chain
        self._local.calls += 1
        walk.position = planned.owned[number]
        self.budget.step(planned.chain.stages[walk.position].name)
        return walk.step(module, args, kwargs)


def _signature(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a plan depends on: shapes and kinds of the inputs, the mode of every module, autocast, which parameters train."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, torch.Tensor)
        else leaf
        if isinstance(leaf, int | float | str | bool | None)
        else type(leaf)
        for leaf in leaves
    )
    autocast = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
    )
    training = tuple(module.training for module in model.modules())
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    return str(spec), described, autocast, training, trained


def fit(
    model: nn.Module,
    example_inputs: Any,
    budget: CheckpointBudget | int | str,
    *,
    strategy: str = "optimal",
    hold: str = "account",
    preserve_rng_state: bool = True,
    verify: Verify | None = None,
    repeats: int = 3,
) -> Fitted:
    """Make `model` run under a plan that keeps what autograd saves within `budget`.

    Args:
        model: an `nn.Sequential`, or a module that runs the blocks of `nn.ModuleList`s or `nn.Sequential`s in a row.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments for the model. If the model
            returns its loss, the loss is planned as well.
        budget: a `CheckpointBudget`, or a size from which one is made on the model's device.
        strategy: how to plan; see `gpuckpt.planning.STRATEGIES`.
        hold: "account" or "pool", for a budget that is made here.
        preserve_rng_state: recompute with the same random numbers.
        verify: check every recompute; see `gpuckpt.checkpoint`.
        repeats: timed runs of each stage while measuring.

    Raises:
        BudgetExceeded: no plan fits; the error names the smallest budget that would do. The model is untouched.
        InvalidChain: the model has no chain of stages.
    """
    args, kwargs = (
        ((), example_inputs)
        if isinstance(example_inputs, dict)
        else (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,), {})
    )
    if not isinstance(budget, CheckpointBudget):
        device = next((parameter.device for parameter in model.parameters()), None)
        budget = CheckpointBudget(budget, device=device, hold=hold)  # type: ignore[arg-type]
    fitted = Fitted(model, budget, strategy, preserve_rng_state, verify, repeats)
    fitted.plan_for(*args, **kwargs)
    return fitted
