"""What follows the K loops of a gated MLP: from z_g and z_u to h, and with the gradient dh to dz_g and dz_u; see `gated`.

Both work on EPILOGUE_N columns of a tile at a time, by halving, as in `epilogue`.

Legend: z_g, z_u, dh (BM, BN) fp32, z without bias; o_m, o_n global rows and columns; p_* pointers to (M, N) matrices, None where
absent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .casts import narrow, widen
from .gemm import halves

__all__ = ["emit_gradients", "emit_product"]


@triton.jit
def emit_product(
    z_g, z_u, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """h = act(multiplier (z_g + bg)) * (z_u + bu), for columns col0 .. col0 + BN."""
    if BN > EPILOGUE_N:
        g_left, g_right = halves(z_g, BM, BN)
        u_left, u_right = halves(z_u, BM, BN)
        emit_product(
            g_left, u_left, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT, BM,
            BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        emit_product(
            g_right, u_right, row0, col0 + BN // 2, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h,
            multiplier, ACT, BM, BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        if p_bg is not None:
            z_g += widen(tl.load(p_bg + o_n * stride_bg, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_bu is not None:
            z_u += widen(tl.load(p_bu + o_n * stride_bu, mask=m_n, other=0.0), INTERPRET)[None, :]
        h = activate(z_g * multiplier, ACT) * z_u
        p_h += o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
        tl.store(p_h, narrow(h, p_h.dtype.element_ty, INTERPRET), mask=(o_m < M)[:, None] & m_n[None, :])


@triton.jit
def emit_gradients(
    z_g, z_u, dh, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
    strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """h, dz_g and dz_u, and their sums over the tile's rows (p_dbg, p_dbu: the tile's row). dh: the gradient of h as a block, or
    None where it lies in p_dzu."""
    if BN > EPILOGUE_N:
        g_left, g_right = halves(z_g, BM, BN)
        u_left, u_right = halves(z_u, BM, BN)
        if dh is None:
            d_left, d_right = None, None
        else:
            d_left, d_right = halves(dh, BM, BN)
        emit_gradients(
            g_left, u_left, d_left, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg,
            stride_bu, strides_h, strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT, BM, BN // 2,
            EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        emit_gradients(
            g_right, u_right, d_right, row0, col0 + BN // 2, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N,
            stride_bg, stride_bu, strides_h, strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT, BM,
            BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        if p_bg is not None:
            z_g += widen(tl.load(p_bg + o_n * stride_bg, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_bu is not None:
            z_u += widen(tl.load(p_bu + o_n * stride_bu, mask=m_n, other=0.0), INTERPRET)[None, :]
        z_g *= multiplier
        a = activate(z_g, ACT)
        if p_h is not None:
            p_h += o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
            tl.store(p_h, narrow(a * z_u, p_h.dtype.element_ty, INTERPRET), mask=m)
        p_dzu += o_m[:, None] * strides_dzu[0] + o_n[None, :] * strides_dzu[1]
        if dh is None:
            dh = widen(tl.load(p_dzu, mask=m, other=0.0), INTERPRET)
        dz_u = dh * a
        tl.store(p_dzu, narrow(dz_u, p_dzu.dtype.element_ty, INTERPRET), mask=m)
        # Rows beyond M are dropped from the sums, not added as zeros: 0 * act'(b) is NaN where act' is not finite.
        if p_dbu is not None:
            tl.store(p_dbu + o_n * stride_dbun, tl.sum(tl.where(m, dz_u, 0.0), axis=0), mask=m_n)
        dz_g = dh * z_u * derivative(z_g, ACT) * multiplier
        p_dzg += o_m[:, None] * strides_dzg[0] + o_n[None, :] * strides_dzg[1]
        tl.store(p_dzg, narrow(dz_g, p_dzg.dtype.element_ty, INTERPRET), mask=m)
        if p_dbg is not None:
            tl.store(p_dbg + o_n * stride_dbgn, tl.sum(tl.where(m, dz_g, 0.0), axis=0), mask=m_n)
