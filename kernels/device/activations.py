"""Activations and their exact derivatives inside kernels, in fp32, chosen by name at compile time.

`activate(z, ACT, DTYPE)` and `derivative(z, ACT, DTYPE)` take and give fp32 blocks; DTYPE is what the result will be rounded to.
For 16 bits cheaper forms of the same functions do (`activations_16`); those here are for fp32. Only exp, erf and arithmetic are
used, so the same code runs in Triton's interpreter, where libdevice is absent. No intermediate overflows for any finite z below
1e12 in magnitude: exponentials are taken of negative numbers only.

Formulas: gelu is z Phi(z) with the normal Phi (erf form, Hendrycks and Gimpel 2016, arXiv:1606.08415); gelu_tanh is
their tanh approximation written as z sigmoid(2u), which is the same function with one exponential; relu2 is max(z, 0)^2
(So et al. 2021, arXiv:2109.08668); silu is z sigmoid(z). At z = 0 relu's derivative is 0, as in torch; NaN passes through.

Plain torch versions, which share no code with these, are in `testing.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations_16 import activate_16, derivative_16

__all__ = ["ACTIVATIONS", "activate", "derivative", "needs_z"]

ACTIVATIONS = ("identity", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


def needs_z(activation: str) -> bool:
    """Whether the derivative depends on the pre-activation at all."""
    return activation != "identity"


@triton.jit
def _sigmoid(v):
    t = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def _sigmoid_slope(v):
    # s (1 - s) without the subtraction, which would lose every digit for large v.
    t = tl.exp(-tl.abs(v))
    return t / ((1.0 + t) * (1.0 + t))


@triton.jit
def _tanh(v):
    # (1 - t) / (1 + t) cancels near zero; the Taylor series up to v^9 is exact to fp32 there (next term < 9e-9 of the value).
    t = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(v < 0, -far, far)
    s = tl.minimum(v * v, 1.0)
    near = v * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(v) < 0.25, near, far)


@triton.jit
def _gelu_tanh_inner(z):
    # 2u = 2 sqrt(2/pi) (z + 0.044715 z^3), so that 0.5 (1 + tanh u) = sigmoid(2u).
    return 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)


@triton.jit
def activate(z, ACT: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """act(z) for an fp32 block z."""
    if ACT == "identity":
        y = z
    elif ACT == "relu":
        y = tl.where(z < 0, 0.0, z)
    elif ACT == "relu2":
        y = tl.where(z < 0, 0.0, z * z)
    elif tl.float32 != DTYPE:
        y = activate_16(z, ACT, INTERPRET)
    elif ACT == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = z * _sigmoid(_gelu_tanh_inner(z))
    elif ACT == "silu":
        y = z * _sigmoid(z)
    elif ACT == "sigmoid":
        y = _sigmoid(z)
    else:
        tl.static_assert(ACT == "tanh", "unknown activation")
        y = _tanh(z)
    return y


@triton.jit
def derivative(z, ACT: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """act'(z) for an fp32 block z."""
    if ACT == "identity":
        d = tl.full(z.shape, 1.0, tl.float32)
    elif ACT == "relu":
        d = tl.where(z <= 0, 0.0, 1.0)
    elif ACT == "relu2":
        d = tl.where(z < 0, 0.0, 2.0 * z)
    elif tl.float32 != DTYPE:
        d = derivative_16(z, ACT, INTERPRET)
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        v = _gelu_tanh_inner(z)
        dv = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        d = _sigmoid(v) + z * dv * _sigmoid_slope(v)
    elif ACT == "silu":
        d = _sigmoid(z) + z * _sigmoid_slope(z)
    elif ACT == "sigmoid":
        d = _sigmoid_slope(z)
    else:
        tl.static_assert(ACT == "tanh", "unknown activation")
        # 1 - tanh^2 = 4 sigmoid'(2z), free of cancellation.
        d = 4.0 * _sigmoid_slope(2.0 * z)
    return d
