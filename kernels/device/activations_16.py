"""Activations and their derivatives for results that are rounded to 16 bits, in about half of the instructions.

`activate_16(z, ACT)` and `derivative_16(z, ACT)` take and give fp32 blocks and are right to 2e-5 of the value, far below fp16's
half unit of 2.4e-4; `activations` has the forms for fp32 and says what each function is. What is cheaper here:

    exp, 1 / v   one instruction each, `ex2.approx.ftz` (error 2^-22) and `rcp.approx.ftz` (one unit in the last place; PTX ISA,
                 sections on ex2 and rcp). Without ftz each brings four more that keep numbers below 1e-38.
    sigmoid      t = exp(-v), s = 1 / (1 + t), and 1 - s = t s, which loses no digit. t stops at 2^126, so that t s is never
                 infinity times 0; s then stops at 2^-126.
    gelu         Phi(-a) = P(1 / (1 + 0.36 a)) exp(-a^2 / 2) for a = |z|, as Abramowitz and Stegun 7.1.26, but with P fitted to
                 the relative error: 9e-6 up to a = 6, where gelu is 6e-9, and 1e-3 at a = 14. erf takes 40 instructions, and
                 loses every digit of gelu's negative tail.

In Triton's interpreter, which runs no PTX, exp2 and division take the place of the two instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate_16", "derivative_16"]


@triton.jit
def _exp2(v, INTERPRET: tl.constexpr):
    if INTERPRET:
        r = tl.exp2(v)
    else:
        r = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    return r


@triton.jit
def _reciprocal(v, INTERPRET: tl.constexpr):
    if INTERPRET:
        r = 1.0 / v
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)
    return r


@triton.jit
def _sigmoid(w, INTERPRET: tl.constexpr):
    """(s, 1 - s) for s = sigmoid(v), from w = -v log2(e)."""
    t = _exp2(tl.minimum(w, 126.0, propagate_nan=tl.PropagateNan.ALL), INTERPRET)
    s = _reciprocal(1.0 + t, INTERPRET)
    return s, t * s


@triton.jit
def _gelu_tanh_exponent(z):
    # -2 log2(e) sqrt(2 / pi) (z + 0.044715 z^3): see `activations`.
    return z * (-2.302208198 + -0.1029432397 * z * z)


@triton.jit
def _normal(z, INTERPRET: tl.constexpr):
    """(Phi(-|z|), exp(-z^2 / 2)) for the normal Phi."""
    e = _exp2(z * z * -0.7213475204, INTERPRET)
    t = _reciprocal(1.0 + 0.36 * tl.abs(z), INTERPRET)
    p = 0.24767480790615082 + t * -0.09658286720514297
    p = 0.04402424022555351 + t * p
    p = 0.1630697399377823 + t * p
    p = 0.14180979132652283 + t * p
    return t * p * e, e


@triton.jit
def activate_16(z, ACT: tl.constexpr, INTERPRET: tl.constexpr):
    """act(z) for an fp32 block z and an activation with an exponential in it."""
    if ACT == "gelu":
        tail, _ = _normal(z, INTERPRET)
        y = tl.maximum(z, 0.0) - tl.abs(z) * tail
    elif ACT == "gelu_tanh":
        s, _ = _sigmoid(_gelu_tanh_exponent(z), INTERPRET)
        y = z * s
    elif ACT == "silu":
        s, _ = _sigmoid(z * -1.4426950409, INTERPRET)
        y = z * s
    elif ACT == "sigmoid":
        y, _ = _sigmoid(z * -1.4426950409, INTERPRET)
    else:
        tl.static_assert(ACT == "tanh", "an activation without a form for 16 bits")
        s, rest = _sigmoid(z * -2.8853900818, INTERPRET)
        # The difference cancels near zero; the series up to z^5 is right to 3e-7 there.
        z2 = tl.minimum(z * z, 1.0)
        y = tl.where(tl.abs(z) < 0.125, z + z * z2 * (-1.0 / 3 + z2 * (2.0 / 15)), s - rest)
    return y


@triton.jit
def derivative_16(z, ACT: tl.constexpr, INTERPRET: tl.constexpr):
    """act'(z) for an fp32 block z and an activation with an exponential in it."""
    if ACT == "gelu":
        tail, e = _normal(z, INTERPRET)
        d = tl.where(z < 0, tail, 1.0 - tail) + z * e * 0.3989422804
    elif ACT == "gelu_tanh":
        s, rest = _sigmoid(_gelu_tanh_exponent(z), INTERPRET)
        slope = 1.5957691216 + 0.2140644488 * z * z
        d = s * (1.0 + z * slope * rest)
    elif ACT == "silu":
        s, rest = _sigmoid(z * -1.4426950409, INTERPRET)
        d = s * (1.0 + z * rest)
    elif ACT == "sigmoid":
        s, rest = _sigmoid(z * -1.4426950409, INTERPRET)
        d = s * rest
    else:
        tl.static_assert(ACT == "tanh", "an activation without a form for 16 bits")
        s, rest = _sigmoid(z * -2.8853900818, INTERPRET)
        d = 4.0 * s * rest
    return d
