"""What follows the K loops: forward from z to y, backward from z and the gradient to dz, h and db. Nothing of z is written.

Both work on EPILOGUE_N columns of a tile at a time, by halving: the temporaries of a whole 128 x 128 tile do not fit beside its
accumulator (at 128 x 128 with 8 warps on sm_90 the unsplit backward has 80 spills, the split one none).

Legend: z (BM, BN) fp32 without bias; o_m, o_n global rows and columns; p_* pointers to (M, N) matrices, None where absent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .casts import narrow, widen
from .dropout import drop
from .gemm import halves

__all__ = ["emit_backward", "emit_forward"]


@triton.jit
def emit_forward(
    z, row0, col0, p_b, p_res, p_y, M, N, stride_b, strides_res, strides_y, dropout, ACT: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y = dropout(act(z + b)) + residual, for columns col0 .. col0 + BN."""
    if BN > EPILOGUE_N:
        left, right = halves(z, BM, BN)
        emit_forward(
            left, row0, col0, p_b, p_res, p_y, M, N, stride_b, strides_res, strides_y, dropout, ACT, DROPOUT, BM,
            BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        emit_forward(
            right, row0, col0 + BN // 2, p_b, p_res, p_y, M, N, stride_b, strides_res, strides_y, dropout, ACT,
            DROPOUT, BM, BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        if p_b is not None:
            z += widen(tl.load(p_b + o_n * stride_b, mask=m_n, other=0.0), INTERPRET)[None, :]
        y = activate(z, ACT)
        if DROPOUT:
            y = drop(y, o_m, o_n, dropout)
        if p_res is not None:
            p_res += o_m[:, None] * strides_res[0] + o_n[None, :] * strides_res[1]
            y += widen(tl.load(p_res, mask=m, other=0.0), INTERPRET)
        p_y += o_m[:, None] * strides_y[0] + o_n[None, :] * strides_y[1]
        tl.store(p_y, narrow(y, p_y.dtype.element_ty, INTERPRET), mask=m)


@triton.jit
def emit_backward(
    z, g, row0, col0, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, strides_dy, strides_dz, strides_h, stride_dbn,
    dropout, ACT: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dz = dropout(g) * act'(z + b), h = dropout(act(z + b)), db = sum of dz over the tile's rows (p_db: the tile's row).

    g: the gradient of dropout(act(z + b)) as an fp32 block, or None where it is read from p_dy.
    """
    if BN > EPILOGUE_N:
        left, right = halves(z, BM, BN)
        if p_dy is None:
            g_left, g_right = halves(g, BM, BN)
        else:
            g_left, g_right = None, None
        emit_backward(
            left, g_left, row0, col0, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, strides_dy, strides_dz, strides_h,
            stride_dbn, dropout, ACT, DROPOUT, BM, BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        emit_backward(
            right, g_right, row0, col0 + BN // 2, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, strides_dy, strides_dz,
            strides_h, stride_dbn, dropout, ACT, DROPOUT, BM, BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        if p_b is not None:
            z += widen(tl.load(p_b + o_n * stride_b, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_h is not None:
            h = activate(z, ACT)
            if DROPOUT:
                h = drop(h, o_m, o_n, dropout)
            p_h += o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
            tl.store(p_h, narrow(h, p_h.dtype.element_ty, INTERPRET), mask=m)
        if p_dy is not None:
            p_dy += o_m[:, None] * strides_dy[0] + o_n[None, :] * strides_dy[1]
            g = widen(tl.load(p_dy, mask=m, other=0.0), INTERPRET)
        if DROPOUT:
            g = drop(g, o_m, o_n, dropout)
        dz = g * derivative(z, ACT)
        p_dz += o_m[:, None] * strides_dz[0] + o_n[None, :] * strides_dz[1]
        tl.store(p_dz, narrow(dz, p_dz.dtype.element_ty, INTERPRET), mask=m)
        if p_db is not None:
            # A row beyond M has z = b there, and 0 * act'(z) is NaN where act' is not finite: dropped, not added.
            db = tl.sum(tl.where(m, dz, 0.0), axis=0)
            tl.store(p_db + o_n * stride_dbn, db, mask=m_n)
