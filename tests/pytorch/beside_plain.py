"""A fitted model beside a copy that runs plainly: the same losses, gradients and buffers, bit for bit, within the promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpuckpt import CheckpointBudget, fit
from gpuckpt.pytorch.engine.residency import mark_resident
from gpuckpt.pytorch.fitted import Fitted


@dataclass
class Trained:
    """What one training step left behind."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]
    rng: torch.Tensor


def tensors_of(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [tensor for value in values if value is not None for tensor in tensors_of(value)]


def default_loss(out: Any) -> torch.Tensor:
    """The model's loss if it returns one, else the sum of squares."""
    first = tensors_of(out)[0]
    return first if first.numel() == 1 else sum(tensor.float().square().sum() for tensor in tensors_of(out))


def train_step(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    seed: int,
    around: Callable[[], Any] = nullcontext,
) -> Trained:
    torch.manual_seed(seed)
    with around():
        out = model(*args, **kwargs)
        loss = default_loss(out)
    loss.backward()
    optimizer.step()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    outputs = [tensor.detach().clone() for tensor in tensors_of(out)]
    return Trained(
        outputs, gradients, {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    )


def assert_same(ours: Trained, plain: Trained) -> None:
    assert len(ours.outputs) == len(plain.outputs)
    for a, b in zip(ours.outputs, plain.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert list(ours.gradients) == list(plain.gradients)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=0, atol=0, msg=f"gradient of {name} differs")
    assert list(ours.state) == list(plain.state)
    for name, value in plain.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=0, atol=0, msg=f"{name} differs after the step")
    assert torch.equal(ours.rng, plain.rng)


def plain_peak_bytes(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    around: Callable[[], Any] = nullcontext,
    loss_of: Callable[[Any], Any] = default_loss,
) -> int:
    """What autograd saves in a plain step, by a budget's ledger."""
    model = copy.deepcopy(model)
    mark_resident([*model.parameters(), *model.buffers()])
    budget = CheckpointBudget(1 << 40, device="cpu")
    with budget, around():
        loss = loss_of(model(*args, **kwargs))
    del loss
    return budget.peak_bytes


def beside_plain(
    model: nn.Module,
    *args: Any,
    share: float | None = 0.4,
    budget: int | None = None,
    steps: int = 3,
    around: Callable[[], Any] = nullcontext,
    fit_options: dict[str, Any] | None = None,
    exact: bool = True,
    **kwargs: Any,
) -> Fitted:
    """Train `model` fitted, and a copy plainly; everything must be equal, and the peak as promised.

    `share`: the budget as a share of the plain peak; None: the smallest budget of all.
    """
    plain = copy.deepcopy(model)
    fit_options = fit_options or {}
    inputs = kwargs or args
    with around():
        peak_bytes = plain_peak_bytes(model, args, kwargs, around)
        if budget is None:
            if share is None:
                probe = fit(copy.deepcopy(model), inputs, 1 << 40, **fit_options)
                budget = probe.plan.certificate.smallest_budget_bytes
                probe.unfit()
            else:
                budget = int(share * peak_bytes)
        fitted = fit(model, inputs, budget, **fit_options)
    ours_optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.5)
    for seed in range(steps):
        expected = train_step(plain, args, kwargs, plain_optimizer, seed, around)
        got = train_step(model, args, kwargs, ours_optimizer, seed, around)
        assert_same(got, expected)
        assert fitted.budget.used_bytes == 0
        promised = fitted.plan.certificate.peak_bytes
        assert fitted.promised_peak_bytes == promised <= fitted.budget.max_bytes
        if exact:
            assert fitted.measured_peak_bytes == fitted.budget.peak_bytes == promised
        else:
            assert fitted.measured_peak_bytes <= promised
    return fitted
