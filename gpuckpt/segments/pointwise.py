"""Activation functions and their derivatives on any array-API namespace.

The names are those of the fused kernels (`gpuckpt.kernels.device.activations`); the code is independent of theirs and keeps the
precision of its input, float64 included. The erf form of GELU is not here: the array API has no erf.

z: pre-activation, of any shape. No intermediate overflows: exponentials are taken of negative numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.segments.arrays import Array, compat

__all__ = ["POINTWISE", "activate", "check_activation", "derivative"]


def _sigmoid(xp: Any, z: Array) -> Array:
    t = xp.exp(-xp.abs(z))
    return xp.where(z >= 0, 1.0, t) / (1.0 + t)


def _sigmoid_slope(xp: Any, z: Array) -> Array:
    # Written without 1 - s, which would lose every digit for large z.
    t = xp.exp(-xp.abs(z))
    return t / ((1.0 + t) * (1.0 + t))


def _relu(xp: Any, z: Array) -> Array:
    return xp.where(z < 0, xp.zeros_like(z), z)


def _relu_slope(xp: Any, z: Array) -> Array:
    return xp.astype(z > 0, z.dtype)


def _relu2_slope(xp: Any, z: Array) -> Array:
    return 2.0 * _relu(xp, z)


def _tanh_slope(xp: Any, z: Array) -> Array:
    return 4.0 * _sigmoid_slope(xp, 2.0 * z)


def _silu_slope(xp: Any, z: Array) -> Array:
    return _sigmoid(xp, z) + z * _sigmoid_slope(xp, z)


_ROOT = 2.0 * math.sqrt(2.0 / math.pi)
"""gelu_tanh is z sigmoid(2u) with 2u = _ROOT (z + 0.044715 z^3): Hendrycks and Gimpel 2016, arXiv:1606.08415."""


def _gelu_tanh(xp: Any, z: Array) -> Array:
    return z * _sigmoid(xp, _ROOT * z * (1.0 + 0.044715 * z * z))


def _gelu_tanh_slope(xp: Any, z: Array) -> Array:
    v = _ROOT * z * (1.0 + 0.044715 * z * z)
    return _sigmoid(xp, v) + z * _ROOT * (1.0 + 3 * 0.044715 * z * z) * _sigmoid_slope(xp, v)


_Pointwise = Callable[[Any, Array], Array]
POINTWISE: dict[str, tuple[_Pointwise, _Pointwise]] = {
    "identity": (lambda xp, z: z, lambda xp, z: xp.ones_like(z)),
    "relu": (_relu, _relu_slope),
    "relu2": (lambda xp, z: _relu(xp, z) ** 2, _relu2_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "silu": (lambda xp, z: z * _sigmoid(xp, z), _silu_slope),
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "tanh": (lambda xp, z: xp.tanh(z), _tanh_slope),
}
"""name -> (function, derivative)"""


def check_activation(name: str) -> None:
    """Raise `ValueError` for an unknown activation."""
    if not isinstance(name, str) or name not in POINTWISE:
        raise ValueError(f"unknown activation {shown(name)}: expected one of {', '.join(POINTWISE)}")


def activate(name: str, z: Array) -> Array:
    """act(z), in the shape and dtype of `z`."""
    return POINTWISE[name][0](compat.array_namespace(z), z)


def derivative(name: str, z: Array) -> Array:
    """act'(z), in the shape and dtype of `z`; at 0 that of relu is 0."""
    return POINTWISE[name][1](compat.array_namespace(z), z)
