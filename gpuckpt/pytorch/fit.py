"""`fit(model, example_inputs, budget)`: measure, plan, and run a model under the plan from then on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from gpuckpt.memory import Budget
from gpuckpt.planning import Plan
from gpuckpt.pytorch.engine.fence.watched import refuse_scripted
from gpuckpt.pytorch.engine.verify import Verify
from gpuckpt.pytorch.fitted import Fitted
from gpuckpt.pytorch.planned import Planned
from gpuckpt.pytorch.profiling.measure import call_of, check_model
from gpuckpt.pytorch.terms import Terms

__all__ = ["Fitted", "Planned", "fit", "fitted", "unfit"]


def fit(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | int | str,
    *,
    strategy: str = "optimal",
    hold: str = "account",
    preserve_rng_state: bool = True,
    verify: Verify | None = None,
    repeats: int = 3,
    host_budget: Budget | int | str | None = None,
    live: int = 1,
    strict: bool = False,
    group: Any = None,
    plan: Plan | None = None,
    stages: Sequence[str] = (),
    scope: Literal["saved", "device"] = "saved",
    optimizer: Any = None,
) -> Fitted:
    """Make `model` run under a plan that keeps what autograd saves within `budget`. A fitted model is fitted anew.

    Args:
        model: an `nn.Sequential`, or a module that runs the blocks of `nn.ModuleList`s or `nn.Sequential`s in a row.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments for the model (a dict, or a
            tokenizer's batch); where the model takes the tuple or mapping as its one argument, that. If the model returns its
            loss, the loss is planned as well. None: the first batch that the model is called with, on the device and in the
            dtype that it has then.
        budget: a `CheckpointBudget`, or a size from which one is made on the model's device; "40%" is that share of what `live`
            plain forwards of the example save.
        strategy: how to plan; see `gpuckpt.planning.STRATEGIES`.
        hold: "account" or "pool", for a budget that is made here.
        preserve_rng_state: recompute with the same random numbers.
        verify: check every recompute; see `gpuckpt.checkpoint`.
        repeats: timed runs of each stage while measuring.
        host_budget: what stages save may also spill to host memory and come back for their backward, where that is faster than
            recomputing them: a size, or a `CheckpointBudget` on the host with hold="pool". The strategy "optimal" weighs it,
            with transfers timed on this device; the others never spill.
        live: how many forwards may wait for their backward at a time (2 for DPO, GANs or contrastive losses of two towers): each
            is planned for that share of the budget. A forward beyond that is planned for what remains.
        strict: raise `PromiseBroken` where a step holds more than its plan promised. By default such a step, under a cap that
            holds, is noted in `Fitted.deviations` and its inputs are measured again; and a budget that is made here has frames
            drop what they can compute again (`over_cap="recompute"`) where a step would exceed it.
        group: a process group whose ranks call `fit` together, and are refused together, where the model does not show it: before
            it is wrapped. Ranks that the model connects (DistributedDataParallel, `fully_shard`, tensor parallelism, collectives
            of its own) plan together without being told.
        stages: which modules are the stages, by patterns of their names (["encoder.layers.*", "head"]): the outermost calls of
            those that match. By default they are found.
        plan: run this plan (`Plan.from_json`) for the example, and for whatever saves the same, instead of planning.
        scope: "saved": the budget is for what autograd saves. "device": for all bytes of a step, from forward to the optimizer's
            step: weights, buffers, inputs, gradients, the optimizer's state (also before it has any), temporaries, and what the
            model returns its loss by. Planned for, and checked against what the step took where that is counted: on CUDA, and on
            the CPU within `StepLedger(model, optimizer)`. What a step took beyond its promise (scratch within operators, a loss
            that is computed outside of the model, other tensors on the device) is a deviation, and later steps are planned with
            it. The CUDA context and what the allocator caches are not in it.
        optimizer: with scope="device" the optimizer that steps this model, or all of them; with one for each parameter, stepped
            by `register_post_accumulate_grad_hook`, gradients count as freed as they come.

    Raises:
        BudgetExceeded: no plan fits; the error names the smallest budget that would do, and with scope="device" what takes how
            much. The model is untouched.
        InvalidChain: the model has no chain of stages, or calls torch.utils.checkpoint itself.
        NotImplementedError: a part of the model is a `torch.jit.ScriptModule`.
        InvalidPlan: `plan` was made for other stages, or stages that save other bytes.
        TypeError: a `plan` that is none, a `group` that is none or has no part for this rank.
        ValueError: a name in `stages` that no module has; a host budget that is not on the host, or is `budget` itself; an
            unknown `verify` or `scope`; with scope="device" an optimizer of another model, or one whose step's bytes cannot be
            told beforehand, and a model over several devices or ranks.

    >>> import torch
    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(4)))
    >>> x = torch.ones(16, 8)
    >>> fitted = fit(model, x, budget="12KiB")
    >>> fitted(x).sum().backward()
    >>> fitted.budget.peak_bytes == fitted.plan.certificate.peak_bytes <= fitted.budget.max_bytes, fitted.budget.used_bytes
    (True, 0)
    >>> fit(model, x, budget="60%").budget.max_bytes
    20889
    >>> adamw = torch.optim.AdamW(model.parameters())
    >>> fitted = fit(model, x, "128KiB", scope="device", optimizer=adamw)
    >>> weights = sum(parameter.nbytes for parameter in model.parameters())
    >>> 128 * 1024 - fitted.budget.max_bytes == 3 * weights + 4 * 16  # with two moments, and 16 counts of steps
    True
    """
    check_model(model)
    refuse_scripted(model.modules())
    terms = Terms(
        budget,
        strategy,
        hold,
        preserve_rng_state,
        verify,
        repeats,
        host_budget,
        live=live,
        strict=strict,
        group=group,
        plan=plan,
        stages=stages,
        scope=scope,
        optimizer=optimizer,
    )
    before = fitted(model)
    resume = None if before is None else before.suspend()
    try:
        now = Fitted(model, terms)
        if example_inputs is None:
            now.wait()
        else:
            args, kwargs = call_of(model, example_inputs)
            now.plan_for(*args, **kwargs)
    except BaseException:
        if resume is not None:
            resume()
        raise
    _fitted[model] = weakref.ref(now)
    return now


_fitted: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Fitted]] = weakref.WeakKeyDictionary()


def fitted(model: nn.Module) -> Fitted | None:
    """What `fit` made of `model`; None where it runs plainly.

    >>> import torch
    >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    >>> fit(model, torch.ones(2, 8), "1MiB") is fitted(model)
    True
    """
    check_model(model)
    ref = _fitted.get(model)
    found = None if ref is None else ref()
    return found if found is not None and found.active else None


def unfit(model: nn.Module) -> nn.Module:
    """Give a fitted model back as it was: it runs plainly. One that is not fitted is returned as it is.

    >>> import torch
    >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    >>> fit(model, torch.ones(2, 8), "1MiB").active, unfit(model) is model, fitted(model)
    (True, True, None)
    """
    found = fitted(model)
    return model if found is None else found.unfit()
