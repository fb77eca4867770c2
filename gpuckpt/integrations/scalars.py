"""What a step held, as curves beside the loss: scalars for TensorBoard and Weights & Biases, through the writer of a script."""

from __future__ import annotations

from typing import Any

from gpuckpt.checks import check_int, shown
from gpuckpt.pytorch.fit import Fitted

__all__ = ["step_scalars", "write_scalars"]

_GIB = float(1 << 30)


def step_scalars(fitted: Fitted) -> dict[str, float]:
    """The latest step in figures, by name: GiB held at most, promised and allowed, on the host where there is a host budget, the
    share of a step that is recompute by the plan, and how many steps so far held more than promised.

    Raises `CheckpointError` before the first step.

    >>> import gpuckpt, torch
    >>> model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(4)))
    >>> fitted = gpuckpt.fit(model, torch.ones(4, 8), "80%")
    >>> fitted(torch.ones(4, 8)).sum().backward()
    >>> found = step_scalars(fitted)
    >>> found["gpuckpt/held_gib"] == found["gpuckpt/promised_gib"] <= found["gpuckpt/budget_gib"]
    True
    """
    if not isinstance(fitted, Fitted):
        raise TypeError(f"fitted is {shown(fitted)}; expected what gpuckpt.fit returned")
    certificate = fitted.plan.certificate
    found = {
        "gpuckpt/held_gib": fitted.measured_peak_bytes / _GIB,
        "gpuckpt/promised_gib": fitted.promised_peak_bytes / _GIB,
        "gpuckpt/budget_gib": fitted.budget.max_bytes / _GIB,
        "gpuckpt/recompute_share": certificate.recompute_s / certificate.step_s if certificate.step_s else 0.0,
        "gpuckpt/deviations": float(len(fitted.deviations)),
    }
    if fitted.host_budget is not None:
        found["gpuckpt/host_held_gib"] = fitted.measured_host_peak_bytes / _GIB
    return found


def write_scalars(writer: Any, fitted: Fitted, step: int) -> None:
    """Write `step_scalars(fitted)` as those of training step number `step`.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or a run of Weights & Biases (`wandb.init()`).

    Raises `TypeError` for another writer, `CheckpointError` before the first step.

    >>> class Writer:  # as TensorBoard's
    ...     def add_scalar(self, tag, scalar_value, global_step):
    ...         print(global_step, tag)
    >>> import gpuckpt, torch
    >>> model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(4)))
    >>> fitted = gpuckpt.fit(model, torch.ones(4, 8), "80%")
    >>> write_scalars(Writer(), fitted, 7)  # doctest: +ELLIPSIS
    7 gpuckpt/held_gib
    ...
    """
    step = check_int(step, "step", None)
    scalars = step_scalars(fitted)
    if callable(add := getattr(writer, "add_scalar", None)):
        for name, value in scalars.items():
            add(name, value, step)
    elif callable(log := getattr(writer, "log", None)):
        log(scalars, step=step)
    else:
        raise TypeError(
            f"writer is a {type(writer).__name__}; expected TensorBoard's SummaryWriter (add_scalar) or a run of wandb (log)"
        )
