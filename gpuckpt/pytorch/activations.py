"""The activations of the fused layers in plain torch: value and derivative, by torch's own fused operators.

The Triton kernels have their own (`gpuckpt.kernels.activations`); names agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["ACTIVATIONS", "GATED", "act_backward", "act_forward", "check_activation"]

aten = torch.ops.aten


def _relu2_backward(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return dy * F.relu(z) * 2


_TABLE: dict[str, tuple[Callable, Callable]] = {
    "identity": (lambda z: z, lambda dy, z: dy),
    "relu": (F.relu, lambda dy, z: aten.threshold_backward(dy, z, 0)),
    "relu2": (lambda z: F.relu(z).square(), _relu2_backward),
    "gelu": (F.gelu, lambda dy, z: aten.gelu_backward(dy, z, approximate="none")),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dy, z: aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "silu": (F.silu, lambda dy, z: aten.silu_backward(dy, z)),
    "sigmoid": (torch.sigmoid, lambda dy, z: aten.sigmoid_backward(dy, torch.sigmoid(z))),
    "tanh": (torch.tanh, lambda dy, z: aten.tanh_backward(dy, torch.tanh(z))),
}

ACTIVATIONS = tuple(_TABLE)
"""Names that `activation=` takes."""

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""Gated forms: the name of the form and the activation of its gate (Shazeer, "GLU variants improve transformer", 2020)."""


def check_activation(name: str) -> None:
    """Raise `ValueError` for a name that is no activation."""
    if name not in _TABLE:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")


def act_forward(name: str, z: torch.Tensor) -> torch.Tensor:
    """act(z)."""
    return _TABLE[name][0](z)


def act_backward(name: str, dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """dy * act'(z)."""
    return _TABLE[name][1](dy, z)
