"""What follows the K loops: forward from z to y, backward from z and the gradient to dz, h and db. Nothing of z is written.

Both work on EPILOGUE_N columns of a tile at a time: the temporaries of a whole 128 x 128 tile do not fit beside its accumulator
(at 128 x 128 with 8 warps on sm_90 the unsplit backward has 80 spills, the split one none). What a piece needs from memory is
asked for before the piece in front of it is computed: two warps on a scheduler hide nothing of a load's 700 cycles by themselves.

Legend: z (BM, BN) fp32 without bias; o_m, o_n global rows and columns; p_* pointers to (M, N) matrices, None where absent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .casts import narrow, widen
from .dropout import drop
from .gemm import pieces

__all__ = ["emit_backward", "emit_forward", "fetch_block", "fetch_row"]


@triton.jit
def fetch_row(p, col0, N, stride, BN: tl.constexpr):
    """Elements col0 .. col0 + BN of a vector (N) as they lie in memory; p may be None, and nothing is fetched."""
    v = 0.0
    if p is not None:
        o_n = col0 + tl.arange(0, BN)
        v = tl.load(p + o_n * stride, mask=o_n < N, other=0.0)
    return v


@triton.jit
def fetch_block(p, row0, col0, M, N, strides, BM: tl.constexpr, BN: tl.constexpr):
    """A block (BM, BN) of a matrix (M, N), likewise."""
    v = 0.0
    if p is not None:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        p += o_m[:, None] * strides[0] + o_n[None, :] * strides[1]
        v = tl.load(p, mask=(o_m < M)[:, None] & (o_n < N)[None, :], other=0.0)
    return v


@triton.jit
def emit_forward(
    z, row0, col0, p_b, p_res, p_y, M, N, stride_b, strides_res, strides_y, dropout, ACT: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y = dropout(act(z + b)) + residual, for columns col0 .. col0 + BN."""
    parts = pieces(z, BM, BN, EPILOGUE_N)
    o_m = row0 + tl.arange(0, BM)
    b = fetch_row(p_b, col0, N, stride_b, EPILOGUE_N)
    r = fetch_block(p_res, row0, col0, M, N, strides_res, BM, EPILOGUE_N)
    for i in tl.static_range(BN // EPILOGUE_N):
        own_b, own_r = b, r
        if i + 1 < BN // EPILOGUE_N:
            b = fetch_row(p_b, col0 + (i + 1) * EPILOGUE_N, N, stride_b, EPILOGUE_N)
            r = fetch_block(p_res, row0, col0 + (i + 1) * EPILOGUE_N, M, N, strides_res, BM, EPILOGUE_N)
        o_n = col0 + i * EPILOGUE_N + tl.arange(0, EPILOGUE_N)
        v = parts[i]
        if p_b is not None:
            v += widen(own_b, INTERPRET)[None, :]
        y = activate(v, ACT, p_y.dtype.element_ty, INTERPRET)
        if DROPOUT:
            y = drop(y, o_m, o_n, dropout)
        if p_res is not None:
            y += widen(own_r, INTERPRET)
        p_out = p_y + o_m[:, None] * strides_y[0] + o_n[None, :] * strides_y[1]
        tl.store(p_out, narrow(y, p_y.dtype.element_ty, INTERPRET), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit
def emit_backward(
    z, g, row0, col0, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, strides_dy, strides_dz, strides_h, stride_dbn,
    dropout, ACT: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """dz = dropout(g) * act'(z + b), h = dropout(act(z + b)), db = sum of dz over the tile's rows (p_db: the tile's row).

    g: the gradient of dropout(act(z + b)) as an fp32 block, or None where it is read from p_dy.
    """
    parts = pieces(z, BM, BN, EPILOGUE_N)
    if p_dy is None:
        gradients = pieces(g, BM, BN, EPILOGUE_N)
    o_m = row0 + tl.arange(0, BM)
    b = fetch_row(p_b, col0, N, stride_b, EPILOGUE_N)
    dy = fetch_block(p_dy, row0, col0, M, N, strides_dy, BM, EPILOGUE_N)
    for i in tl.static_range(BN // EPILOGUE_N):
        o_n = col0 + i * EPILOGUE_N + tl.arange(0, EPILOGUE_N)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        v = parts[i]
        if p_b is not None:
            v += widen(b, INTERPRET)[None, :]
        if p_h is not None:
            h = activate(v, ACT, p_h.dtype.element_ty, INTERPRET)
            if DROPOUT:
                h = drop(h, o_m, o_n, dropout)
            p_out = p_h + o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
            tl.store(p_out, narrow(h, p_h.dtype.element_ty, INTERPRET), mask=m)
        dv = gradients[i] if p_dy is None else widen(dy, INTERPRET)
        if i + 1 < BN // EPILOGUE_N:
            b = fetch_row(p_b, col0 + (i + 1) * EPILOGUE_N, N, stride_b, EPILOGUE_N)
            dy = fetch_block(p_dy, row0, col0 + (i + 1) * EPILOGUE_N, M, N, strides_dy, BM, EPILOGUE_N)
        if DROPOUT:
            dv = drop(dv, o_m, o_n, dropout)
        dz = dv * derivative(v, ACT, p_dz.dtype.element_ty, INTERPRET)
        p_out = p_dz + o_m[:, None] * strides_dz[0] + o_n[None, :] * strides_dz[1]
        tl.store(p_out, narrow(dz, p_dz.dtype.element_ty, INTERPRET), mask=m)
        if p_db is not None:
            # A row beyond M has z = b there, and 0 * act'(z) is NaN where act' is not finite: dropped, not added.
            db = tl.sum(tl.where(m, dz, 0.0), axis=0)
            tl.store(p_db + o_n * stride_dbn, db, mask=m_n)
