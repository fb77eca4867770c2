"""Plain torch oracles for the kernels: slow, obvious, and written from the formulas, sharing no code with what they check.

Given fp64 tensors they are the truth; given the kernel's own dtype they are what torch itself would compute, whose error
calibrates the kernels' tolerance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "act_derivative_ref",
    "act_ref",
    "gated_bwd_ref",
    "gated_ref",
    "linear_bwd_ref",
    "linear_ref",
    "mlp_bwd_ref",
]


def act_ref(z: Tensor, activation: str) -> Tensor:
    """act(z), as torch has it."""
    match activation:
        case "identity":
            return z
        case "relu":
            return torch.relu(z)
        case "relu2":
            return torch.relu(z).square()
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "silu":
            return F.silu(z)
        case "sigmoid":
            return torch.sigmoid(z)
        case "tanh":
            return torch.tanh(z)
    raise ValueError(f"unknown activation {activation!r}")


def act_derivative_ref(z: Tensor, activation: str) -> Tensor:
    """act'(z), from the textbook."""
    match activation:
        case "identity":
            return torch.ones_like(z)
        case "relu":
            return (z > 0).to(z.dtype)
        case "relu2":
            return 2 * torch.relu(z)
        case "gelu":
            density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            return torch.special.ndtr(z) + z * density
        case "gelu_tanh":
            c = math.sqrt(2 / math.pi)
            t = torch.tanh(c * (z + 0.044715 * z**3))
            return (1 + t) / 2 + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
        case "sigmoid":
            s = torch.sigmoid(z)
            return s * (1 - s)
        case "tanh":
            return 1 - torch.tanh(z) ** 2
    raise ValueError(f"unknown activation {activation!r}")


def linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None = None
) -> Tensor:
    """act(x weight^T + bias) + residual."""
    y = act_ref(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def linear_bwd_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(dz, db) of `linear_ref`: dz = dy * act'(z), db = sum of dz over rows."""
    dz = dy * act_derivative_ref(F.linear(x, weight, bias), activation)
    return dz, dz.sum(0)


def mlp_bwd_ref(
    x: Tensor, w1: Tensor, b1: Tensor | None, dy: Tensor, w2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dz, db1) of y = act(x w1^T + b1) w2^T: h = act(z), dz = (dy w2) * act'(z), db1 = sum of dz over rows."""
    z = F.linear(x, w1, b1)
    dz = (dy @ w2) * act_derivative_ref(z, activation)
    return act_ref(z, activation), dz, dz.sum(0)


def gated_ref(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    activation: str,
    multiplier: float = 1.0,
) -> Tensor:
    """act(multiplier (x wg^T + bg)) * (x wu^T + bu)."""
    return act_ref(F.linear(x, wg, bg) * multiplier, activation) * F.linear(x, wu, bu)


def gated_bwd_ref(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    dy: Tensor,
    wd: Tensor,
    activation: str,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dz_g, dz_u) of y = gated(x) wd^T."""
    z_g, z_u, dh = F.linear(x, wg, bg) * multiplier, F.linear(x, wu, bu), dy @ wd
    a = act_ref(z_g, activation)
    return a * z_u, dh * z_u * act_derivative_ref(z_g, activation) * multiplier, dh * a
