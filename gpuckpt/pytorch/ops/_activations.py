"""The activations of the fused layers in plain torch: value and derivative by torch's own fused operators, in place.

Every activation is told in three steps, so that nothing but the pre-activation's own memory is needed:

    k = keep(z)         in the memory of z: what the derivative is computed from
    dz = grad(dy, k)    into any buffer, that of dy or of k too
    h = finish(k)       into any buffer, that of k too: the value

The Triton kernels have their own (`gpuckpt.kernels.device.activations`); names agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpuckpt.checks import shown

__all__ = [
    "ACTIVATIONS",
    "FUNCTIONS",
    "GATED",
    "activate_",
    "check_activation",
    "differentiate",
    "finish",
    "gate_activation",
    "keep_",
]

aten = torch.ops.aten


class _Steps(NamedTuple):
    keep: Callable[[Tensor], object] | None
    grad: Callable[[Tensor, Tensor, Tensor], object]
    finish: Callable[[Tensor, Tensor], object] | None


_TABLE: dict[str, _Steps] = {
    "identity": _Steps(None, lambda dy, k, out: out.copy_(dy), None),
    "relu": _Steps(torch.relu_, lambda dy, k, out: aten.threshold_backward.grad_input(dy, k, 0, grad_input=out), None),
    "relu2": _Steps(
        torch.relu_, lambda dy, k, out: torch.mul(dy, k, out=out).mul_(2), lambda k, out: torch.mul(k, k, out=out)
    ),
    "gelu": _Steps(
        None,
        lambda dy, k, out: aten.gelu_backward.grad_input(dy, k, approximate="none", grad_input=out),
        lambda k, out: aten.gelu.out(k, approximate="none", out=out),
    ),
    "gelu_tanh": _Steps(
        None,
        lambda dy, k, out: aten.gelu_backward.grad_input(dy, k, approximate="tanh", grad_input=out),
        lambda k, out: aten.gelu.out(k, approximate="tanh", out=out),
    ),
    "silu": _Steps(
        None,
        lambda dy, k, out: aten.silu_backward.grad_input(dy, k, grad_input=out),
        lambda k, out: aten.silu.out(k, out=out),
    ),
    "sigmoid": _Steps(torch.sigmoid_, lambda dy, k, out: aten.sigmoid_backward.grad_input(dy, k, grad_input=out), None),
    "tanh": _Steps(torch.tanh_, lambda dy, k, out: aten.tanh_backward.grad_input(dy, k, grad_input=out), None),
}

ACTIVATIONS = tuple(_TABLE)
"""Names that `activation=` takes."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The same out of place and differentiable, for a layer that cannot be fused."""

GATED = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "glu": "sigmoid",
    "bilinear": "identity",
}
"""Gated forms: the name of the form and the activation of its gate (Shazeer, "GLU variants improve transformer", 2020)."""


def gate_activation(name: str) -> str:
    """The activation of the gate of a gated form, which may be told by its own name ("silu") or the form's ("swiglu"). Raises
    `ValueError` for a name that is neither."""
    if not isinstance(name, str) or (name not in _TABLE and name not in GATED):
        raise ValueError(f"activation={shown(name)}: expected one of {', '.join((*ACTIVATIONS, *GATED))}")
    return GATED.get(name, name)


def check_activation(name: str) -> None:
    """Raise `ValueError` for a name that is no activation."""
    if not isinstance(name, str) or name not in _TABLE:
        raise ValueError(f"activation={shown(name)}: expected one of {', '.join(ACTIVATIONS)}")


def keep_(name: str, z: Tensor) -> Tensor:
    """Overwrite z with what the derivative is computed from."""
    step = _TABLE[name].keep
    if step is not None:
        step(z)
    return z


def differentiate(name: str, dy: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """dy * act'(z) into `out`, which may be `dy` or `kept` (or neither), from `keep_(name, z)`."""
    _TABLE[name].grad(dy, kept, out)
    return out


def finish(name: str, kept: Tensor, out: Tensor) -> Tensor:
    """act(z) into `out`, which may be `kept`, from `keep_(name, z)`."""
    step = _TABLE[name].finish
    if step is not None:
        step(kept, out)
    elif out is not kept:
        out.copy_(kept)
    return out


def activate_(name: str, z: Tensor) -> Tensor:
    """Overwrite z with act(z)."""
    return finish(name, keep_(name, z), z)
