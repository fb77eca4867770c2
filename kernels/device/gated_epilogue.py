"""What follows the K loops of a gated MLP: from z_g and z_u to h, and with the gradient dh to dz_g and dz_u; see `gated`.

Both work on EPILOGUE_N columns of a tile at a time and ask for the next ones' operands first, as in `epilogue`.

Legend: z_g, z_u, dh (BM, BN) fp32, z without bias; o_m, o_n global rows and columns; p_* pointers to (M, N) matrices, None where
absent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .casts import narrow, widen
from .epilogue import fetch_block, fetch_row
from .gemm import pieces

__all__ = ["emit_gradients", "emit_product"]


@triton.jit
def emit_product(
    z_g, z_u, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """h = act(multiplier (z_g + bg)) * (z_u + bu), for columns col0 .. col0 + BN."""
    gates = pieces(z_g, BM, BN, EPILOGUE_N)
    ups = pieces(z_u, BM, BN, EPILOGUE_N)
    o_m = row0 + tl.arange(0, BM)
    bg = fetch_row(p_bg, col0, N, stride_bg, EPILOGUE_N)
    bu = fetch_row(p_bu, col0, N, stride_bu, EPILOGUE_N)
    for i in tl.static_range(BN // EPILOGUE_N):
        own_bg, own_bu = bg, bu
        if i + 1 < BN // EPILOGUE_N:
            bg = fetch_row(p_bg, col0 + (i + 1) * EPILOGUE_N, N, stride_bg, EPILOGUE_N)
            bu = fetch_row(p_bu, col0 + (i + 1) * EPILOGUE_N, N, stride_bu, EPILOGUE_N)
        o_n = col0 + i * EPILOGUE_N + tl.arange(0, EPILOGUE_N)
        g, u = gates[i], ups[i]
        if p_bg is not None:
            g += widen(own_bg, INTERPRET)[None, :]
        if p_bu is not None:
            u += widen(own_bu, INTERPRET)[None, :]
        h = activate(g * multiplier, ACT, p_h.dtype.element_ty, INTERPRET) * u
        p_out = p_h + o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
        tl.store(p_out, narrow(h, p_h.dtype.element_ty, INTERPRET), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit
def emit_gradients(
    z_g, z_u, dh, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
    strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """h, dz_g and dz_u, and their sums over the tile's rows (p_dbg, p_dbu: the tile's row). dh: the gradient of h as a block, or
    None where it lies in p_dzu."""
    gates = pieces(z_g, BM, BN, EPILOGUE_N)
    ups = pieces(z_u, BM, BN, EPILOGUE_N)
    if dh is None:
        p_dh = p_dzu
    else:
        p_dh = None
        gradients = pieces(dh, BM, BN, EPILOGUE_N)
    o_m = row0 + tl.arange(0, BM)
    bg = fetch_row(p_bg, col0, N, stride_bg, EPILOGUE_N)
    bu = fetch_row(p_bu, col0, N, stride_bu, EPILOGUE_N)
    d = fetch_block(p_dh, row0, col0, M, N, strides_dzu, BM, EPILOGUE_N)
    for i in tl.static_range(BN // EPILOGUE_N):
        o_n = col0 + i * EPILOGUE_N + tl.arange(0, EPILOGUE_N)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        g, u = gates[i], ups[i]
        if p_bg is not None:
            g += widen(bg, INTERPRET)[None, :]
        if p_bu is not None:
            u += widen(bu, INTERPRET)[None, :]
        g *= multiplier
        a = activate(g, ACT, p_dzu.dtype.element_ty, INTERPRET)
        if p_h is not None:
            p_out = p_h + o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
            tl.store(p_out, narrow(a * u, p_h.dtype.element_ty, INTERPRET), mask=m)
        dv = widen(d, INTERPRET) if dh is None else gradients[i]
        if i + 1 < BN // EPILOGUE_N:
            bg = fetch_row(p_bg, col0 + (i + 1) * EPILOGUE_N, N, stride_bg, EPILOGUE_N)
            bu = fetch_row(p_bu, col0 + (i + 1) * EPILOGUE_N, N, stride_bu, EPILOGUE_N)
            d = fetch_block(p_dh, row0, col0 + (i + 1) * EPILOGUE_N, M, N, strides_dzu, BM, EPILOGUE_N)
        dz_u = dv * a
        p_out = p_dzu + o_m[:, None] * strides_dzu[0] + o_n[None, :] * strides_dzu[1]
        tl.store(p_out, narrow(dz_u, p_dzu.dtype.element_ty, INTERPRET), mask=m)
        # Rows beyond M are dropped from the sums, not added as zeros: 0 * act'(b) is NaN where act' is not finite.
        if p_dbu is not None:
            tl.store(p_dbu + o_n * stride_dbun, tl.sum(tl.where(m, dz_u, 0.0), axis=0), mask=m_n)
        dz_g = dv * u * derivative(g, ACT, p_dzg.dtype.element_ty, INTERPRET) * multiplier
        p_out = p_dzg + o_m[:, None] * strides_dzg[0] + o_n[None, :] * strides_dzg[1]
        tl.store(p_out, narrow(dz_g, p_dzg.dtype.element_ty, INTERPRET), mask=m)
        if p_dbg is not None:
            tl.store(p_dbg + o_n * stride_dbgn, tl.sum(tl.where(m, dz_g, 0.0), axis=0), mask=m_n)
